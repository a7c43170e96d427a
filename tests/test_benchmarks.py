"The benchmarks know the package's names, and compare times of equal work only."

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rsna_seg.model import load_checkpoint, save_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_what_a_benchmark_imports_is_there(script):
    "They run seldom, so that a name that has moved shows late."
    nodes = [n for n in ast.walk(ast.parse((FOLDER / script).read_text())) if isinstance(n, ast.ImportFrom) and n.module.startswith("rsna_seg")]
    missing = [f"{n.module}.{a.name}" for n in nodes for a in n.names if not hasattr(importlib.import_module(n.module), a.name)]
    assert missing == []


@pytest.fixture
def script(monkeypatch):
    "benchmarks/predict.py as a module."
    for name in ("openvino", "onnxruntime", "onnx"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("predict")


def test_unlike_masks_end_the_run(script, tmp_path):
    "Where more than one voxel of a thousand differs, or none is of an organ."
    for name, found in (("ours", 100), ("near", 109), ("far", 111), ("empty", 0)):
        mask = np.zeros((10, 10, 100), np.uint8)
        mask.flat[:found] = 1
        nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / f"{name}.nii.gz")
    assert script.same_voxels(tmp_path / "ours.nii.gz", tmp_path / "near.nii.gz") == pytest.approx(0.9991)
    with pytest.raises(SystemExit, match="Unequal work: only 99.890% of the voxels"):
        script.same_voxels(tmp_path / "ours.nii.gz", tmp_path / "far.nii.gz")
    with pytest.raises(SystemExit, match="hold no organ, which shows nothing"):
        script.same_voxels(tmp_path / "empty.nii.gz", tmp_path / "empty.nii.gz")


@pytest.mark.parametrize("card", [{"channels": "neighbours"}, {"labelled": ["liver"]}])
def test_a_network_that_no_peer_runs_is_refused(card, script, example, tmp_path, monkeypatch, capsys):
    model, usual = load_checkpoint(example.checkpoint)
    save_checkpoint(model, tmp_path / "net.pth", replace(usual, **card))
    monkeypatch.setattr(sys, "argv", ["predict.py", "--quick", "--checkpoint", str(tmp_path / "net.pth")])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2 and "as none of the peers does" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_another_size_are_equal_work(script, example, tmp_path):
    "The example's 96 pixels are those of every way, and the masks agree."
    words = ["--quick", "--checkpoint", str(example.checkpoint), "--json", str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, str(FOLDER / "predict.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    shares = [row["median"] for name, row in found["results"].items() if "same voxels" in name]
    assert len(shares) == len(found["ratios"]) == 3 and min(shares) >= 99.9
