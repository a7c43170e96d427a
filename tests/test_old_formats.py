"What version 0.1.0 has written still works: dataset folder, checkpoint, run."

import json
import tarfile
from pathlib import Path

import pytest

from rsna_seg.predict import PredictConfig, Predictor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    "A folder with `data`, `run` (stopped after two of three epochs), `scan`, and what 0.1.0 made of them."
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "old" / "old.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_checkpoint_predicts_the_same_voxels(old):
    result = Predictor(old / "run" / "best_model_512.pth", PredictConfig("torch"))(old / "scan")
    expected = json.loads((old / "expected.json").read_text())["voxels"]
    assert result.organs.voxels.to_dict() == pytest.approx(expected, abs=5)
    assert result.card.versions["rsna_seg"] == "0.1.0"
