"Training by two processes: the same gradients, scores and files as by one, and a way on when one of them is lost."

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import several
import torch
from accelerate import notebook_launcher
from accelerate.commands.launch import launch_command_parser

from rsna_seg.app.commands import parse
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.train import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TOP = Path(__file__).resolve().parents[1]
FLAGS = "--size 64 --batch-size 4 --accumulation 2 --epochs 2 --encoder-weights none --workers 0 --save-minutes 0".split()
VARIES = ["seconds", "slices_per_second", "peak_memory_gb"]

NOTEBOOK = """
import sys
from accelerate import debug_launcher
from several import LARGE
from rsna_seg.train import open_run, train
debug_launcher(train, (sys.argv[1], sys.argv[2], LARGE), num_processes=2)
print(len(open_run(sys.argv[2]).history), "epochs")
"""


def start(*words, **settings):
    "A command whose processes compute on the CPU, with one thread each."
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TOP}{os.pathsep}{TOP / 'tests'}"}
    return subprocess.Popen([sys.executable, *map(str, words)], text=True, env=environment, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)  # fmt: skip


def end(process, seconds):
    "What it printed and complained of; none of its processes is left."
    try:
        return process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def two(*words, options=()):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *options, *words)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(process, path):
    "Waits until the process has written a file; it must still be running then."
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def state_of(folder):
    return torch.load(folder / "last" / "state.pt", weights_only=True)


def same_run(one, other):
    "Whether two runs ended alike, bit for bit."
    first, second = state_of(one), state_of(other)
    moments = zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values())
    histories = [pd.read_csv(folder / "history.csv").drop(columns=VARIES) for folder in (one, other)]
    return (
        all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
        and all(torch.equal(a[key], b[key]) for a, b in moments for key in ("exp_avg", "exp_avg_sq"))
        and histories[0].equals(histories[1])
        and all(torch.equal(a, b) for a, b in zip(*(torch.load(run / "best_model_512.pth", weights_only=True).values() for run in (one, other))))
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a small dataset, `png`."
    folder = tmp_path_factory.mktemp("several")
    write_kaggle(folder / "kaggle", patients=4, size=64, slices=8)
    prepare(folder / "kaggle", folder / "png", config=PrepareConfig(size=64, jobs=1))
    return folder


@pytest.fixture(scope="module")
def found(place):
    "What both processes found in all checks that need no launch of their own."
    process = two(several.__file__, place / "png", place)
    _, complaints = end(process, 300)
    assert process.returncode == 0, complaints
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]


def test_gradients_are_those_of_one_process(found):
    steps = found[0]["gradients"]
    assert [step["batches"] for step in steps] == [[[2, 2], [2, 2]], [[2], [1]], [[2, 1], [2]], [[1], []]]
    for step, other in zip(steps, found[1]["gradients"]):
        assert step["apart"] < 1e-6
        assert step["loss"] == pytest.approx(step["direct_loss"], rel=1e-6)
        assert step["same_counts"] and step["pixels"] == 64 * 64 * sum(map(sum, step["batches"]))
        assert (step["gradient"], step["statistics"]) == (other["gradient"], other["statistics"])


def test_steps_are_those_of_one_process(found):
    steps = found[0]["steps"]
    assert steps["loss"] == pytest.approx(steps["direct_loss"], rel=1e-6)
    assert steps["pixels"] == [64 * 64 * 7] * 2
    assert steps["apart"] < 1e-9
    assert steps["weights"] == found[1]["steps"]["weights"]


def test_batchnorm_goes_on_with_the_mean_of_the_processes(found):
    assert found[0]["statistics"] == found[1]["statistics"] < 1e-6


def test_each_validation_slice_counts_once(found):
    assert found[0]["steps"]["valid"] == found[1]["steps"]["valid"]
    for scores, slices in zip(found[0]["steps"]["valid"], (7, 5, 1)):
        assert scores["same"] and scores["pixels"] == 64 * 64 * slices
        assert scores["loss"] == pytest.approx(scores["direct_loss"], rel=1e-6)


def test_a_loss_that_is_no_number_in_one_process_is_skipped_by_both(found):
    assert found[0]["nan"] == found[1]["nan"]
    begun, first, second, third = found[0]["nan"]["weights"]
    assert begun != first == second != third
    assert (found[0]["nan"]["skipped"], found[0]["nan"]["slices"], found[0]["nan"]["steps"]) == (1, 8, 2)


def test_everything_switched_on(found):
    one, other = (process["everything"] for process in found)
    assert one == other and one["checkpoint"]
    assert one["weights"] != one["average"]
    begun, frozen, *learnt = one["encoders"]
    assert begun == frozen and len({frozen, *learnt}) == len(learnt) + 1
    dice = one["dice"]
    stale = [row > 0 and score <= max(dice[:row]) for row, score in enumerate(dice)]
    assert stale.index(True) == len(dice) - 1 if True in stale else len(dice) == several.EVERYTHING.epochs


def test_only_the_first_process_writes(found, place):
    assert found[1]["written"] == []
    assert any(path.endswith("history.csv") for path in found[0]["written"])
    assert any("best_model_512" in path for path in found[0]["written"])


def test_a_folder_that_is_not_shared_is_refused(found):
    for process in found:
        assert "keep the run where all machines see it" in process["unshared"]


def test_notebook_launcher_goes_on_from_one_process(place):
    def stop(history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(place / "png", place / "notebook", several.LARGE, watch=stop)
    process = start("-c", NOTEBOOK, place / "png", place / "notebook")
    printed, complaints = end(process, 120)
    assert process.returncode == 0, complaints
    assert printed.splitlines()[-1] == "2 epochs"
    assert printed.count("fewer than the virtual batch") == printed.count("on each of 2 processes") == 1
    inspect.signature(notebook_launcher).bind(train, (place, place, several.LARGE), num_processes=8)


@pytest.fixture(scope="module")
def killed(place):
    "A run whose second process was killed in the middle of an epoch: how, and how many seconds later, it ended, and its state."
    process = two("-m", "rsna_seg.app.cli", "train", place / "png", place / "killed", *FLAGS)
    try:
        wait_for(process, place / "killed" / "config.json")
        [second] = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
        wait_for(process, place / "killed" / "last" / "state.pt")
        second.kill()
        begun = time.monotonic()
    finally:
        _, complaints = end(process, 60)
    shutil.copytree(place / "killed", place / "fewer")
    return process.returncode, complaints, time.monotonic() - begun, state_of(place / "killed")


def test_a_lost_process_ends_the_run_with_its_name(killed):
    code, complaints, seconds, state = killed
    assert state["history"] == [] and state["tally"]["step"] >= 1
    assert code != 0 and seconds < 60
    assert re.search(r"rank +: 1 ", complaints) and "Signal 9 (SIGKILL)" in complaints


@pytest.fixture(scope="module")
def resumed(place, killed, found):
    "The same command again: what each process printed and complained of."
    process = two("-m", "rsna_seg.app.cli", "train", place / "png", place / "killed", *FLAGS,
                  options=["--redirects", 3, "--log-dir", place / "logs"])  # fmt: skip
    _, complaints = end(process, 120)
    assert process.returncode == 0, complaints
    return [[next((place / "logs").rglob(f"{rank}/{name}.log")).read_text() for name in ("stdout", "stderr")] for rank in range(2)]


def test_a_lost_run_goes_on_as_if_nothing_had_been(resumed, place):
    assert same_run(place / "whole", place / "killed")


def test_one_process_speaks(resumed, place):
    [printed, progress], other = resumed
    lines = printed.splitlines()
    assert lines[0].startswith("cpu, precision") and lines[-1].startswith("best epoch ")
    assert sum(line.startswith("epoch 2/2: ") for line in lines) == 1
    assert "epoch 2/2: 100%" in progress and (place / "killed" / "training_curves.png").exists()
    assert other == ["", ""]


def test_two_processes_end_in_time_at_the_same_step(place):
    process = two("-m", "rsna_seg.app.cli", "train", place / "png", place / "timed", *FLAGS, "--max-hours", 1e-9)
    said, complaints = end(process, 200)
    assert process.returncode == 0 and said.count("time is up; to go on: rsna_seg train ") == 1, complaints
    assert state_of(place / "timed")["tally"]["step"] == 1


def test_one_process_goes_on_for_two(killed, found, place):
    run = train(place / "png", place / "fewer", several.PLAIN)
    whole = pd.read_csv(place / "whole" / "history.csv")
    assert json.loads((run.folder / "config.json").read_text())["used"]["processes"] == 1
    assert run.history.train_loss.tolist() == pytest.approx(whole.train_loss.tolist(), rel=0.05)


def test_other_settings_are_refused_by_both(resumed, place):
    before = {path: path.stat().st_mtime_ns for path in sorted((place / "killed").rglob("*"))}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", free_port()]
    process = start(*launch, "-m", "rsna_seg.app.cli", "train", place / "png", place / "killed", *FLAGS, "--lr", 0.1)
    _, complaints = end(process, 60)
    assert process.returncode != 0
    assert "killed holds a run with lr = 0.001, not 0.1: go on with the same settings or choose another folder." in complaints
    assert {path: path.stat().st_mtime_ns for path in sorted((place / "killed").rglob("*"))} == before


def test_documented_commands_are_understood():
    "Each `accelerate launch` in the notebook: by Accelerate's parser, then by ours."
    notebook = json.loads((TOP / "nbs" / "03_train.ipynb").read_text())
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"]).replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("accelerate launch")]
    seen = [launch_command_parser().parse_args(words) for words in commands]
    assert [(c.multi_gpu, c.num_machines, c.machine_rank, c.num_processes) for c in seen] == [
        (False, None, None, 1), (True, None, None, 8), (True, 2, 0, 16), (True, 2, 1, 16)]  # fmt: skip
    for command in seen:
        name, *words = command.training_script_args
        assert command.module and (command.training_script, name) == ("rsna_seg.app.cli", "train")
        assert parse(name, words).config == replace(parse(name, ["data", "out"]).config)
