"""Every tutorial runs from top to bottom, with small sizes and with stand-ins for Drive, secrets and Kaggle; again after it was
cut off; and a mistake ends in a sentence."""

import json
import os
import shutil
import socket
import subprocess
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell
from papermill.iorw import load_notebook_node
from tutorials import TUTORIALS, make_wheel, parameterized, run, run_in_kernel

from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.train import TrainConfig, train

SMALL = {"size": 64, "batch_size": 4, "accumulation": 1, "workers": 0, "encoder_weights": "none"}
PHANTOM = {"patients": 2, "size": 64, "slices": 6}
COLAB = {
    "first_settings": {**SMALL, "epochs": 2, "lr": 1e-3}, "fine_settings": {key: SMALL[key] for key in SMALL if "weights" not in key} | {"epochs": 1},
    "gpu_script": (TUTORIALS.parents[1] / "benchmarks" / "gpu.py").as_uri(), "phantom": PHANTOM,
    "gpu_needed": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return str(make_wheel(tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    "Kaggle's datasets: one of PNG slices, as their owner has them, without a manifest."
    folder = tmp_path_factory.mktemp("kaggle")
    write_kaggle(folder / "scans", **PHANTOM)
    data = prepare(folder / "scans", folder / "data", config=PrepareConfig(size=64, jobs=1)).folder
    for kind in ("images", "masks"):
        shutil.copytree(data / kind, folder / "me" / "slices" / kind)
    return folder


def test_a_mistake_is_a_sentence_in_a_notebook(capsys):
    shell = InteractiveShell()
    shell.run_cell("from rsna_seg.files import ConfigError\nraise ConfigError('size 7 is not a multiple of 32.')")
    printed = capsys.readouterr()
    assert printed.out.strip() == "ConfigError: size 7 is not a multiple of 32." and not printed.err


def test_a_full_drive_is_said_at_once(tmp_path):
    "With half a GB left; with room, the folder of the results is made."
    [cell] = [cell.source for cell in load_notebook_node(str(TUTORIALS / "colab_a100.ipynb")).cells if "disk_usage" in cell.source]
    for free, said in ((5e8, pytest.raises(Exception, match="^Your Drive has 0.5 GB left and the runs need . GB: ")), (5e9, nullcontext())):
        drive = {"drive": Mock(), "check_folder": Mock(), "shutil": Mock(**{"disk_usage.return_value.free": free})}
        chosen = {"content": tmp_path, "results": "runs", "kaggle_dataset": "", "drive_zip": "none.zip"}
        with said:
            exec(cell, {"Path": Path, "Stop": RuntimeError, **drive, **chosen})
    assert (tmp_path / "drive" / "MyDrive" / "runs").is_dir()


def test_kaggle_is_told_all_that_a_push_needs():
    told = json.loads((TUTORIALS / "kernel-metadata.json").read_text())
    assert (TUTORIALS / told["code_file"]).is_file() and told["kernel_type"] == "notebook" and told["language"] == "python"
    assert told["enable_internet"] and told["enable_gpu"] and told["machine_shape"] == "NvidiaTeslaT4"  # the default is a P100
    owner, name = told["id"].split("/")
    assert name == told["title"].lower().replace(" ", "-") and len(name) >= 5
    assert f'slug = "{told["competition_sources"][0]}"' in json.loads(f'"{_source("kaggle_base.ipynb")}"')


def _source(name):
    "All source of a notebook, escaped as JSON has it."
    return "".join(json.dumps("".join(cell["source"]))[1:-1] for cell in json.loads((TUTORIALS / name).read_text())["cells"])


def weights(file):
    return torch.load(file, weights_only=True)


def same_weights(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items() if isinstance(value, torch.Tensor))


def colab(folder, kaggle, wheel, **parameters):
    "Parameters and environment of the Colab notebook on a machine of its own, with one Drive for all of them."
    drive = kaggle / "drive"
    drive.mkdir(exist_ok=True)
    given = {"STAND_IN_DRIVE": str(drive), "STAND_IN_KAGGLE": str(kaggle), "STAND_IN_SECRET_KAGGLE_API_TOKEN": "right"}
    return drive, {**COLAB, "package": wheel, "content": str(folder / "content"), **parameters}, given


FULL = """
import errno
from rsna_seg.training import loop

write, written = loop.write_tensors, []

def until_full(content, path):
    if written:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(content, path)
    written.append(path)

loop.write_tensors = until_full
"""
DISCONNECT = "import shutil\nshutil.rmtree(content)"


def with_disconnects(notebook):
    "The session ends after each cell that may write to Drive, with all on its machine; then all runs from the top."
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and "pip = [" not in cell.source]
    ends = [i for i, cell in enumerate(notebook.cells, 1) if "home" in cell.source]
    assert len(ends) >= 6
    disconnect = new_code_cell(DISCONNECT)
    notebook.cells = [cell for end in ends for cell in (*notebook.cells[:end], disconnect)]
    return notebook


@pytest.mark.slow
def test_colab_goes_on_after_a_full_drive_and_after_any_disconnect(kaggle, wheel, tmp_path):
    """Drive is full in the second epoch; the next session ends after each cell that writes to Drive; the notebook then runs whole.

    What lies on Drive is what the package makes of the same slices in one go.
    """
    (tmp_path / "nothing.py").write_text("print('no GPU')")
    script = {"gpu_script": (tmp_path / "nothing.py").as_uri()}
    drive, parameters, given = colab(tmp_path / "one", kaggle, wheel, kaggle_dataset="me/slices", **script)
    notebook = parameterized("colab_a100.ipynb", "first = train(", **parameters)
    notebook.cells.insert(len(notebook.cells) - 1, new_code_cell(FULL))
    fine, printed = run(notebook, tmp_path / "one", **given)
    state = tmp_path / "one" / "content" / "drive" / "MyDrive" / "rsna_seg" / "first" / "last" / "state.pt"
    full = f"OutputError: {state} cannot be written: No space left on device; put that right or choose another place."
    assert not fine and "no GPU" in printed and printed.endswith(f">>\n{full}\n"), printed
    assert sorted(path.name for path in (drive / "rsna_seg" / "first" / "last").iterdir()) == ["state.pt"]
    shutil.rmtree(tmp_path / "one")

    fine, printed = run(with_disconnects(parameterized("colab_a100.ipynb", **parameters)), tmp_path / "one", **given)
    assert fine and printed.count("epoch 2/2") == 1 and "epoch 1/2" not in printed, printed

    (tmp_path / "two").mkdir()
    _, parameters, given = colab(tmp_path / "two", kaggle, wheel, kaggle_dataset="me/slices")
    notebook = parameterized("colab_a100.ipynb", **parameters)
    run_in_kernel(notebook, tmp_path / "two", **given)
    assert (tmp_path / "two" / "packages" / "rsna_seg" / "report" / "page.py").exists()
    assert notebook.cells[-1].outputs[0].text == "All is on your Drive.\n"
    made = {str(path.relative_to(drive / "rsna_seg")) for path in (drive / "rsna_seg").rglob("*")}
    assert made >= {"quality/quality.html", "report/report.html", "predicted/organs.nii.gz", "predicted/preview.png"}

    data = prepare(kaggle / "me" / "slices", tmp_path / "data", config=PrepareConfig(size=64, jobs=1)).folder
    first = train(data, tmp_path / "first", TrainConfig(**COLAB["first_settings"]))
    refined = finetune(first.checkpoint, data, tmp_path / "refined", FinetuneConfig(**COLAB["fine_settings"]))
    for ours in (first.checkpoint, refined.checkpoint):
        assert same_weights(ours, drive / "rsna_seg" / ours.relative_to(tmp_path))


DOORS = """
import os
from pytest import raises

del os.environ["STAND_IN_SECRET_KAGGLE_API_TOKEN"]
with raises(Stop, match="secrets have no KAGGLE_API_TOKEN"):
    take_token()
os.environ["STAND_IN_SECRET_KAGGLE_API_TOKEN"] = "wrong"
take_token()
with raises(Stop, match="Kaggle does not give me/slices: 403 Client Error for me/slices.; check its name and your token."):
    from_kaggle("me/slices")
"""


@pytest.mark.slow
def test_the_other_doors_and_mistakes_on_colab(kaggle, wheel, tmp_path):
    (tmp_path / "nothing.py").write_text("")
    script = {"gpu_script": (tmp_path / "nothing.py").as_uri()}
    drive, parameters, given = colab(tmp_path, kaggle, wheel, drive_zip="some/slices.zip", results="doors", **script)
    with_doors = lambda: parameterized("colab_a100.ipynb", "weak = {", **parameters)
    notebook = with_doors()
    notebook.cells.append(new_code_cell(DOORS))
    fine, printed = run(notebook, tmp_path, **given)
    assert fine and "My Drive has no some/slices.zip: a rehearsal with phantoms." in printed, printed
    assert len(list((tmp_path / "content" / "phantom" / "train_images").iterdir())) == 2

    (drive / "some").mkdir()
    shutil.make_archive(str(drive / "some" / "slices"), "zip", kaggle / "me" / "slices")
    notebook = with_doors()
    notebook.cells = [cell for cell in notebook.cells if "pip = [" not in cell.source]
    notebook.cells.append(parameterized("colab_a100.ipynb").cells[-1])
    fine, printed = run(notebook, tmp_path, STAND_IN_DRIVE_FULL="yes", **given)
    assert "rehearsal" not in printed and (tmp_path / "content" / "unzipped" / "masks").is_dir(), printed
    assert not fine and ">>\nDrive has not taken everything (flush_and_unmount failed): leave this session open, " in printed, printed
    parameters["gpu_needed"] = True
    notebook = with_doors()
    notebook.cells = [cell for cell in notebook.cells if "pip = [" not in cell.source]
    fine, printed = run(notebook, tmp_path, **given)
    assert not fine and ">>\nThis session has no GPU, without which your data would train for days: " in printed, printed
    del given["STAND_IN_DRIVE"]
    fine, printed = run(notebook, tmp_path, **given)
    assert not fine and ">>\nDrive is not connected (Error: credential propagation was unsuccessful): run this cell again " in printed


@pytest.mark.slow
def test_kaggle_goes_on_in_a_second_session(kaggle, wheel, tmp_path):
    "The first session has time for one step. Its output, as a further input of the second, is all that this one needs to go on."
    parameters = {
        "package": wheel, "processes": 1, "settings": {**SMALL, "epochs": 1}, "inputs": str(tmp_path / "input"),
    }  # fmt: skip
    place = lambda name: {"working": str(tmp_path / name / "working"), "temporary": str(tmp_path / name / "temp")}
    (tmp_path / "input" / "competitions").mkdir(parents=True)
    (tmp_path / "one" / "working").mkdir(parents=True)
    (tmp_path / "two" / "working").mkdir(parents=True)
    (tmp_path / "input" / "competitions" / "rsna-2023-abdominal-trauma-detection").symlink_to(kaggle / "scans")
    notebook = parameterized("kaggle_base.ipynb", session_hours=0, **parameters, **place("one"))
    fine, printed = run(notebook, tmp_path / "one")
    assert fine and "time is up in epoch 1" in printed and "No epoch is finished yet" in printed, printed
    assert sorted(os.listdir(tmp_path / "one" / "working")) == ["base", "data.zip"]

    shutil.move(tmp_path / "one" / "working", tmp_path / "input" / "notebooks" / "me" / "rsna-seg-base")
    fine, printed = run(parameterized("kaggle_base.ipynb", **parameters, **place("two")), tmp_path / "two")
    assert fine and "1 of 1 epochs" in printed and not (tmp_path / "two" / "temp" / "phantom").exists(), printed
    assert sorted(os.listdir(tmp_path / "two" / "working")) == ["base", "data.zip", "report"]
    log = (tmp_path / "two" / "working" / "base" / "train.log").read_text()
    assert 0 < log.index("time is up in epoch 1") < log.index("epoch 1/1: ")


@pytest.mark.slow
def test_mistakes_on_kaggle(wheel, tmp_path):
    parameters = {"working": str(tmp_path), "temporary": str(tmp_path / "temp"), "inputs": str(tmp_path)}
    fine, printed = run(parameterized("kaggle_base.ipynb", "pip = [", package="no-such-package", **parameters), tmp_path)
    assert not fine and ">>\nThe package cannot be installed (is the notebook's Internet on?): " in printed
    notebook = parameterized("kaggle_base.ipynb", "cards = [", package=wheel, **parameters)
    notebook.cells.insert(len(notebook.cells) - 1, new_code_cell(P100))
    fine, printed = run(notebook, tmp_path)
    assert not fine and printed.endswith(">>\nThis session has a P100, which Kaggle's PyTorch cannot use: choose GPU T4 x2.\n")


P100 = "torch.cuda.device_count, torch.cuda.get_device_name = lambda: 1, lambda i: 'Tesla P100-PCIE-16GB'"


@pytest.mark.slow
def test_a_cluster(tmp_path):
    "Two processes as two machines; and what the Slurm job would start on each node."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parameters = {"phantom": PHANTOM, "settings": {**SMALL, "epochs": 1}, "shared": str(tmp_path / "shared"), "port": port, "processes": False}
    fine, printed = run(parameterized("cluster.ipynb", **parameters), tmp_path)
    assert fine and "workers" in printed and "epoch 1/1" in printed, printed
    assert json.loads((tmp_path / "shared" / "run" / "config.json").read_text())["used"]["processes"] == 2

    stubs = {
        "scontrol": 'echo first; echo second', "accelerate": 'echo "$@"',
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    }  # fmt: skip
    for name, does in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.run(["bash", tmp_path / "shared" / "train.slurm"], env=env, capture_output=True, text=True, check=True)
    for rank, line in enumerate(job.stdout.splitlines()):
        assert line.startswith(f"launch --multi_gpu --num_processes 16 --num_machines 2 --machine_rank {rank} --main_process_ip first ")
        assert line.endswith("--max-hours 11.5")
    assert rank == 1


@pytest.mark.slow
def test_own_ct(tmp_path):
    parameters = {"patients": 2, "slices": 6, "scan_size": 64, "settings": {**SMALL, "epochs": 1}}
    fine, printed = run(parameterized("your_own_ct.ipynb", **parameters), tmp_path)
    assert fine, printed
    assert (tmp_path / "own_ct" / "report" / "report.html").exists()
    for kind in ("DICOM with DICOM SEG", "NIfTI pairs", "one NIfTI folder a case, as TotalSegmentator's"):
        assert f"{kind}: liver, spleen, left_kidney, right_kidney, bowel" in printed
