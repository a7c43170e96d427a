"Each notebook runs from top to bottom, in a process of its own, as `nbdev_test` runs it."

import json
import multiprocessing
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from nbdev.test import nbdev_test
from server import SERVER

TOP = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p.relative_to(TOP) for p in (TOP / "nbs").rglob("*.ipynb")
    if p.name == "recipe.ipynb" or p.parent.name not in ("tutorials", ".ipynb_checkpoints") and p.name != "index.ipynb"
)  # fmt: skip


def _run(notebook, top, log, folder):
    "In the process: the notebook, with all that it and its own processes print in the file."
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(top)
    warnings.simplefilter("ignore")
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that no server forked
    try:
        nbdev_test(path=str(notebook))
    finally:
        get_reusable_executor().shutdown(kill_workers=True)  # else this process waits for idle ones


def run(notebook, top, log):
    "Exit code, and what was printed: on failure notebook, cell (from 1) and line."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = SERVER.Process(target=_run, args=(notebook, top, log, folder))
        process.start()
        process.join(600)
        process.kill()
        process.join()
    return process.exitcode, log.read_text()


@pytest.mark.parametrize("name", NOTEBOOKS, ids=str)
def test_notebook(name, tmp_path):
    code, printed = run(name, TOP, tmp_path / "log")
    assert code == 0, printed


def test_a_failure_names_notebook_cell_and_line(tmp_path):
    shutil.copy(TOP / "settings.ini", tmp_path)
    (tmp_path / "nbs" / "room").mkdir(parents=True)
    sources = ["organs = 5", "more = organs + 1\nassert more == 5"]
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    cells = [{**cell, "id": str(i), "source": source} for i, source in enumerate(sources)]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs" / "room" / "broken.ipynb").write_text(json.dumps(notebook))
    code, printed = run("nbs/room/broken.ipynb", tmp_path, tmp_path / "log")
    assert code == 1
    for part in ("AssertionError", "nbs/room/broken.ipynb", "Cell #2", "line 2", "more == 5"):
        assert part in printed
