"Checkpoints of plain segmentation-models-pytorch scripts load; what does not fit is refused in one sentence."

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from command import rsna_seg
from safetensors.torch import save_file
from torch import nn

from rsna_seg.ct.organs import ALL_ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle, write_mask
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.engines.export import save_pretrained
from rsna_seg.evaluate import evaluate
from rsna_seg.files import ConfigError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import CARD, ENCODER, Card, SegLoss, build_model, file_sha256, load_checkpoint, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.training.loop import Tally, make_loop, read_state, save_state, start_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")

# What `fingerprint` gave for smp.Unet("timm-mobilenetv3_large_100", encoder_weights=None, in_channels=3, classes=6) in
# segmentation-models-pytorch 0.3.4 with timm 0.9.7, 0.4.0 with 1.0.12, 0.5.0 with 1.0.15 and 0.6.0 with 1.0.31.
NAMES = "871b64b62fcad56a5b07496eed5b7ab56eced442c73eaeaace74525d170abf8a"
LOGITS = [23.89, 6.05, 11.9, -10.81, 13.92, -2.93, -195.98, -38.93, -126.3, -91.76, -161.92, 278.16]


def with_known_weights(net):
    "The network in eval mode with weights, BatchNorm statistics among them, that no release of a library changes."
    rng = np.random.RandomState(0)
    for key, value in sorted(net.state_dict().items()):
        if value.ndim > 1:
            drawn = rng.uniform(-1, 1, value.shape) * np.sqrt(6 / value[0].numel())
        else:
            low, high = (0.5, 1.5) if key.endswith(("weight", "running_var")) else (-0.1, 0.1)
            drawn = rng.uniform(low, high, value.shape)
        value.copy_(torch.from_numpy(np.asarray(drawn)))
    return net.eval()


def fingerprint(net):
    "SHA-256 of all names and shapes, and the logits of a fixed picture in its corner and at its middle."
    names = json.dumps([[key, list(value.shape)] for key, value in sorted(net.state_dict().items())])
    picture = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (1, 3, 64, 64))).float()
    with torch.no_grad():
        logits = with_known_weights(net)(picture)[0]
    return hashlib.sha256(names.encode()).hexdigest(), [round(v, 2) for p in (0, 32) for v in logits[:, p, p].tolist()]


@pytest.fixture(scope="module")
def net():
    return with_known_weights(build_model(encoder_weights="none"))


@pytest.fixture(scope="module")
def state(net):
    return net.state_dict()


def test_old_releases_have_the_same_network():
    names, logits = fingerprint(build_model("timm-mobilenetv3_large_100", "none"))
    assert names == NAMES
    np.testing.assert_allclose(logits, LOGITS, atol=0.5)
    trap_names, trap_logits = fingerprint(smp.Unet("tu-mobilenetv3_large_100", encoder_weights=None, in_channels=3, classes=6))
    assert trap_names == NAMES and np.abs(np.subtract(trap_logits, LOGITS)).max() > 5


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


SAVED = {
    "bare": lambda net: net.state_dict(),
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "compiled, then DataParallel": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "model_state_dict": lambda net: {"epoch": 3, "model_state_dict": nn.DataParallel(net).state_dict(),
                                     "optimizer_state_dict": torch.optim.AdamW(net.parameters()).state_dict()},
    "state_dict": lambda net: {"state_dict": net.state_dict(), "arch": "unet"},
    "model": lambda net: {"model": net.state_dict(), "scaler": None},
    "net": lambda net: {"net": net.state_dict(), "model": "timm-mobilenetv3_large_100"},
    "Lightning": lambda net: {"epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": under("model.", net.state_dict()),
                              "callbacks": {}, "hyper_parameters": {"lr": 1e-3}},
    "Lightning, net": lambda net: {"state_dict": under("net.", net.state_dict()), "loops": {}},
    "NumPy scores": lambda net: {"model": net.state_dict(), "best_dice": np.float64(0.9), "epoch": np.int64(3),
                                 "loss": np.float32(0.1), "stopped": np.bool_(True)},
}  # fmt: skip


def assert_loads(path, state):
    loaded, card = load_checkpoint(path)
    assert list(loaded.state_dict()) == list(state) and not loaded.training
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert replace(card, sha256="", notes=[]) == Card(versions={}, window="assumed") and card.sha256 == file_sha256(path)
    [note] = card.notes
    assert note.startswith(f"{path.name} does not say") and '"size": 512' in note and f"{path.stem}.json" in note


@pytest.mark.parametrize("name", SAVED)
def test_saved_by_a_script(name, net, state, tmp_path):
    torch.save(SAVED[name](net), tmp_path / "theirs.pth")
    assert_loads(tmp_path / "theirs.pth", state)


def test_saved_before_torch_1_6(net, state, tmp_path):
    torch.save(SAVED["NumPy scores"](net), tmp_path / "theirs.pth", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "theirs.pth", state)


def test_saved_before_numpy_2(net, state, tmp_path):
    "NumPy's scalars were made by a function in numpy.core then, which is numpy._core today."
    torch.save(SAVED["NumPy scores"](net), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for entry in new.namelist():
            old.writestr(entry, new.read(entry).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    with zipfile.ZipFile(tmp_path / "old.pth") as old:
        assert any(b"cnumpy.core.multiarray\nscalar\n" in old.read(entry) for entry in old.namelist())
    assert_loads(tmp_path / "old.pth", state)


def test_a_card_beside_the_file_still_counts(net, state, tmp_path):
    save_checkpoint(net, tmp_path / "mine.pth", Card(size=256, level=40, width=350, labelled=["liver"]))
    torch.save(SAVED["model_state_dict"](net), tmp_path / "mine.pth")
    loaded, card = load_checkpoint(tmp_path / "mine.pth")
    assert torch.equal(loaded.state_dict()["segmentation_head.0.weight"], state["segmentation_head.0.weight"])
    assert (card.size, card.level, card.width, card.labelled) == (256, 40, 350, ["liver"])
    assert card.notes == ["mine.json is not of mine.pth: they differ in sha256; check what it says."]


def unet(**changes):
    return smp.Unet(**{"encoder_name": ENCODER, "encoder_weights": None, "in_channels": 3, "classes": 6, **changes})


INSTEAD = "torch.save(model.state_dict()"
REFUSED = {  # what was saved, and what the sentence says about it
    "extra": (lambda net: {**net.state_dict(), "aux.weight": torch.zeros(1)}, "it has no aux.weight; if that takes part"),
    "missing": (lambda net: {k: v for k, v in net.state_dict().items() if k != "decoder.blocks.1.conv2.1.bias"},
                "decoder.blocks.1.conv2.1.bias is missing (the file begins with encoder.model.conv_stem.weight)"),
    "seven classes": (lambda net: {"state_dict": under("module.", unet(classes=7).state_dict())},
                      "segmentation_head.0.weight is (7, 16, 3, 3), not (6, 16, 3, 3)"),
    "one channel": (lambda net: unet(in_channels=1).state_dict(), "encoder.model.conv_stem.weight is (16, 1, 3, 3), not (16, 3"),
    "other encoder": (lambda net: unet(encoder_name="resnet18").state_dict(), "encoder.model.conv_stem.weight is missing"),
    "other decoder": (lambda net: unet(decoder_attention_type="scse").state_dict(), "it has no decoder.blocks.0.attention1"),
    "own normalisation": (lambda net: {"state_dict": {"mean": torch.zeros(3), **under("model.", net.state_dict())}},
                          "it has no mean; if that takes part"),
    "two networks": (lambda net: {**under("model.", net.state_dict()), **under("teacher.", net.state_dict())},
                     "it has no teacher.encoder.model.conv_stem.weight"),
    "NaN": (lambda net: {k: v * float("nan") if v.is_floating_point() else v for k, v in net.state_dict().items()},
            "its weights have diverged"),
    "one infinity": (lambda net: {**net.state_dict(), "segmentation_head.0.bias": torch.tensor([0, 0, float("inf"), 0, 0, 0])},
                     "holds NaN or infinity: its weights have diverged"),
    "empty dict": (lambda net: {}, "encoder.model.conv_stem.weight is missing (the file begins with nothing)"),
    "whole model": (lambda net: net, INSTEAD),
    "whole model in a dict": (lambda net: {"epoch": 3, "model": nn.DataParallel(net)}, INSTEAD),
    "NumPy array": (lambda net: {"model": net.state_dict(), "curve": np.zeros(3)}, INSTEAD),
    "NumPy object": (lambda net: {"model": net.state_dict(), "name": np.str_("unet")}, INSTEAD),
    "unknown place": (lambda net: {"weights": net.state_dict()}, INSTEAD),
    "list": (lambda net: list(net.state_dict().values()), INSTEAD),
    "numbered": (lambda net: {0: torch.zeros(1)}, INSTEAD),
}  # fmt: skip


def assert_refused(path, says):
    with pytest.raises(ConfigError) as error:
        load_checkpoint(path)
    said = str(error.value)
    assert said.startswith(str(path)) and says in said
    assert "\n" not in said and ". " not in said and said.endswith("."), said


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, net, tmp_path):
    saved, says = REFUSED[name]
    torch.save(saved(net), tmp_path / "theirs.pth")
    assert_refused(tmp_path / "theirs.pth", says)


def test_damaged_files(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1_000_000])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    flipped = bytearray((tmp_path / "whole.pth").read_bytes())
    flipped[10_000_000] ^= 1  # a weight that is a little off
    (tmp_path / "flipped.pth").write_bytes(flipped)
    for name, says in (("flipped", "is not what was written"), ("cut", "cut short"), ("empty", "cut short"), ("page", "begins with '<!DOCTYPE html>'")):
        assert_refused(tmp_path / f"{name}.pth", says)


TEXTS = {
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 26000000\n", "begins with 'version https://git-lfs.github.com/spec/v1'; if"),
    "xml": ("\n<?xml version='1.0'?><Error>AccessDenied</Error>", "is text and no weights: it begins with \"<?xml version='1.0'?>"),
    "json": ('{"message": "not found"}', "is text and no weights: it begins with '{"),
    "accents": ("Übergang zu Café\r\n" * 99, "is text and no weights: it begins with 'Übergang zu Café"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_place_of_weights(name, suffix, tmp_path):
    text, says = TEXTS[name]
    (tmp_path / "theirs").with_suffix(suffix).write_text(text)
    assert_refused((tmp_path / "theirs").with_suffix(suffix), says)
    with pytest.raises(ConfigError, match=says[:9]):
        build_model(encoder_weights=(tmp_path / "theirs").with_suffix(suffix))


def test_a_network_to_run_is_no_file_of_weights(net, tmp_path):
    torch.jit.trace(net, torch.zeros(1, 3, 64, 64)).save(str(tmp_path / "net.ts.pt"))
    assert_refused(tmp_path / "net.ts.pt", INSTEAD)


def test_a_runs_state_is_refused_by_the_name_of_its_checkpoint(net, tmp_path, monkeypatch):
    loop = make_loop(start_accelerator("no"), build_model(encoder_weights="none"), SegLoss(), list(ALL_ORGANS), 1e-3, 1)
    save_state(tmp_path / "run", {**read_state(loop, Tally()), "history": []})
    state, best = tmp_path / "run" / "last" / "state.pt", tmp_path / "run" / "best_mobilenet.pth"
    best.touch()
    assert_refused(state, f"is what a run resumes from; give its best checkpoint, {best}.")
    assert_refused(tmp_path / "run", f"is a folder; give a checkpoint, {best}.")
    monkeypatch.chdir(state.parent)
    assert_refused(Path("state.pt"), f"give its best checkpoint, {best}.")
    (tmp_path / "elsewhere.pth").write_bytes(state.read_bytes())
    assert_refused(tmp_path / "elsewhere.pth", "give its best checkpoint, such as best_model_512.pth.")
    assert_refused(tmp_path, "is a folder; give a checkpoint, such as best_model_512.pth.")


MINE = Card(size=128, level=40.0, width=350.0, channels="neighbours", labelled=["liver"], config={"augment": {"flip": (0, 1)}}, metrics={"dice": 0.5})
COPIES = {  # ways in which people hand on the file without the JSON
    "copied": lambda old, new: shutil.copy(old, new),
    "saved again": lambda old, new: torch.save(torch.load(old, weights_only=True), new),
    "saved for torch 1.5": lambda old, new: torch.save(torch.load(old), new, _use_new_zipfile_serialization=False),
    "in a script's dict": lambda old, new: torch.save({"epoch": 3, "model_state_dict": torch.load(old)}, new),
}


@pytest.mark.parametrize("name", COPIES)
def test_the_card_goes_where_the_file_goes(name, net, state, tmp_path):
    save_checkpoint(net, tmp_path / "mine.pth", MINE)
    (tmp_path / "away").mkdir()
    COPIES[name](tmp_path / "mine.pth", tmp_path / "away" / "other name.pth")
    loaded, card = load_checkpoint(tmp_path / "away" / "other name.pth")
    assert card == replace(MINE, config={"augment": {"flip": [0, 1]}}, sha256=file_sha256(tmp_path / "away" / "other name.pth"))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_the_file_with_its_card_is_a_plain_state_dict(net, state, tmp_path):
    "What everybody does with one; the card does not get into their network, nor into what they save of it."
    save_checkpoint(net, tmp_path / "mine.pth", MINE)
    plain = torch.load(tmp_path / "mine.pth", weights_only=True)
    assert list(plain) == list(state) and all(torch.equal(value, state[key]) for key, value in plain.items())
    theirs = unet(encoder_name="timm-mobilenetv3_large_100")
    theirs.load_state_dict(plain)
    nn.DataParallel(theirs).module.load_state_dict(plain, strict=True)
    theirs.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in plain.items() if k.startswith("encoder.")})
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert_loads(tmp_path / "theirs.pth", state)


def test_the_same_weights_give_the_same_bytes(net, tmp_path):
    for name in ("one", "other"):
        save_checkpoint(net, tmp_path / f"{name}.pth", MINE)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()


def test_the_look_alike_is_refused_without_the_json_too(net, tmp_path):
    save_checkpoint(net, tmp_path / "mine.pth", replace(MINE, encoder="tu-mobilenetv3_large_100"))
    (tmp_path / "mine.json").unlink()
    with pytest.raises(ConfigError, match="other padding"):
        load_checkpoint(tmp_path / "mine.pth")


def test_the_card_inside_counts(net, tmp_path):
    "The JSON beside it is for people: what it says otherwise is noted, and so is that of another file."
    save_checkpoint(net, tmp_path / "mine.pth", MINE)
    assert load_checkpoint(tmp_path / "mine.pth")[1].notes == []
    changed = {**json.loads((tmp_path / "mine.json").read_text()), "size": 512, "level": 50}
    (tmp_path / "mine.json").write_text(json.dumps(changed))
    card = load_checkpoint(tmp_path / "mine.pth")[1]
    assert (card.size, card.level) == (128, 40)
    assert card.notes == ["mine.json is not of mine.pth: they differ in size, level; the card inside counts."]
    (tmp_path / "mine.json").write_text("[1]")
    with pytest.raises(ConfigError, match="mine.json holds no card of a checkpoint .* move it away"):
        load_checkpoint(tmp_path / "mine.pth")[1]


@pytest.mark.parametrize("wrong", [{"size": "256"}, {"size": 100}, {"size": 0}, {"size": 256.0}, {"level": "40"}, {"level": None}, {"width": 0}, {"width": -1}, {"window": "narrow"}, {"sizes": 256},
                                   {"labelled": []}, {"labelled": ["heart"]}, {"labelled": "liver"}, {"channels": "rgb"}, [256], None, 3])  # fmt: skip
def test_a_json_that_is_no_card_is_refused(wrong, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    (tmp_path / "theirs.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match="theirs.json holds no card of a checkpoint"):
        load_checkpoint(tmp_path / "theirs.pth")[1]


def test_a_card_of_a_later_version_is_refused(net, tmp_path):
    save_checkpoint(net, tmp_path / "mine.pth", MINE)
    plain = torch.load(tmp_path / "mine.pth")
    plain._metadata[CARD]["flavour"] = "later"
    torch.save(plain, tmp_path / "later.pth")
    with pytest.raises(ConfigError, match="later.pth holds no card of a checkpoint .*flavour.* update rsna_seg"):
        load_checkpoint(tmp_path / "later.pth")


def test_what_the_json_leaves_open_is_assumed(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    told = {"size": 256, "channels": "neighbours", "labelled": ["liver"]}
    (tmp_path / "theirs.json").write_text(json.dumps(told))
    card = load_checkpoint(tmp_path / "theirs.pth")[1]
    assert (card.size, card.channels, card.labelled, card.versions, card.window) == (256, "neighbours", ["liver"], {}, "assumed")
    assert len(card.notes) == 1 and '{"level": 50.0, "width": 400.0} is assumed' in card.notes[0]
    (tmp_path / "theirs.json").write_text(json.dumps({**told, "level": 50, "width": 400}))
    card = load_checkpoint(tmp_path / "theirs.pth")[1]
    assert (card.notes, card.window) == ([], "known")


def test_safetensors_hold_the_card_too(net, tmp_path):
    save_checkpoint(net, tmp_path / "mine.pth", MINE)
    save_pretrained(tmp_path / "mine.pth", tmp_path / "hub")
    shutil.copy(tmp_path / "hub" / "model.safetensors", tmp_path / "alone.safetensors")
    card = load_checkpoint(tmp_path / "alone.safetensors")[1]
    assert (card.size, card.channels, card.labelled, card.notes) == (128, "neighbours", ["liver"], [])
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "bare.safetensors")
    assert "does not say" in load_checkpoint(tmp_path / "bare.safetensors")[1].notes[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A small competition folder, the dataset folder made of it, and a scan."
    folder = tmp_path_factory.mktemp("world")
    write_kaggle(folder / "kaggle", 2, size=64, slices=4)
    prepare(folder / "kaggle", folder / "data", config=PrepareConfig(size=64, valid=0.5, jobs=1))
    hu, _, affine = render(draw_patient(0), size=64, slices=6)
    write_mask(folder / "scans" / "ct.nii", hu, affine)
    return folder


@pytest.fixture(scope="module")
def no_checkpoints(net, tmp_path_factory):
    "Files given as checkpoints which are none, as the maker beside the project makes them."
    maker, folder = Path(__file__).resolve().parents[2] / "shared" / "cases" / "checkpoints.py", tmp_path_factory.mktemp("cases")
    if not maker.is_file():
        pytest.skip(f"{maker} is not there")
    torch.save(net.state_dict(), folder / "net.pth")
    subprocess.run([sys.executable, maker, folder, folder / "net.pth"], check=True)
    return folder


def commands(checkpoint, world, out):
    "All commands that take a checkpoint."
    data = world / "data"
    return [["predict", checkpoint, world / "scans" / "ct.nii", out], ["predict", checkpoint, world / "scans", out], ["evaluate", checkpoint, data, out],
            ["evaluate", checkpoint, world / "kaggle", out], ["finetune", checkpoint, data, out], ["finetune", checkpoint, data, out, "--dry-run"],
            ["export", checkpoint, out], ["export", checkpoint, out, "--formats", "huggingface"]]  # fmt: skip


@pytest.mark.parametrize("name, says", [("nan.pth", "its weights have diverged"), ("lfs.pth", "git lfs pull"), ("html.pth", "begins with '<!DOCTYPE html>"),
                                        ("lightning.ckpt", "it has no std, mean;")])  # fmt: skip
def test_each_command_says_what_it_is(name, says, no_checkpoints, world, tmp_path):
    for words in commands(no_checkpoints / name, world, tmp_path / "out"):
        done = rsna_seg(*words)
        [sentence] = done.stderr.splitlines()
        assert done.returncode == 2 and says in sentence and name in sentence, done.stderr
        assert not (tmp_path / "out").exists(), words


def test_a_copy_alone_predicts_the_same(net, world, tmp_path):
    save_checkpoint(net, tmp_path / "mine.pth", Card(size=64))
    shutil.copy(tmp_path / "mine.pth", tmp_path / "copy of mine.pth")
    masks = [Predictor(tmp_path / name, PredictConfig("torch"))(world / "scans" / "ct.nii").mask for name in ("mine.pth", "copy of mine.pth")]
    assert masks[0].any() and np.array_equal(*masks)


def test_what_is_assumed_is_said(net, world, tmp_path):
    "On the command line, in the files and on the page."
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    (tmp_path / "theirs.json").write_text('{"size": 64}')
    note = "theirs.pth does not say what it was made for: {\"level\": 50.0,"
    scan, out = world / "scans" / "ct.nii", tmp_path / "out"
    done = rsna_seg("predict", tmp_path / "theirs.pth", scan, out, "--also", tmp_path / "theirs.pth", "--engine", "torch", "--outputs", "volumes", "report")
    assert done.returncode == 0 and note in done.stdout
    assert note in json.loads((out / "volumes.json").read_text())["notes"][-1]
    assert "theirs.pth does not say what it was made for" in (out / "report.html").read_text()
    done = rsna_seg("predict", tmp_path / "theirs.pth", world / "scans", tmp_path / "many", "--engine", "torch", "--outputs", "volumes")
    assert done.returncode == 0 and note in done.stdout
    done = rsna_seg("export", tmp_path / "theirs.pth", tmp_path / "hub", "--formats", "huggingface")
    assert done.returncode == 0 and note in done.stdout
    assert note in load_checkpoint(tmp_path / "hub" / "huggingface" / "model.safetensors")[1].notes[0]
    assert f"\n- {note}" in (tmp_path / "hub" / "huggingface" / "README.md").read_text()


def test_finetuning_asks_for_the_channels_of_a_bare_file(net, world, tmp_path):
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    config = FinetuneConfig(size=64, channels="neighbours", workers=0)
    with pytest.raises(ConfigError, match="theirs.pth takes --channels copies, not neighbours; fine-tune it with --channels copies"):
        finetune(tmp_path / "theirs.pth", world / "data", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_finetuning_and_evaluation_go_on_from_it(net, world, tmp_path, capsys):
    torch.save(SAVED["model_state_dict"](net), tmp_path / "theirs.pth")
    before = evaluate(tmp_path / "theirs.pth", world / "data", workers=0, device="cpu")
    assert any(note.startswith("theirs.pth does not say what it was made for") for note in before.about["notes"])
    config = FinetuneConfig(size=64, batch_size=8, accumulation=1, epochs=1, mixed_precision="no", workers=0)
    run = finetune(tmp_path / "theirs.pth", world / "data", tmp_path / "run", config)
    assert before.matrix.sum() > 0 and len(run.history) == 1 and run.checkpoint.is_file()
    assert "theirs.pth does not say what it was made for" in capsys.readouterr().out
    assert load_checkpoint(run.checkpoint)[1].notes == []
    prepare(world / "kaggle", tmp_path / "lung", config=PrepareConfig(size=64, valid=0.5, level=-600, width=1500, jobs=1))
    notes = evaluate(tmp_path / "theirs.pth", tmp_path / "lung", workers=0, device="cpu").about["notes"]
    assert any("lung has the window -600/1500 (known), " in note and "50/400 (assumed)" in note for note in notes)
    (tmp_path / "theirs.json").write_text('{"level": 50, "width": 400}')
    notes = evaluate(tmp_path / "theirs.pth", tmp_path / "lung", workers=0, device="cpu").about["notes"]
    assert notes[0] == "lung: its window, level -600, width 1500 (known), is brought to level 50, width 400; it shows nothing beyond -1350 to 150 HU."
