"""Runs tutorials with stand-ins for what only Colab and Kaggle have.

`python tests/tutorials.py NOTEBOOK ...` makes the outputs that the site shows, with the notebook's own parameters but for the
places of package and script, which a machine without a network lacks. It makes the folders /content and /kaggle for that time.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import torch
from execnb.shell import CaptureShell
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from server import SERVER

TOP = Path(__file__).resolve().parents[1]
TUTORIALS = TOP / "nbs" / "tutorials"
STAND_INS = TOP / "tests" / "stand_ins"
WIDGET = "application/vnd.jupyter.widget-view+json"
ENVIRONMENT = {
    "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "OPENCV_LOG_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": "", "LOKY_MAX_CPU_COUNT": "1",
    "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore",
}  # fmt: skip


def make_wheel(folder):
    "The package as a wheel, built as it stands, without a network."
    unwanted = shutil.ignore_patterns(".git", "nbs", "tests", "benchmarks", "build", "*.egg-info")
    source = shutil.copytree(TOP, folder / "source", ignore=unwanted)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def parameterized(name, stop=None, **parameters):
    "The notebook with these parameters, up to the first cell that holds `stop`."
    notebook = parameterize_notebook(load_notebook_node(str(TUTORIALS / name)), parameters)
    if stop:
        last = next(i for i, cell in enumerate(notebook.cells) if stop in cell.source)
        notebook.cells = notebook.cells[: last + 1]
    return notebook


def environment(folder, given):
    "What the notebook's process and those that it starts find in their environment; pip installs into the folder."
    packages = str(folder / "packages")
    Path(packages).mkdir(parents=True, exist_ok=True)  # Python does not look again for a folder that was not there
    path = os.pathsep.join([packages, str(STAND_INS)])
    return {**ENVIRONMENT, "PIP_TARGET": packages, "PYTHONPATH": path, **given}


def joined(outputs):
    "The outputs, with what was printed in a row as one."
    kept = []
    for output in outputs:
        if kept and output.get("name") and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def run_in_kernel(notebook, folder, **given):
    "Runs the notebook as Jupyter does, in a kernel of its own that finds nothing imported."
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=1800, record_timing=False, kernel_name="python3", resources=place)
    client.execute(env={**os.environ, **environment(folder, given)})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(output for output in cell.outputs if WIDGET not in output.get("data", {}))


def _work(notebook, folder, given, log):
    "In the process: the cells one by one, until one fails."
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= environment(folder, given)
    sys.path[:0] = [str(STAND_INS)]
    os.chdir(folder)
    torch.set_num_threads(1)
    shell = CaptureShell()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in shell.run(cell.source):
                print("".join(output.get("text") or output.get("data", {}).get("text/plain", "")), flush=True)
            if shell.exc:
                shown = getattr(shell.exc, "_render_traceback_", lambda: [f"Traceback: {shell.exc!r}"])()
                print("\n>>", *shown, sep="\n", flush=True)
                os._exit(1)
    os._exit(0)


def run(notebook, folder, **given):
    "Runs the cells in a forked process, which saves the imports; whether all went well, and what was printed."
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        log = Path(place, "log")
        process = SERVER.Process(target=_work, args=(notebook, folder, given, log))
        process.start()
        process.join(1500)
        process.kill()
        process.join()
        return process.exitcode == 0, log.read_text()


def save_outputs(name):
    "Runs the notebook as the page shows it and keeps the outputs in it."
    with tempfile.TemporaryDirectory(prefix="tutorial-") as place:
        folder, page = Path(place), nbformat.read(TUTORIALS / name, as_version=4)
        (folder / "drive").mkdir()
        here = {"package": str(make_wheel(folder / "wheel")), "gpu_script": f"file://{TOP}/benchmarks/gpu.py"}
        lacking = {key: value for key, value in here.items() if any(f"\n{key} = " in cell.source for cell in page.cells)}
        notebook = parameterized(name, **lacking)
        run_in_kernel(notebook, folder, STAND_IN_DRIVE=str(folder / "drive"))
        notebook = nbformat.reads(nbformat.writes(notebook).replace(str(folder), "/home/you"), as_version=4)
        outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
        for cell in page.cells:
            if cell.cell_type == "code":
                cell.outputs = outputs[cell.id]
        nbformat.write(page, TUTORIALS / name)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        save_outputs(Path(name).name)
