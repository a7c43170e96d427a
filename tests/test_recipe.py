"The recipe as it happens: what `train` and `finetune` do with their settings, observed from outside while they run."

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import rsna_seg.data
import rsna_seg.model
import rsna_seg.train
from rsna_seg.app.cli import main
from rsna_seg.app.commands import parse
from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, SliceDataset, prepare
from rsna_seg.files import ConfigError, TrainingError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import SegLoss, build_model, file_sha256, load_checkpoint
from rsna_seg.train import TrainConfig, train

UNET = smp.Unet
SMALL = {"size": 64, "workers": 0}
FIRST = TrainConfig(**SMALL, encoder_weights="none")  # the first training's defaults, as small as they can be


class Tiny(nn.Module):
    "Stands in for the U-Net where the network does not matter: encoder, decoder, BatchNorm, and a step takes milliseconds."

    asked = []  # the settings of each that was made

    def __init__(self, **settings):
        super().__init__()
        self.asked.append(settings)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Upsample(scale_factor=4), nn.Conv2d(8, 6, 1))

    def forward(self, images):
        return self.decoder(self.encoder(images))


def thin(**settings):
    "The U-Net with a narrow decoder."
    return UNET(**settings, decoder_channels=(16, 16, 8, 8, 8))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smp, "Unet", Tiny)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Ten patients, prepared with the defaults but for the size."
    folder = tmp_path_factory.mktemp("data")
    write_kaggle(folder / "kaggle", patients=10, size=64, slices=2)
    prepare(folder / "kaggle", folder / "png", config=PrepareConfig(size=64, jobs=1))
    return folder / "png"


@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    return repeated(data, tmp_path_factory.mktemp("many") / "png", 552)


def repeated(data, folder, slices):
    "A dataset with so many training slices: the same few PNG files, over and over."
    shutil.copytree(data, folder)
    manifest = pd.read_csv(folder / "manifest.csv", dtype=str)
    rows = manifest[manifest.split == "train"]
    rows = rows.iloc[np.arange(slices) % len(rows)]
    pd.concat([rows, manifest[manifest.split == "valid"]]).to_csv(folder / "manifest.csv", index=False)
    return folder


@dataclass
class Step:
    "One step of the optimiser."
    optimizer: torch.optim.Optimizer
    lr: float
    forwards: list  # the network's (input, logits) in training, since the step before
    slices: list  # (key, image, mask) that were loaded for training, since the step before
    gradients: list  # at the moment of the step
    weights: list  # after it

    @property
    def norm(self):
        return math.sqrt(sum(g.double().square().sum().item() for g in self.gradients))


@contextmanager
def watched():
    "Lists every step that an optimiser makes meanwhile."
    steps, forwards, slices = [], [], []

    def forward(module, given, logits):
        if isinstance(module, (Tiny, UNET)) and module.training:
            forwards.append((given[0].detach(), logits.detach()))

    def begin(optimizer, *_):
        gradients = [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append(Step(optimizer, optimizer.param_groups[0]["lr"], forwards[:], slices[:], gradients, []))
        forwards.clear(), slices.clear()

    def end(optimizer, *_):
        steps[-1].weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    def load(dataset, key, real=SliceDataset.__getitem__):
        image, mask = real(dataset, key)
        if dataset.transform is not None:
            slices.append((int(key), image, mask))
        return image, mask

    hooks = register_module_forward_hook(forward), register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SliceDataset, "__getitem__", load)
            yield steps
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def steps():
    with watched() as made:
        yield made


@pytest.fixture
def schedules(monkeypatch):
    "The schedules that are made, each with its T_max."
    made = []

    def begin(schedule, optimizer, T_max, *more, real=CosineAnnealingLR.__init__, **settings):
        made.append((schedule, T_max))
        real(schedule, optimizer, T_max, *more, **settings)

    monkeypatch.setattr(CosineAnnealingLR, "__init__", begin)
    return made


def cosine(lr, steps):
    "The learning rate of each step, in closed form."
    return [lr * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]


def last(run):
    return torch.load(run.folder / "last" / "state.pt", weights_only=True)


def floats(state):
    return {key: value.clone() for key, value in state.items() if value.is_floating_point()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# The defaults


def test_first_training_by_default(data, tmp_path, steps, schedules, monkeypatch):
    "30 epochs of AdamW at a rate that falls from 1e-3 along one cosine over all steps."
    searched = set()
    monkeypatch.setattr(Tiny, "forward", lambda tiny, images, real=Tiny.forward: (
        searched.add((tiny.training, torch.backends.cudnn.benchmark)), real(tiny, images))[1])  # fmt: skip
    Tiny.asked.clear()
    run = train(data, tmp_path, FIRST)
    assert searched == {(True, True), (False, False)} and not torch.backends.cudnn.benchmark
    assert len(run.history) == len(steps) == 30
    assert {type(step.optimizer) for step in steps} == {torch.optim.AdamW}
    [(schedule, t_max)] = schedules
    assert type(schedule) is CosineAnnealingLR and t_max == 30
    assert [step.lr for step in steps] == pytest.approx(cosine(1e-3, 30), rel=1e-9)
    assert steps[0].lr == 1e-3 and steps[0].optimizer.param_groups[0]["weight_decay"] == 0.01
    assert run.checkpoint.name == "best_model_512.pth" and run.checkpoint.exists()
    network = {"encoder_name": "tu-tf_mobilenetv3_large_100", "encoder_weights": None, "in_channels": 3, "classes": 6}
    assert Tiny.asked == [network]


def test_the_other_preset_has_another_name(data, tmp_path):
    run = train(data, tmp_path, replace(FIRST, epochs=1, preset="base"))
    assert run.checkpoint == tmp_path / "best_mobilenet.pth" and run.checkpoint.exists()


def test_sixteen_batches_of_32_to_a_step(many, tmp_path, steps, schedules):
    "552 slices are a step of 512 and a step of 40; each slice comes once an epoch, and counts the same within its step."
    run = train(many, tmp_path, replace(FIRST, epochs=2, mixed_precision="no"))
    assert [[len(images) for images, _ in step.forwards] for step in steps] == 2 * [[32] * 16, [32, 8]]
    orders = [[key % 552 for step in epoch for key, *_ in step.slices] for epoch in (steps[:2], steps[2:])]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(552)) and orders[0] != orders[1]
    assert schedules[0][1] == 4 and [step.lr for step in steps] == pytest.approx(cosine(1e-3, 4), rel=1e-9)

    total = 0
    for step in steps[:2]:
        masks, size, direct = torch.stack([mask for *_, mask in step.slices]).long(), len(step.slices), 0
        for (_, logits), truth in zip(step.forwards, masks.split(32)):
            logits.requires_grad_()
            exact = logits.double()  # smp's sums over a batch are imprecise in float32
            loss = smp.losses.DiceLoss("multiclass")(exact, truth) / 2 + smp.losses.FocalLoss("multiclass")(exact, truth) / 2
            loss.backward()
            direct += logits.grad.sum((0, 2, 3)) * len(truth) / size
            total += loss.item() * len(truth)
        torch.testing.assert_close(step.gradients[-1], direct, rtol=5e-3, atol=1e-6)  # of the last layer's bias
    assert run.history.train_loss[0] == pytest.approx(total / 552, rel=1e-5)


def test_fine_tuning_by_default(data, tmp_path, steps, schedules):
    "Ten epochs from 5e-5, and a step after each batch of 64."
    some = repeated(data, tmp_path / "png", 100)
    first = train(some, tmp_path / "first", replace(FIRST, epochs=1))
    steps.clear(), schedules.clear()
    run = finetune(first.checkpoint, some, tmp_path / "refined", FinetuneConfig(**SMALL))
    assert [[len(images) for images, _ in step.forwards] for step in steps] == 10 * [[64], [36]]
    assert schedules[0][1] == 20 and [step.lr for step in steps] == pytest.approx(cosine(5e-5, 20), rel=1e-9)
    assert {type(step.optimizer) for step in steps} == {torch.optim.AdamW} and len(run.history) == 10
    assert run.checkpoint.name == "best_mobilenet_rsna_refined.pth" and run.checkpoint.exists()
    before = [p for _, p in load_checkpoint(first.checkpoint)[0].named_parameters()]
    moves = [(a - b).abs().max().item() for a, b in zip(before, steps[0].weights)]
    assert 0 < max(moves) < 1.1 * 5e-5 * (1 + 0.01 * max(p.abs().max().item() for p in before))  # it starts at the checkpoint


def test_slices_are_512_wide_by_default(tmp_path, data, steps):
    "64-pixel PNG files reach the network at the default size, the same grey in three channels, from -1 to 1."
    few = repeated(data, tmp_path / "png", 2)
    train(few, tmp_path / "run", TrainConfig(epochs=1, encoder_weights="none", workers=0, mixed_precision="no"))
    [step] = steps
    [(given, _)] = step.forwards
    assert given.shape == (2, 3, 512, 512) and step.slices[0][1].shape == (512, 512)
    grey = torch.stack([image for _, image, _ in step.slices])
    assert grey.float().std() > 0
    for channel in range(3):
        torch.testing.assert_close(given[:, channel], grey / 127.5 - 1)


def test_one_patient_in_ten_validates(data):
    parts = open_data(data).manifest.groupby("split").patient.unique()
    assert {split: len(patients) for split, patients in parts.items()} == {"train": 9, "valid": 1}
    assert not set(parts["train"]) & set(parts["valid"])


def test_imagenet_weights_by_default(data, tmp_path, monkeypatch):
    "The encoder starts from the hub's file; where it cannot be had, one sentence tells so and nothing is written."
    config = replace(FIRST, epochs=1, freeze_epochs=1, encoder_weights=TrainConfig().encoder_weights)
    monkeypatch.setattr(smp, "Unet", thin)
    with pytest.raises(ConfigError, match="cannot be downloaded.*--encoder-weights none"):
        train(data, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    torch.manual_seed(5)
    pretrained = build_model(encoder_weights="none").encoder.model.state_dict()
    torch.save(pretrained, tmp_path / "imagenet.pth")
    monkeypatch.setattr(rsna_seg.model, "imagenet_file", lambda: tmp_path / "imagenet.pth")
    run = train(data, tmp_path / "run", config)
    network, _ = load_checkpoint(run.checkpoint)
    assert same(network.encoder.model.state_dict(), pretrained)  # it was frozen
    assert json.loads((run.folder / "config.json").read_text())["encoder_weights"] == "imagenet"


# The machine


@pytest.fixture
def loaders(monkeypatch):
    "The settings of each loader that is made; OpenCV's threads are let loose afterwards."
    made, real = [], rsna_seg.data.DataLoader

    def make(dataset, **settings):
        made.append({**settings, "threads": cv2.getNumThreads()})
        cv2.setNumThreads(3)
        return real(dataset, **settings)

    monkeypatch.setattr(rsna_seg.data, "DataLoader", make)
    yield made
    cv2.setNumThreads(0)


@pytest.mark.parametrize("cores, workers", [(64, 16), (2, 2)])
def test_sixteen_workers_or_one_for_each_core(data, tmp_path, cores, workers, loaders, monkeypatch, capsys):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(rsna_seg.data, "cpu_count", lambda: cores)
    monkeypatch.setattr(rsna_seg.train, "train_epoch", stop)
    with pytest.raises(Stop):
        train(data, tmp_path, TrainConfig(size=64, encoder_weights="none"))
    assert [loader["num_workers"] for loader in loaders] == [workers, workers]
    assert json.loads((tmp_path / "config.json").read_text())["used"]["workers"] == workers
    assert ("2 loader workers instead of 16" in capsys.readouterr().out) == (workers < 16)


def test_opencv_has_no_threads_of_its_own(data, tmp_path, loaders, monkeypatch):
    "Neither in the training process nor in a worker."
    (tmp_path / "seen").mkdir()

    def load(dataset, key, real=SliceDataset.__getitem__):
        (tmp_path / "seen" / f"{os.getpid()} {cv2.getNumThreads()}").touch()
        return real(dataset, key)

    monkeypatch.setattr(SliceDataset, "__getitem__", load)
    monkeypatch.setattr(rsna_seg.data, "cpu_count", lambda: 2)
    cv2.setNumThreads(3)
    train(data, tmp_path / "run", replace(FIRST, epochs=1, batch_size=8, workers=2))
    seen = [name.split() for name in os.listdir(tmp_path / "seen")]
    assert len(seen) >= 3 and str(os.getpid()) not in dict(seen)  # two for training, one with a batch to validate
    assert {int(threads) for _, threads in seen} <= {0, 1}
    assert {loader["threads"] for loader in loaders} <= {0, 1}


@pytest.mark.parametrize("cuda", [True, False])
def test_memory_is_pinned_for_a_gpu_only(data, loaders, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    rsna_seg.data.make_loader(SliceDataset(open_data(data), "train"), workers=0)
    assert loaders[0]["pin_memory"] is cuda


@pytest.mark.parametrize("wanted, has_bf16, dtype",
                         [("auto", True, "bfloat16"), ("auto", False, "float32"), ("bf16", False, "bfloat16"), ("no", True, "float32")])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="about the precision on a CPU")
def test_precision_of_the_network_and_of_the_loss(data, tmp_path, wanted, has_bf16, dtype, monkeypatch):
    "Convolutions run in half precision where that is asked for, in training and in validation; the loss never does."
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    seen = set()

    def forward(module, given, out):
        if isinstance(module, (nn.Conv2d, SegLoss)):
            seen.add((type(module).__name__, torch.is_grad_enabled(), str(out.dtype)))

    hook = register_module_forward_hook(forward)
    train(data, tmp_path, replace(FIRST, epochs=1, mixed_precision=wanted, ema=0.5))
    hook.remove()
    convolutions = {("Conv2d", learns, f"torch.{dtype}") for learns in (True, False)}
    assert seen == convolutions | {("SegLoss", learns, "torch.float32") for learns in (True, False)}
    assert json.loads((tmp_path / "config.json").read_text())["used"]["precision"] == {"bfloat16": "bf16", "float32": "no"}[dtype]


def test_fp16_needs_a_gpu(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        train(data, tmp_path, replace(FIRST, mixed_precision="fp16"))


@pytest.fixture
def scaled(monkeypatch):
    "fp16's GradScaler in a run on the CPU: a function that sets the next run's."
    settings, real = {}, rsna_seg.train.start_accelerator

    def start(_, **others):
        accelerator = real("no", **others)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
        return accelerator

    monkeypatch.setattr(rsna_seg.train, "start_accelerator", start)
    return settings.update


@pytest.mark.skipif(torch.cuda.is_available(), reason="simulates on a CPU what a GPU has")
def test_gradients_are_unscaled_before_they_are_clipped(data, tmp_path, scaled, steps):
    plain = replace(FIRST, epochs=2)
    train(data, tmp_path / "free", plain)
    free = [step.norm for step in steps]
    clip = min(free) / 3
    steps.clear()
    train(data, tmp_path / "clipped", replace(plain, clip=clip))
    assert [step.norm for step in steps] == pytest.approx([clip, clip], rel=1e-3)
    steps.clear()
    scaled(init_scale=1.0)
    train(data, tmp_path / "unscaled", plain)
    assert steps[0].norm == pytest.approx(free[0], rel=0.05)  # fp16 rounds; a scale left in would be a factor of 65,536


@pytest.mark.skipif(torch.cuda.is_available(), reason="simulates on a CPU what a GPU has")
def test_an_overflow_is_skipped_and_lowers_the_scale(data, tmp_path, scaled, steps):
    class Stop(Exception):
        pass

    def stop(history):
        states.append(torch.load(tmp_path / "last" / "state.pt", weights_only=True))
        if len(history) == 3:
            raise Stop

    scaled(init_scale=1e38, backoff_factor=1e-17)
    config, states = replace(FIRST, epochs=5), []
    with pytest.raises(Stop):
        train(data, tmp_path, config, watch=stop)
    start = build_seeded().state_dict()
    assert [same(floats(start), floats(state["model"])) for state in states] == [True, True, False]
    assert [state["steps"] for state in states] == [0, 0, 1]
    assert [step.lr for step in steps] == [1e-3]
    assert states[-1]["scaler"]["scale"] == pytest.approx(1e4)
    history = pd.read_csv(tmp_path / "history.csv")
    assert history.skipped_steps.tolist() == [1, 1, 0] and history.train_loss.isna().tolist() == [True, True, False]

    scaled(init_scale=7.0)  # the state's scale must replace it
    run = train(data, tmp_path, config)
    assert [step.lr for step in steps] == pytest.approx(cosine(1e-3, 5)[:3])
    assert last(run)["scaler"]["scale"] == pytest.approx(1e4) and run.history.skipped_steps.tolist() == [1, 1, 0, 0, 0]


def build_seeded():
    "The network that a training with the default seed starts from."
    torch.manual_seed(0)
    return build_model(encoder_weights="none")


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_smaller_than_asked_is_said(data, many, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(rsna_seg.data, "cpu_count", lambda: 16)
    train(many if whole else data, tmp_path, replace(FIRST, epochs=1))
    said, used = capsys.readouterr().out, json.loads((tmp_path / "config.json").read_text())["used"]
    slices = len(open_data(data).part("train"))
    short = [f"{slices} training slices are fewer than the virtual batch of 512: a step is over all of them.",
             f"Batches of {slices} slices instead of 32 make up a step."]  # fmt: skip
    assert used["notes"] == ([] if whole else short)
    said = [line for line in said.splitlines() if not line.startswith(("cpu, precision", "epoch 1/1: "))]
    assert said == used["notes"]
    sizes = (512, 32, 2) if whole else (slices, slices, 1)
    assert (used["virtual_batch"], used["batch_size"], used["steps_per_epoch"]) == sizes


# What is off by default


def test_clip(data, tmp_path, steps):
    plain = replace(FIRST, epochs=2, mixed_precision="no")
    train(data, tmp_path / "free", plain)
    clip = min(step.norm for step in steps) / 2
    train(data, tmp_path / "clipped", replace(plain, clip=clip))
    assert [step.norm for step in steps[2:]] == pytest.approx([clip, clip], rel=1e-4)


def test_ema(data, tmp_path, steps):
    "The checkpoint holds the moving average, as the formula gives it from the weights after each step."
    run = train(data, tmp_path, replace(FIRST, epochs=1, batch_size=4, accumulation=1, ema=0.3))
    state, kept = last(run), torch.load(run.checkpoint, weights_only=True)
    assert same(kept, state["average"])
    names = [name for name, _ in Tiny().named_parameters()]
    assert not any(torch.equal(kept[name], state["model"][name]) for name in names if "weight" in name)
    average = [p.detach().clone() for p in build_seeded().parameters()]
    for made, step in enumerate(steps):
        decay = min(0.3, (1 + made) / (10 + made))
        average = [decay * mean + (1 - decay) * new for mean, new in zip(average, step.weights)]
    assert len(steps) > 4  # so many that the decay is 0.3 in the end
    for name, mean in zip(names, average):
        torch.testing.assert_close(kept[name], mean)


def test_patience(data, tmp_path, steps, monkeypatch):
    "The run ends two epochs after its best one, keeps that one's weights, and started again has nothing to do."
    scores, weights = iter((0.1, 0.5, 0.4, 0.5, 0.9)), []

    def valid_epoch(loop, loader):
        weights.append(floats(loop.network.state_dict()))
        hit = next(scores)
        return 0.5, 1000 * (hit * np.eye(6) + (1 - hit) * np.roll(np.eye(6), 1, axis=1))

    monkeypatch.setattr(rsna_seg.train, "valid_epoch", valid_epoch)
    run = train(data, tmp_path, replace(FIRST, patience=2))
    assert run.history.valid_dice.tolist() == pytest.approx([0.1, 0.5, 0.4, 0.5]) and run.best.epoch == 2
    assert same(floats(torch.load(run.checkpoint, weights_only=True)), weights[1])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len(train(data, tmp_path, replace(FIRST, patience=2)).history) == len(steps) == 4
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("frozen", [0, 2])
def test_freeze_epochs(data, tmp_path, frozen, monkeypatch):
    "Weights and BatchNorm statistics of the encoder stay in the first epochs, and only in those."
    monkeypatch.setattr(smp, "Unet", thin)
    states = [build_seeded().state_dict()]
    watch = lambda _: states.append(torch.load(tmp_path / "last" / "state.pt", weights_only=True)["model"])
    train(data, tmp_path, replace(FIRST, epochs=3, freeze_epochs=frozen), watch=watch)
    parts = {"encoder": [], "decoder": []}
    for before, after in zip(states, states[1:]):
        for part, changes in parts.items():
            names = [name for name in before if name.startswith(part)]
            changes.append({name for name in names if not torch.equal(before[name], after[name])})
    for epoch in range(3):
        moved = {name.rpartition(".")[2] for name in parts["encoder"][epoch]}
        learnt = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        assert moved == (set() if epoch < frozen else learnt)
        assert parts["decoder"][epoch]


def test_tensorboard(data, tmp_path):
    "Its files hold the history's numbers."
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(data, tmp_path, replace(FIRST, epochs=3, trackers=("tensorboard",)))
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.parent == tmp_path}
    events = EventAccumulator(str(folder)).Reload()
    for name in set(run.history) - {"valid_dice_right_kidney"}:  # the validation slices show none
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [1, 2, 3]
        assert [event.value for event in logged] == pytest.approx(run.history[name].tolist(), rel=1e-5)


def test_a_tracker_that_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(rsna_seg.train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="^--trackers wandb needs the package wandb: pip install wandb$"):
        train(data, tmp_path / "run", replace(FIRST, trackers=("wandb",)))
    assert not (tmp_path / "run").exists()


def test_columns_of_the_history(data, tmp_path):
    run = train(data, tmp_path, replace(FIRST, epochs=1))
    columns = ["epoch", "lr", "train_loss", "valid_loss", "train_accuracy", "valid_accuracy", "train_dice", "valid_dice",
               "valid_dice_liver", "valid_dice_spleen", "valid_dice_left_kidney", "valid_dice_right_kidney", "valid_dice_bowel",
               "seconds", "slices_per_second", "skipped_steps", "peak_memory_gb", f"slices_of_{data.name}",
               *(f"pixels_of_{o.key}" for o in ORGANS)]  # fmt: skip
    assert list(pd.read_csv(run.folder / "history.csv")) == list(run.history) == columns


# What goes wrong


@pytest.mark.parametrize("spoilt", ["loss nan", "loss inf", "gradient"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, spoilt, ema, steps, monkeypatch):
    "Weights, BatchNorm's statistics, the average and the schedule stay; the step is counted as skipped."
    states, real_loss, real_epoch = [], SegLoss.forward, rsna_seg.train.train_epoch

    def loss(criterion, logits, *rest):
        value = real_loss(criterion, logits, *rest)
        if torch.is_grad_enabled() and len(states) == 2:  # in the second step
            if spoilt == "gradient":
                logits.register_hook(lambda gradient: gradient * math.inf)
            else:
                return value * float(spoilt.split()[1])
        return value

    def train_epoch(loop, loader, tally):
        look = lambda: (floats(loop.network.state_dict()), floats(loop.judged.state_dict()))
        states.append(look())
        for news in real_epoch(loop, loader, tally):
            states.append(look())
            yield news

    monkeypatch.setattr(SegLoss, "forward", loss)
    monkeypatch.setattr(rsna_seg.train, "train_epoch", train_epoch)
    run = train(data, tmp_path, replace(FIRST, epochs=1, batch_size=8, accumulation=1, mixed_precision="no", ema=ema))
    total = len(states) - 1
    changed = [[not same(a, b) for a, b in zip(before, after)] for before, after in zip(states, states[1:])]
    assert changed == [[True, True], [False, False], *[[True, True]] * (total - 2)]
    assert run.history.skipped_steps.tolist() == [1] and run.history.train_loss.notna().all()
    assert [step.lr for step in steps] == pytest.approx(cosine(1e-3, total)[: total - 1])


def test_a_training_that_diverges_stops(data, tmp_path, monkeypatch):
    "After so many skipped steps in a row; the best checkpoint stays, byte for byte, and so does its card."
    real, made, kept = SegLoss.forward, [], {}

    def loss(criterion, logits, masks, known):
        made.append(torch.is_grad_enabled())
        return real(criterion, logits, masks, known) * (math.nan if made[-1] and len(steps) >= 2 else 1)

    def watch(history):
        if len(history) == 2:
            kept.update({path: path.read_bytes() for path in tmp_path.glob("best_*")})

    monkeypatch.setattr(SegLoss, "forward", loss)
    with watched() as steps, pytest.raises(TrainingError, match="3 steps in a row.*best_model_512.pth of an earlier epoch is kept"):
        train(data, tmp_path, replace(FIRST, most_skipped=3), watch=watch)
    assert len(steps) == 2
    assert len(kept) == 2 and kept == {path: path.read_bytes() for path in tmp_path.glob("best_*")}


def command(words, capsys):
    "Exit code of a command, and what it says on stderr in one line, without a frame."
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return end.value.code, re.sub(r"[\s│╭╮╰╯─]+", " ", said).strip()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false."),
])  # fmt: skip
def test_a_batch_that_is_too_large(data, tmp_path, capsys, monkeypatch, error):
    "One sentence names the flags that fit and make the same steps."
    def refuse(*_):
        raise error

    monkeypatch.setattr(Tiny, "forward", refuse)
    few = ["--size", 64, "--encoder-weights", "none", "--workers", 0, "--batch-size", 6, "--accumulation", 2]
    code, said = command(["train", data, tmp_path, *few], capsys)
    assert code == 2 and said == "rsna_seg train: A batch of 6 slices is too large for the memory: --batch-size 4 --accumulation 3 makes the same steps."


def test_divergence_on_the_command_line(data, tmp_path, capsys):
    few = ["--size", 64, "--encoder-weights", "none", "--workers", 0]
    code, said = command(["train", data, tmp_path, *few, "--lr", 1e30, "--most-skipped", 4], capsys)
    assert code == 2
    checkpoint = tmp_path / "best_model_512.pth"
    assert said == ("rsna_seg train: Loss or gradient was not finite in 4 steps in a row, the last of them step 1 of its epoch: the training"
                    f" has diverged. Try a lower --lr or --clip 1. {checkpoint} of an earlier epoch is kept.")
    assert json.loads(checkpoint.with_suffix(".json").read_text())["sha256"] == file_sha256(checkpoint)


WRONG = [("size", 100), ("size", 32), ("batch_size", 0), ("accumulation", 0), ("epochs", 0), ("lr", 0.0), ("lr", -1e-3), ("lr", math.nan),
         ("lr", math.inf), ("weight_decay", -1.0), ("dice", -0.5), ("focal", math.nan), ("workers", -1), ("seed", -1), ("save_minutes", -1.0),
         ("most_skipped", 0), ("clip", 0.0), ("clip", -1.0), ("clip", math.nan), ("ema", 1.0), ("ema", 1.5), ("ema", -0.1), ("patience", 0),
         ("freeze_epochs", -1)]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG)
def test_settings_that_cannot_be(data, tmp_path, name, value, capsys):
    for config in (TrainConfig, FinetuneConfig):
        with pytest.raises(ConfigError, match=rf"\b{name}\b.*\.$"):
            config(**{name: value})
    code, said = command(["train", data, tmp_path / "run", f"--{name.replace('_', '-')}", value], capsys)
    assert code == 2 and re.search(rf"\b{name}\b", said)
    assert not (tmp_path / "run").exists()


def test_a_loss_of_nothing():
    with pytest.raises(ConfigError, match="dice or focal"):
        TrainConfig(dice=0, focal=0)


@pytest.mark.parametrize("name, value", [("horizontal_flip", 1.5), ("vertical_flip", -0.1), ("rotate", 2.0), ("grid_distortion", math.nan),
                                         ("coarse_dropout", 7.0), ("rotate_limit", -5.0)])  # fmt: skip
def test_augmentation_that_cannot_be(data, tmp_path, name, value, capsys):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        AugmentConfig(**{name: value})
    code, said = command(["train", data, tmp_path / "run", f"--{name.replace('_', '-')}", value], capsys)
    assert code == 2 and "from 0 to 1" in said
    assert not (tmp_path / "run").exists()


def test_the_recipe_ct_is_what_its_flag_spells_out():
    words = ["data", "run", "--recipe", "ct"]
    assert parse("train", words).config == TrainConfig.ct()
    assert parse("train", [*words, "--batch-size", "4", "--sides", "keep"]).config == TrainConfig.ct(
        batch_size=4, augment=replace(AugmentConfig.ct(), sides="keep")
    )
    assert parse("finetune", ["a.pth", *words]).config == FinetuneConfig.ct()
    assert parse("train", words[:2]).config == TrainConfig() != TrainConfig.ct()
