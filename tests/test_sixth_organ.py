"""One change, one room: an organ that is added to the table of organs alone goes the whole path.

In a copy of the package the table gets a pancreas. Its synthetic patients get one too, drawn into
their masks. Then the copy prepares, trains for a step, evaluates and predicts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

import rsna_seg

PANCREAS = """
    Organ(
        6, "pancreas", "Pancreas", "#228833", "P", ("15776009",), solid=True, level="upper",
        normal_ml=(20, 200), normal_source="a rough bound",
    ),
"""

PATH = """
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from rsna_seg import load_checkpoint
from rsna_seg.app.cli import main
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.model import save_checkpoint


def run(*words):
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert not end.code, (words, end.code)


write_kaggle("kaggle", patients=3, size=64, slices=8)
for path in Path("kaggle/segmentations").glob("*.nii"):
    image = nib.load(path)
    mask = np.asarray(image.dataobj).astype(np.uint8)
    mask[28:36, 20:26, 2:6] = 6
    nib.save(nib.Nifti1Image(mask, image.affine), path)

few = ["--size", 64, "--batch-size", 4, "--epochs", 1, "--workers", 0, "--encoder-weights", "none"]
run("prepare", "kaggle", "data", "--size", 64)
run("inspect", "data", "--jobs", 1)
run("train", "data", "run", *few)
run("evaluate", "run", "data", "report", "--workers", 0)

# A step teaches nothing: this network is told that everything is the pancreas.
model, card = load_checkpoint("run/best_model_512.pth")
model.segmentation_head[0].bias.data[6] += 100
save_checkpoint(model, "eager.pth", card)
scan = next(Path("kaggle/train_images").glob("*/*"))
outputs = ["--outputs", "nifti", "seg", "volumes", "report", "preview"]
run("predict", "eager.pth", scan, "organs", "--engine", "torch", *outputs)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "What the copy of the package has made."
    folder = tmp_path_factory.mktemp("sixth")
    package = shutil.copytree(Path(rsna_seg.__file__).parent, folder / "copy" / "rsna_seg")
    table = (package / "ct" / "organs.py").read_text()
    before, start, after = table.partition("CLASSES = (")
    organs, end, rest = after.partition("\n)  # fmt: skip")
    assert start and end
    (package / "ct" / "organs.py").write_text(before + start + organs + PANCREAS + end + rest)
    (folder / "path.py").write_text(PATH)
    env = {**os.environ, "PYTHONPATH": str(folder / "copy"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "path.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_it_is_prepared(world):
    manifest = pd.read_csv(world / "data" / "manifest.csv")
    assert manifest.pancreas.gt(0).any()
    assert "pancreas" in json.loads((world / "data" / "dataset.json").read_text())["labelled"]
    assert "Pancreas" in (world / "data" / "quality.html").read_text()


@pytest.mark.slow
def test_it_is_trained(world):
    state = torch.load(world / "run" / "best_model_512.pth")
    assert len(state["segmentation_head.0.weight"]) == 7
    card = json.loads((world / "run" / "best_model_512.json").read_text())
    assert "pancreas" in card["labelled"]


@pytest.mark.slow
def test_it_is_judged(world):
    assert "pancreas" in (world / "report" / "metrics.json").read_text()
    assert "pancreas" in set(pd.read_csv(world / "report" / "per_volume.csv").organ)
    assert "Pancreas" in (world / "report" / "report.html").read_text()


@pytest.mark.slow
def test_it_is_written(world):
    mask = np.asarray(nib.load(world / "organs" / "organs.nii.gz").dataobj)
    assert 6 in mask
    volumes = pd.read_csv(world / "organs" / "volumes.csv").set_index("organ")
    assert volumes.ml["pancreas"] > 0
    assert "Pancreas" in (world / "organs" / "report.html").read_text()
    files = [pydicom.dcmread(path) for path in (world / "organs").glob("*.dcm")]
    segments = [s.SegmentLabel for f in files for s in f.get("SegmentSequence", [])]
    assert "Pancreas" in segments
