"What version 0.1.0 wrote stays readable."

import hashlib
import tarfile
from pathlib import Path

import pytest

from rsna_seg.ct.organs import ALL_ORGANS
from rsna_seg.ct.store import open_data
from rsna_seg.data import SliceDataset

FINGERPRINT = "bf0e5a87fd9a98a427477d7585b89965bce97aee160b1e992623ae62b2264686"
OLD = Path(__file__).with_name("old") / "old.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    "A folder with a dataset folder, a run and a checkpoint of version 0.1.0."
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD) as archive:
        archive.extractall(folder, filter="data")
    return folder


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
