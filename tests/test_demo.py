"`rsna_seg demo` as a newcomer runs it, and the small network that pages and tests share."

import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest

from rsna_seg.app import demo
from rsna_seg.ct.cases import find_source
from rsna_seg.ct.nifti import read_mask
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.scoring.metrics import volume_dice


@pytest.mark.slow
def test_demo(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "rsna_seg.app.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    result = json.loads((out / "demo.json").read_text())
    assert done.stdout.count("random weights") == 1
    assert result["mean_dice"] >= 0.85, result
    assert (out / "report" / "report.html").exists()
    assert len(list((out / "predicted").glob("*/organs.nii.gz"))) == 4


def test_the_example_works(example):
    predictor = Predictor(example.checkpoint, PredictConfig(engine="torch"))
    dice = []
    for case in find_source(example.unseen).cases:
        result = predictor(case.scan)
        dice.append(volume_dice(result.mask, read_mask(case.masks[0], result.scan)))
    dice = pd.DataFrame(dice)
    assert dice.mean().mean() >= 0.80, dice


TRAIN_SLOWLY = """
import os, sys, time
from rsna_seg.app import demo

def make(folder):
    folder.mkdir()
    time.sleep(2)
    (folder / "made").write_text(str(os.getpid()))

demo._make_example = make
print((demo.example(sys.argv[1]).folder / "made").read_text())
"""


@pytest.mark.slow
def test_two_processes_train_the_example_once(tmp_path):
    command = [sys.executable, "-c", TRAIN_SLOWLY, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=300)[0] for process in both)
    assert first and first == second


def test_a_new_example_removes_those_of_a_week_ago(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_make_example", lambda folder: folder.mkdir())
    for name, days in {"example-old": 8, "example-recent": 6, "photographs": 8}.items():
        (tmp_path / name).mkdir()
        then = time.time() - days * 86400
        os.utime(tmp_path / name, (then, then))
    made = demo.example(tmp_path).folder
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"example-recent", "photographs", made.name}
