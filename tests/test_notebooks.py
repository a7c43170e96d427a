"Each notebook runs from top to bottom, in a process of its own, as `nbdev_test` runs it."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p.relative_to(TOP) for p in (TOP / "nbs").rglob("*.ipynb")
    if p.parent.name not in ("tutorials", ".ipynb_checkpoints") and p.name != "index.ipynb"
)  # fmt: skip


def nbdev_test(notebook, top):
    "The finished process. On failure its stderr names notebook and cell (from 1), and the line."
    code = f"from nbdev.test import nbdev_test; nbdev_test(path={str(notebook)!r})"
    command = [sys.executable, "-c", code]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=top, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", NOTEBOOKS, ids=str)
def test_notebook(name):
    done = nbdev_test(name, TOP)
    assert done.returncode == 0, done.stderr


def test_a_failure_names_notebook_cell_and_line(tmp_path):
    shutil.copy(TOP / "settings.ini", tmp_path)
    (tmp_path / "nbs" / "room").mkdir(parents=True)
    sources = ["organs = 5", "more = organs + 1\nassert more == 5"]
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    cells = [{**cell, "id": str(i), "source": source} for i, source in enumerate(sources)]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs" / "room" / "broken.ipynb").write_text(json.dumps(notebook))
    done = nbdev_test("nbs/room/broken.ipynb", tmp_path)
    assert done.returncode == 1
    for part in ("AssertionError", "nbs/room/broken.ipynb", "Cell #2", "line 2", "more == 5"):
        assert part in done.stderr
