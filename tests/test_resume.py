"A run that is killed, damaged or out of room, and started again: it ends as if nothing had happened, bit for bit."

import functools
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import time
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from server import SERVER
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import rsna_seg.data
import rsna_seg.model
import rsna_seg.train
from rsna_seg.app.cli import main
from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.data import PrepareConfig, SliceDataset, prepare
from rsna_seg.files import ConfigError, OutputError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.train import TrainConfig, train
from rsna_seg.training.loop import Tally, load_state, save_state

pytestmark = pytest.mark.usefixtures("one_thread")

THIN = functools.partial(smp.Unet, decoder_channels=(16, 16, 8, 8, 8))  # the U-Net with a narrow decoder
SMALL = {"size": 64, "workers": 0, "epochs": 3, "save_minutes": 0}
FIRST = TrainConfig(**SMALL, batch_size=1, accumulation=2, encoder_weights="none", ema=0.9, clip=1.0)
REFINE = FinetuneConfig(**SMALL, batch_size=2, freeze_epochs=1, lr=1e-3)
VARIES = ["seconds", "slices_per_second", "peak_memory_gb"]  # from run to run


class Tiny(nn.Module):
    "Stands in for the U-Net where the network does not matter; a step takes milliseconds."

    width = 8

    def __init__(self, **settings):
        super().__init__()
        wide = self.width
        self.encoder = nn.Sequential(nn.Conv2d(3, wide, 4, stride=4), nn.BatchNorm2d(wide), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(wide, wide, 3, stride=4), nn.BatchNorm2d(wide), nn.Conv2d(wide, 6, 1), nn.Upsample((64, 64)))

    def forward(self, images):
        return self.decoder(self.encoder(images))


class Wide(Tiny):
    "One whose state has 10 MB: it can be killed while it writes them."

    width = 256


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(smp, "Unet", Tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two datasets: `data` with 24 training slices and 8 to validate, `other` from other patients."
    folder = tmp_path_factory.mktemp("resume")
    for seed, name in ((0, "data"), (1, "other")):
        write_kaggle(folder / f"kaggle_{name}", patients=3, size=64, slices=8, seed=seed)
        prepare(folder / f"kaggle_{name}", folder / name, config=PrepareConfig(size=64, jobs=1))
    manifest = pd.read_csv(folder / "data" / "manifest.csv", dtype=str)
    pd.concat([manifest[manifest.split == "train"][:24], manifest[manifest.split == "valid"]]).to_csv(
        folder / "data" / "manifest.csv", index=False)
    return folder


# Runs in processes of their own

def _work(pipe, network, stop_at, start, words):
    "In the process: the run, with a word through the pipe after each step; it kills itself beside the replacement of one file."

    def add(tally, *step, real=Tally.add):
        real(tally, *step)
        pipe.send_bytes(b"step")

    def replace_file(part, path, real=os.replace):
        name = os.path.basename(path)
        if stop_at == (name, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(part, path)
        if stop_at == (name, "after"):
            os.kill(os.getpid(), signal.SIGKILL)

    multiprocessing.set_start_method("fork", force=True)  # of its loader's workers: those of a server would outlive it
    torch.set_num_threads(1)
    smp.Unet, Tally.add, os.replace = network, add, replace_file
    start(*words)


def begin(start, *words, network=Wide, stop_at=None):
    "The process of a run, and the end of the pipe that tells of its steps."
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_work, args=(theirs, network, stop_at, start, words))
    process.start()
    theirs.close()
    return process, ours


def killed_on_the_way(start, *words, steps, milliseconds, **settings):
    "Whether the run was killed, so many steps and milliseconds after its start; it may have ended before."
    process, pipe = begin(start, *words, **settings)
    try:
        for _ in range(steps):
            pipe.recv_bytes()
        time.sleep(milliseconds / 1000)
        process.kill()
    except EOFError:
        pass
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def to_the_end(start, *words, **settings):
    process, _ = begin(start, *words, **settings)
    process.join()
    assert process.exitcode == 0


def alike(one, other):
    "Whether two states are the same, bit for bit."
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    return one == other or one != one and other != other


def contents(run):
    "What is in a run's folder, without what may depend on interruptions."
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    state["history"] = [{key: value for key, value in row.items() if key not in VARIES} for row in state["history"]]
    free = ("workers", "save_minutes", "max_hours", "trackers")
    config = json.loads((run / "config.json").read_text())
    [weights], [card] = run.glob("best_*.pth"), run.glob("best_*.json")
    card = {key: value for key, value in json.loads(card.read_text()).items() if key != "sha256"}  # of a file with the config
    card["config"] = {key: value for key, value in card["config"].items() if key not in free}
    return {
        **state, "config.json": {key: value for key, value in config.items() if key not in (*free, "used")}, weights.name: torch.load(weights, weights_only=True),
        "card": card, "history.csv": pd.read_csv(run / "history.csv").drop(columns=VARIES).to_csv(),
    }  # fmt: skip


def differences(one, other):
    "What of two runs is not the same, bit for bit."
    one, other = contents(one), contents(other)
    return [name for name in one.keys() | other.keys() if not alike(one.get(name), other.get(name))]


@pytest.fixture(scope="module")
def whole(folder):
    "Two undisturbed runs: the first training, and the fine-tuning from its checkpoint."
    to_the_end(train, folder / "data", folder / "first", replace(FIRST, save_minutes=60))
    to_the_end(finetune, folder / "first" / "best_model_512.pth", folder / "data", folder / "refined", replace(REFINE, save_minutes=60))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_killed_at_random_again_and_again(whole, tmp_path, stage):
    "After a few more steps, and some milliseconds: while a state is written, a slice loaded, an epoch judged."
    start, undisturbed, words = {
        "train": (train, whole / "first", [whole / "data", tmp_path, FIRST]),
        "finetune": (finetune, whole / "refined", [whole / "first" / "best_model_512.pth", whole / "data", tmp_path, REFINE]),
    }[stage]
    rng, kills = np.random.default_rng(2023), 0
    while killed_on_the_way(start, *words, steps=rng.integers(1, 5), milliseconds=rng.uniform(0, 40)):
        kills += 1
    assert kills >= 6
    assert differences(undisturbed, tmp_path) == []


@pytest.mark.slow
def test_killed_long_after_the_latest_state(whole, tmp_path):
    "The U-Net, with a state after each epoch only, so that steps are made again; with a loader worker, which must end too."
    config = replace(FIRST, batch_size=4, save_minutes=60)  # three steps to an epoch
    to_the_end(train, whole / "data", tmp_path / "whole", config, network=THIN)
    words, killed = (train, whole / "data", tmp_path / "killed", replace(config, workers=1)), []
    for steps in (4, 5, 2):
        killed.append(killed_on_the_way(*words, steps=steps, milliseconds=0, network=THIN))
    assert killed == [True] * 3
    state = torch.load(tmp_path / "killed" / "last" / "state.pt", weights_only=True)
    assert (len(state["history"]), state["tally"]["step"], state["steps"]) == (2, 0, 6)
    to_the_end(*words, network=THIN)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.slow
def test_killed_on_either_side_of_each_replaced_file(whole, tmp_path):
    "Config, state, history, card and checkpoint: a kill just before or just after one takes its name leaves a run that goes on."
    names = ["config.json", "state.pt", "previous.pt", "history.csv", "best_model_512.json", "best_model_512.pth"]
    for stop_at in [(name, side) for name in names for side in ("before", "after")]:
        process, _ = begin(train, whole / "data", tmp_path, FIRST, stop_at=stop_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL, stop_at
    to_the_end(train, whole / "data", tmp_path, FIRST)
    assert differences(whole / "first", tmp_path) == []


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_a_finished_run_is_left_alone(whole, stage, monkeypatch, capsys):
    "Started again, also from the command line, it makes no optimiser and no forward pass, loads no slice and writes no file."

    def refuse(*_, **__):
        raise AssertionError("there was nothing left to do")

    monkeypatch.setattr(smp, "Unet", Wide)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", refuse)
    monkeypatch.setattr(SliceDataset, "__getitem__", refuse)
    hook = register_module_forward_pre_hook(refuse)
    run = whole / {"train": "first", "finetune": "refined"}[stage]
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    try:
        if stage == "train":
            again = train(whole / "data", run, replace(FIRST, save_minutes=60))
        else:
            again = finetune(whole / "first" / "best_model_512.pth", whole / "data", run, replace(REFINE, save_minutes=60))
    finally:
        hook.remove()
    assert times == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert len(again.history) == 3 and again.checkpoint.exists()


# In this process


class Stop(Exception):
    pass


def stopped(run, after):
    "Runs until so many steps are made; the state after each but the last is kept."
    made = []

    def add(tally, *step, real=Tally.add):
        real(tally, *step)
        made.append(tally.step)
        if len(made) == after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Tally, "add", add)
        run()


@pytest.fixture(scope="module")
def halves(folder):
    "A run that stopped in its second epoch, and the same one undisturbed."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smp, "Unet", Tiny)
        train(folder / "data", folder / "undisturbed", FIRST)
        stopped(lambda: train(folder / "data", folder / "half", FIRST), after=21)
    return folder / "half"


@pytest.fixture
def half(halves, tmp_path, tiny):
    "A copy of the run that stopped."
    return shutil.copytree(halves, tmp_path / "half")


def goes_on(folder, half, **settings):
    train(folder / "data", half, replace(FIRST, **settings))
    assert differences(folder / "undisturbed", half) == []


OTHER = {
    "size": 96, "batch_size": 3, "accumulation": 3, "epochs": 4, "lr": 2e-3, "weight_decay": 0.1, "dice": 0.4, "focal": 0.6,
    "augment": AugmentConfig(rotate=0.4), "mixed_precision": "bf16", "validate_on": "train", "fold": 0, "seed": 1, "most_skipped": 19,
    "clip": 2.0, "ema": 0.5, "patience": 7, "freeze_epochs": 2, "dice_over": "image", "preset": "base",
    "encoder_weights": "imagenet", "channels": "neighbours", "weights": (1.0,), "phantoms": 1, "phantoms_alone": 0.5,
}  # fmt: skip
FREE = {"workers": 1, "save_minutes": 3.0, "max_hours": 100.0, "trackers": ("tensorboard",)}  # nothing depends on them


@pytest.fixture(scope="module")
def begun(folder):
    "A begun training and a begun fine-tuning."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smp, "Unet", Tiny)
        first = train(folder / "data", folder / "begun_first", replace(FIRST, epochs=1))
        words = [first.checkpoint, folder / "data", folder / "begun_refined"]
        stopped(lambda: train(folder / "data", folder / "begun", FIRST), after=3)
        stopped(lambda: finetune(*words, REFINE), after=3)
    return {TrainConfig: (train, [folder / "data", folder / "begun"], FIRST), FinetuneConfig: (finetune, words, REFINE)}


SETTINGS = [(kind, field.name) for kind in (TrainConfig, FinetuneConfig) for field in fields(kind) if field.name not in FREE]
SETTINGS.remove((FinetuneConfig, "channels"))  # what the checkpoint was trained on refuses that before


@pytest.mark.parametrize("kind, name", SETTINGS, ids=lambda it: getattr(it, "__name__", it))
def test_another_setting_is_refused(begun, tiny, kind, name, capsys):
    "Every setting that can change the weights, named in one sentence; nothing is written."
    start, words, config = begun[kind]
    other = OTHER[name]
    assert asdict(config)[name] != other
    files = {path: path.stat().st_mtime_ns for path in words[-1].rglob("*")}
    with pytest.raises(ConfigError, match=f"holds a run with {name} = .* go on with the same settings or choose another folder.$"):
        start(*words, replace(config, **{name: other}))
    assert files == {path: path.stat().st_mtime_ns for path in words[-1].rglob("*")}


def test_other_data_and_another_start_are_refused(folder, begun, tiny):
    start, (data, out), config = begun[TrainConfig]
    with pytest.raises(ConfigError, match="holds a run with dataset = "):
        train(folder / "other", out, config)
    start, (checkpoint, data, out), config = begun[FinetuneConfig]
    with pytest.raises(ConfigError, match="holds a run with dataset = "):
        finetune(checkpoint, folder / "other", out, config)
    another = train(folder / "data", folder / "another", replace(FIRST, epochs=1, seed=4)).checkpoint
    with pytest.raises(ConfigError, match="holds a run with begin_with = "):
        finetune(another, data, out, config)
    with pytest.raises(ConfigError, match="holds a run with .* = "):  # a fine-tuning in the folder of a first training
        finetune(checkpoint, data, begun[TrainConfig][1][1], config)


def test_a_refusal_on_the_command_line(begun, tiny, capsys):
    _, (data, out), _ = begun[TrainConfig]
    with pytest.raises(SystemExit) as end:
        main(["train", str(data), str(out)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and f"{out} holds a run with size = 64, not 512" in said


@pytest.mark.parametrize("name", FREE)
def test_what_changes_no_weight_may_change(folder, half, name):
    if name == "trackers":
        pytest.importorskip("tensorboard")
    goes_on(folder, half, **{name: FREE[name]})


def test_a_run_that_must_end_in_time(folder, halves, tmp_path, tiny):
    "It stops after the step in which its hours are over and keeps the state; begun again and again, it ends the same."
    session, stops = replace(FIRST, max_hours=1e-9, save_minutes=60), 0
    while not train(folder / "data", tmp_path, session).finished:
        stops += 1
        state = torch.load(tmp_path / "last" / "state.pt", weights_only=True)
        assert 12 * len(state["history"]) + state["tally"]["step"] == stops
    assert stops == 36 and train(folder / "data", tmp_path, FIRST).finished
    assert differences(folder / "undisturbed", tmp_path) == []


def test_the_command_line_says_how_to_go_on(folder, tmp_path, tiny, capsys, monkeypatch):
    words = ["train", str(folder / "data"), str(tmp_path / "a run"), "--size", "64", "--encoder-weights", "none", "--workers", "0"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/rsna_seg", *words, "--max-hours", "1e-9"])
    with pytest.raises(SystemExit) as end:
        main([*words, "--max-hours", "1e-9"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert end.value.code == 0 and last == f"time is up; to go on: rsna_seg {shlex.join([*words, '--max-hours', '1e-9'])}"


def test_a_resumed_run_asks_for_no_weights(folder, tmp_path, tiny, monkeypatch):
    "What it started from is in its state; the hub need not be there a second time."
    asked = []
    monkeypatch.setattr(nn.Sequential, "model", None, raising=False)  # where the U-Net's encoder has its weights
    monkeypatch.setattr(rsna_seg.model, "_load_weights", lambda *_, **__: asked.append(1))
    monkeypatch.setattr(rsna_seg.model, "_read_tensors", lambda *_: {})
    monkeypatch.setattr(rsna_seg.model, "imagenet_file", lambda: asked.append(2))
    config = replace(FIRST, encoder_weights="imagenet")
    stopped(lambda: train(folder / "data", tmp_path, config), after=2)
    assert asked == [2, 1]
    train(folder / "data", tmp_path, config)
    assert asked == [2, 1]


def test_any_number_of_workers_gives_the_same_weights(folder, tmp_path, tiny, monkeypatch):
    started, real = [], rsna_seg.data.DataLoader.__iter__

    def begin_epoch(loader):
        epoch = real(loader)
        started.append(len(getattr(epoch, "_workers", [])))
        return epoch

    monkeypatch.setattr(rsna_seg.data, "cpu_count", lambda: 4)
    monkeypatch.setattr(rsna_seg.data.DataLoader, "__iter__", begin_epoch)
    for workers in (0, 2, 4):
        started.clear()
        train(folder / "data", tmp_path / str(workers), replace(FIRST, workers=workers, epochs=2))
        assert started == [workers] * 4  # two epochs, each with its validation
    assert differences(tmp_path / "0", tmp_path / "2") == differences(tmp_path / "0", tmp_path / "4") == []


# Damage


def cut(file):
    return file[: len(file) - 500]


def empty(file):
    return b""


def zeros(file):
    return bytes(len(file))


def zeros_at_the_end(file):
    return file[: len(file) // 2] + bytes(len(file) - len(file) // 2)


def zeros_inside(file):
    return file[:4096] + bytes(4096) + file[8192:]


def one_bit(file):
    middle = len(file) // 2
    return file[:middle] + bytes([file[middle] ^ 1]) + file[middle + 1 :]


def text(file):
    return b"<html>the session has ended</html>"


DAMAGES = [cut, empty, zeros, zeros_at_the_end, zeros_inside, one_bit, text]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before(folder, half, damage, capsys):
    state = half / "last" / "state.pt"
    whole = state.read_bytes()
    assert damage(whole) != whole
    state.write_bytes(damage(whole))
    goes_on(folder, half)
    said = capsys.readouterr().err
    assert said.startswith(f"{state} cannot be read (") and said.count("\n") == 1


def test_a_lost_state_falls_back_too(folder, half):
    (half / "last" / "state.pt").unlink()
    goes_on(folder, half)


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_damaged_states_end_in_a_sentence(folder, half, damage, capsys):
    for name in ("state.pt", "previous.pt"):
        (half / "last" / name).write_bytes(damage((half / "last" / name).read_bytes()))
    with pytest.raises(ConfigError, match="last holds no state that can be read; delete it to begin the run anew.$"):
        train(folder / "data", half, FIRST)
    shutil.rmtree(half / "last")
    goes_on(folder, half)


def test_a_damaged_config_ends_in_a_sentence(folder, half):
    (half / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json of the run to resume cannot be read"):
        train(folder / "data", half, FIRST)


# No room


def refuse_writing(path):
    "The next file of this process that wants the name meets a full disk."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{os.getpid()}-{path.name}").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["config.json", "last/state.pt", "history.csv", "best_model_512.json", "best_model_512.pth"])
def test_a_full_disk(folder, half, name):
    "One sentence; what stood there stays, and nothing half-written; with room again the run goes on."
    before = {path: path.read_bytes() for path in (half / "last").iterdir()}
    (half / "best_model_512.pth").unlink() if name.startswith("best") else None
    refuse_writing(half / name)
    with pytest.raises(OutputError, match=f"^{half}.* cannot be written: No space left on device; put that right or choose another place.$"):
        train(folder / "data", half, FIRST)
    assert not list(half.rglob(".*"))
    if name in ("config.json", "last/state.pt"):
        assert before == {path: path.read_bytes() for path in (half / "last").iterdir()}
    goes_on(folder, half)


def test_a_replaced_state_takes_no_room_in_a_trash(tmp_path):
    "Google Drive keeps the file that another replaces; a link stands for its trash."
    for steps in (1, 2):
        save_state(tmp_path, {"steps": steps})
    os.link(tmp_path / "last" / "previous.pt", tmp_path / "trash")
    save_state(tmp_path, {"steps": 3})
    assert (tmp_path / "trash").stat().st_size == 0 and load_state(tmp_path) == {"steps": 3}


def test_a_disk_that_fills_up_while_the_state_is_written(folder, half, capsys):
    "Half of it still fits; on the command line, too, that is one sentence."
    before = {path: path.read_bytes() for path in (half / "last").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    few = ["--size", "64", "--batch-size", "1", "--accumulation", "2", "--epochs", "3", "--encoder-weights", "none", "--ema", "0.9",
           "--clip", "1", "--workers", "0", "--save-minutes", "0"]  # fmt: skip
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[half / "last" / "state.pt"]) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            main(["train", str(folder / "data"), str(half), *few])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rsna_seg ")]
    full = "cannot be written: File too large; put that right or choose another place."
    assert end.value.code == 2 and said == [f"rsna_seg train: {half / 'last' / 'state.pt'} {full}"]
    assert before == {path: path.read_bytes() for path in (half / "last").iterdir()}
    goes_on(folder, half)
