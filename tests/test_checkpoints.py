"Checkpoints of plain segmentation-models-pytorch scripts load; what does not fit is refused in one sentence."

import hashlib
import json
import zipfile

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.files import ConfigError, DataError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import ENCODER, Card, build_model, load_checkpoint, save_checkpoint

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
    assert card == Card(versions={})


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


def unet(**changes):
    return smp.Unet(**{"encoder_name": ENCODER, "encoder_weights": None, "in_channels": 3, "classes": 6, **changes})


INSTEAD = "torch.save(model.state_dict()"
REFUSED = {  # what was saved, and what the sentence says about it
    "extra": (lambda net: {**net.state_dict(), "aux.weight": torch.zeros(1)}, "it has no aux.weight"),
    "missing": (lambda net: {k: v for k, v in net.state_dict().items() if k != "decoder.blocks.1.conv2.1.bias"},
                "decoder.blocks.1.conv2.1.bias is missing (the file begins with encoder.model.conv_stem.weight)"),
    "seven classes": (lambda net: {"state_dict": under("module.", unet(classes=7).state_dict())},
                      "segmentation_head.0.weight is (7, 16, 3, 3), not (6, 16, 3, 3)"),
    "one channel": (lambda net: unet(in_channels=1).state_dict(), "encoder.model.conv_stem.weight is (16, 1, 3, 3), not (16, 3"),
    "other encoder": (lambda net: unet(encoder_name="resnet18").state_dict(), "encoder.model.conv_stem.weight is missing"),
    "other decoder": (lambda net: unet(decoder_attention_type="scse").state_dict(), "it has no decoder.blocks.0.attention1"),
    "own normalisation": (lambda net: {"state_dict": {"mean": torch.zeros(3), **under("model.", net.state_dict())}},
                          "encoder.model.conv_stem.weight is missing (the file begins with mean)"),
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
    for name, says in (("cut", "cut short"), ("empty", "cut short"), ("page", "not a plain file of weights")):
        assert_refused(tmp_path / f"{name}.pth", says)


def test_finetuning_and_evaluation_go_on_from_it(net, tmp_path):
    torch.save(SAVED["model_state_dict"](net), tmp_path / "theirs.pth")
    write_kaggle(tmp_path / "kaggle", 2, size=64, slices=4)
    prepare(tmp_path / "kaggle", tmp_path / "data", config=PrepareConfig(size=64, valid=0.5, jobs=1))
    before = evaluate(tmp_path / "theirs.pth", tmp_path / "data", workers=0, device="cpu")
    config = FinetuneConfig(size=64, batch_size=8, accumulation=1, epochs=1, mixed_precision="no", workers=0)
    run = finetune(tmp_path / "theirs.pth", tmp_path / "data", tmp_path / "run", config)
    assert before.matrix.sum() > 0 and len(run.history) == 1 and run.checkpoint.is_file()
    prepare(tmp_path / "kaggle", tmp_path / "lung", config=PrepareConfig(size=64, valid=0.5, level=-600, width=1500, jobs=1))
    with pytest.raises(DataError, match="window"):
        evaluate(tmp_path / "theirs.pth", tmp_path / "lung", workers=0, device="cpu")
