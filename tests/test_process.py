"What only processes show: a run that is killed and started again, and what an import brings along."

import signal
import subprocess
import sys
import time

import pytest
import torch

from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.ct.store import open_data
from rsna_seg.ct.phantom import write_kaggle

TRAIN = """
import sys
from rsna_seg.train import TrainConfig, train
train(sys.argv[1], sys.argv[2], TrainConfig(size=64, batch_size=8, accumulation=2, epochs=3, encoder_weights="none", workers=0))
"""

PREPARE = """
import sys
from rsna_seg.data import PrepareConfig, prepare
prepare(sys.argv[1], sys.argv[2], config=PrepareConfig(size=64, jobs=1))
"""


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "kaggle"
    write_kaggle(folder, patients=6, size=64, slices=10)
    return folder


def start(code, *words):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.DEVNULL)


def kill_when(process, happened):
    "Kills the process as soon as something has happened; it must still be running then."
    while not happened():
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_prepare_continues(kaggle, tmp_path):
    whole = prepare(kaggle, tmp_path / "whole", config=PrepareConfig(size=64, jobs=1))
    parts = tmp_path / "killed.unfinished" / "parts"
    kill_when(start(PREPARE, kaggle, tmp_path / "killed"), lambda: len(list(parts.glob("[!.]*.csv"))) >= 2)
    assert not (tmp_path / "killed").exists()
    assert start(PREPARE, kaggle, tmp_path / "killed").wait() == 0
    assert open_data(tmp_path / "killed").info["fingerprint"] == whole.info["fingerprint"]
    for image in whole.manifest.image:
        assert (tmp_path / "killed" / image).read_bytes() == (whole.folder / image).read_bytes()


@pytest.mark.slow
def test_killed_training_continues_bit_for_bit(kaggle, tmp_path):
    prepare(kaggle, tmp_path / "data", config=PrepareConfig(size=64, jobs=1))
    assert start(TRAIN, tmp_path / "data", tmp_path / "whole").wait() == 0
    last = {run: tmp_path / run / "last" / "state.pt" for run in ("whole", "killed")}
    kill_when(start(TRAIN, tmp_path / "data", tmp_path / "killed"), last["killed"].exists)
    assert len(torch.load(last["killed"], weights_only=True)["history"]) < 3
    assert start(TRAIN, tmp_path / "data", tmp_path / "killed").wait() == 0
    whole, killed = (torch.load(last[run], weights_only=True) for run in ("whole", "killed"))
    assert len(whole["history"]) == len(killed["history"]) == 3
    assert all(torch.equal(whole["model"][key], killed["model"][key]) for key in whole["model"])
    for one, other in zip(whole["optimizer"]["state"].values(), killed["optimizer"]["state"].values()):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    assert (tmp_path / "whole" / "best_model_512.pth").read_bytes() == (tmp_path / "killed" / "best_model_512.pth").read_bytes()


def test_the_package_needs_no_development_tools():
    "Importing every module must not import nbdev or fastcore."
    code = """
import importlib, pkgutil, sys, rsna_seg
for module in pkgutil.iter_modules(rsna_seg.__path__):
    if not module.name.startswith("_"): importlib.import_module("rsna_seg." + module.name)
print(sorted({"nbdev", "fastcore", "execnb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
