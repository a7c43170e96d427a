"""Run notebooks in place, each in a kernel of its own: python .ci/execute.py nbs/03_train.ipynb ...

Progress bars leave no trace in what is saved; what was printed around them is joined.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"


def without_bars(outputs):
    "The outputs of a cell, but for widgets."
    kept = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue
        if kept and output.get("name") and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore", OPENCV_LOG_LEVEL="ERROR")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # pages show what a processor gives
for path in map(Path, sys.argv[1:]):
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1200, record_timing=False, resources=folder).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = without_bars(cell.outputs)
    nbformat.write(notebook, path)
