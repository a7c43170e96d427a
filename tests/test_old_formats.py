"What version 0.1.0 wrote still works: dataset folder, checkpoint, run."

import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rsna_seg.ct.organs import ALL_ORGANS
from rsna_seg.ct.store import open_data
from rsna_seg.data import SliceDataset
from rsna_seg.files import ConfigError
from rsna_seg.model import as_input, load_checkpoint
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.train import TrainConfig, open_run, train

pytestmark = pytest.mark.usefixtures("one_thread")

FINGERPRINT = "bf0e5a87fd9a98a427477d7585b89965bce97aee160b1e992623ae62b2264686"
OLD_RUN = TrainConfig(
    size=64, batch_size=4, accumulation=2, epochs=3, encoder_weights="none", workers=0, lr=3e-3, mixed_precision="no", ema=0.9, clip=1.0)  # fmt: skip


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    "A folder with `data`, `run` (stopped after two of three epochs), `scan`, and what 0.1.0 made of them."
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "old" / "old.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Debian 12's 3.11.2 has none
    return folder


@pytest.fixture
def old_run(old, tmp_path):
    "A copy of the run."
    return shutil.copytree(old / "run", tmp_path / "run")


def set_in_config(run, **settings):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **settings}))


def test_checkpoint_gives_the_same_logits(old):
    network, card = load_checkpoint(old / "run" / "best_model_512.pth")
    stored = np.load(old / "logits.npz")
    with torch.inference_mode():
        logits = network(as_input(torch.from_numpy(stored["image"])[None]))[0]
    np.testing.assert_allclose(logits.numpy(), stored["logits"].astype(np.float32), atol=2e-2)
    assert (card.size, card.channels, card.config["balance"], card.versions["rsna_seg"]) == (64, "copies", False, "0.1.0")


def test_run_goes_on_to_its_end(old, old_run):
    "The third epoch's losses are those of 0.1.0, the moving average's validation among them."
    assert len(open_run(old_run).history) == 2
    run = train(old / "data", old_run, OLD_RUN)
    third = json.loads((old / "expected.json").read_text())["third_epoch"]
    assert len(run.history) == 3 and set(third) < set(run.history)  # newer columns are empty in its first epochs
    for name in ("lr", "train_loss", "valid_loss"):
        assert run.history[name].iloc[-1] == pytest.approx(third[name], rel=5e-3)  # 1e-3 comes from another number of threads


def test_a_setting_that_is_gone_must_have_had_its_default(old, old_run):
    set_in_config(old_run, balance=True)
    with pytest.raises(ConfigError, match="holds a run with balance = True, not False"):
        train(old / "data", old_run, OLD_RUN)


def test_another_setting_is_still_refused(old, old_run):
    with pytest.raises(ConfigError, match=r"holds a run with lr = 0\.003, not 0\.1"):
        train(old / "data", old_run, replace(OLD_RUN, lr=0.1))


def test_a_dataset_folder_opens(old):
    data = open_data(old / "data")
    assert data.damaged(jobs=1) == []
    table = (old / "data" / "manifest.csv").read_bytes()
    assert data.info["fingerprint"] == hashlib.sha256(table).hexdigest() == FINGERPRINT
    assert tuple(data.info["labelled"]) == ALL_ORGANS and data.skipped.empty
    assert len(data.part("train")) + len(data.part("valid")) == len(data.manifest)
    counts = {key: data.manifest[key].sum() for key in ALL_ORGANS}
    assert all(count > 0 for count in counts.values()), counts
    image, mask = SliceDataset(data, "train")[0]
    assert image.shape == mask.shape == (data.info["size"], data.info["size"])


def test_checkpoint_predicts_the_same_voxels(old):
    "Of whole frames: around the body 0.1.0 kept a margin that changed some voxels."
    result = Predictor(old / "run" / "best_model_512.pth", PredictConfig("torch", crop=False))(old / "scan")
    expected = json.loads((old / "expected.json").read_text())["voxels"]
    assert result.organs.voxels.to_dict() == pytest.approx(expected, abs=5)
    assert result.card.versions["rsna_seg"] == "0.1.0"
