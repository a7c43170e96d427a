"What a person, a pipe and a program get from the command line, and how soon."

import fcntl
import json
import os
import pty
import re
import resource
import shlex
import shutil
import subprocess
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from command import rsna_seg
from test_cli import refused, world  # noqa: F401  fixtures

from rsna_seg.app import commands, info
from rsna_seg.app.cli import COMMANDS, EXAMPLES

FEW = ["--size", 64, "--batch-size", 8, "--epochs", 2, "--encoder-weights", "none", "--workers", 0]
COMMAND = [sys.executable, "-m", "rsna_seg"]


def in_a_terminal(*words, **env):
    "What a terminal of 80 columns is sent, and the exit code."
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **env}
    env.pop("TQDM_DISABLE", None)
    process = subprocess.Popen([*COMMAND, *map(str, words)], stdout=other, stderr=other, env=env)
    os.close(other)
    printed = b""
    try:
        while part := os.read(main, 4096):
            printed += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(main)
    return printed.decode(), process.wait(timeout=60)


HELP_WITHOUT_LIBRARIES = """
import sys
from rsna_seg.app.cli import COMMANDS
from rsna_seg.app.words import read_words
for name in COMMANDS:
    print("#", name)
    try:
        read_words(name, ["--help"])
    except SystemExit as end:
        assert not end.code
loaded = {"torch", "numpy", "pandas", "rsna_seg.train"} & set(sys.modules)
assert not loaded, loaded
"""


def test_help_needs_no_library_and_says_the_same_without_them():
    script = [sys.executable, "-c", HELP_WITHOUT_LIBRARIES]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    texts = re.split(r"(?m)^# (.+)\n", done.stdout)[1:]
    assert texts[::2] == list(COMMANDS)
    boxes = str.maketrans("", "", "╭╮╰╯│─-|+ \n")
    for name, text in zip(texts[::2], texts[1::2]):
        assert text.translate(boxes) == rsna_seg(name, "--help").stdout.translate(boxes)
        assert "default: )" not in text and not re.search(r"\bNone\b", text)
        assert text.count(f"\n  rsna_seg {name}") == len(EXAMPLES[name]) == 2


WAITING = """
import os, sys
from rsna_seg.app.cli import main
main(["--version"])
print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""


@pytest.mark.parametrize("given, policy", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given, policy):
    "Said before PyTorch is loaded, which reads it once."
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, env={**env, **given})
    assert done.stdout.splitlines()[-1] == f"{policy} False", done.stderr


@pytest.mark.parametrize("words, says", [("--help", "usage: "), ("x y --epoch 3", "rsna_seg train: there is no --epoch.")])
def test_help_and_mistakes_within_a_second(words, says):
    "Of the processor's time: the machine may have other work."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*COMMAND, "train", *words.split()], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.stdout + done.stderr).startswith(says)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


MISTAKES = {
    "train": "give DATA, one folder or several, then OUT, the one to fill.",
    "inspect": "give also DATA.",
    "inspect a b": "one word too many: b.",
    "train a b --epochs": "--epochs lacks its value.",
    "train a b --epochs three": "--epochs takes a whole number, not 'three'.",
    "train a b --lr much": "--lr takes a number, not 'much'.",
    "train a b --loss 1": "there is no --loss.",
    "prepare a b --windw-of-png 50 400": "there is no --windw-of-png. Did you mean --window-of-png?",
    "prepare a b --folded 1 --epoch 2": "there is no --folded. Did you mean --folds?",
    "prepare a b --epoch 1 --foldz 2": "there is no --epoch.",
    "predict a b c --spacing 1 2": "--spacing takes another number of words.",
    "predict a b": "give CHECKPOINT, SCAN and OUT, or SCAN alone with --list-series.",
    "completion csh": "invalid choice 'csh' for argument 'shell'. Expected one of ('bash', 'zsh', 'fish').",
}


@pytest.mark.parametrize("words, says", MISTAKES.items())
def test_a_mistake_is_one_sentence(words, says):
    name, *others = words.split()
    done = rsna_seg(name, *others)
    assert (done.returncode, done.stderr) == (2, f"rsna_seg {name}: {says} See rsna_seg {name} --help.\n")


def test_a_mistake_on_a_terminal_is_the_same_without_colours():
    printed, code = in_a_terminal("inspect", "data", "--outt", "x")
    says = "rsna_seg inspect: there is no --outt. Did you mean --out? See rsna_seg inspect --help."
    assert (printed.strip(), code) == (says, 2)


def test_none_can_be_typed_for_what_may_be_left_out():
    words = "data run --fold none --weights none --trackers none".split()
    assert commands.parse("train", words) == commands.parse("train", ["data", "run"])
    assert commands.parse("predict", "a b c --spacing none".split()).config.window_of_png is None
    assert commands.parse("predict", "a b c --spacing 1 2 3".split()).spacing == (1, 2, 3)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_can_be_typed(name):
    for words in EXAMPLES[name]:
        commands.parse(name, shlex.split(words.partition(">")[0]))


def test_a_mistyped_command_gets_the_nearest():
    assert "Did you mean predict?" in rsna_seg("perdict", "model.pth").stderr
    assert "Did you mean" not in rsna_seg("xyz").stderr


def test_no_color():
    coloured, plain = (in_a_terminal("train", "--help", NO_COLOR=no)[0] for no in ("", "1"))
    assert "\x1b[" in coloured and "\x1b[" not in plain


@pytest.fixture(scope="module")
def data(world):  # noqa: F811
    done = rsna_seg("prepare", world / "kaggle", world / "slices", "--size", 64, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("read as Kaggle's competition folder: 4 series of 3 patients, labelled liver, ")
    return world / "slices"


def test_a_terminal_of_80_columns(data, tmp_path):
    "The last field of the bar is the Dice, and each epoch leaves a line."
    printed, code = in_a_terminal("train", data, tmp_path / "run", *FEW)
    assert code == 0, printed
    bars = [line for line in re.split(r"[\r\n]+", printed) if line.startswith("epoch") and "%|" in line]
    assert any(re.search(r"dice=[\d.]+$", line.strip()) for line in bars), bars
    assert max(map(len, bars)) <= 80
    assert len(re.findall(r"epoch [12]/2: .*Dice [\d.]+", printed)) == 2
    log = (tmp_path / "run" / "train.log").read_text()
    assert len(re.findall(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  epoch [12]/2: ", log)) == 2


def test_lines_in_a_pipe_json_quiet_and_a_folder_to_go_on_in(data, tmp_path):
    run, one = tmp_path / "run", [*FEW, "--max-hours", 1e-9]
    done = rsna_seg("train", data, run, *one, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run"] == str(run) and not result["finished"]
    assert "time is up in epoch 1" in done.stderr
    done = rsna_seg("train", data, run, *FEW)
    assert "\r" not in done.stdout + done.stderr
    assert max(map(len, (done.stdout + done.stderr).splitlines())) < 300
    assert re.search(r"epoch 2/2: .* Dice [\d.]+", done.stdout)
    assert (run / "train.log").read_text().count("cpu, precision") == 2
    report = json.loads(rsna_seg("evaluate", run, data, tmp_path / "report", "--json").stdout)
    assert set(report["dice"]) >= {"liver", "bowel"} and report["left_out"] == []
    words, loud = ("evaluate", run, data, tmp_path / "report", "--quiet"), {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, env=loud)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


OUTPUTS = {
    "train": ["absent", "OUT"],
    "finetune": ["absent.pth", "absent", "OUT"],
    "evaluate": ["absent.pth", "absent", "OUT"],
    "score": ["absent", "absent", "OUT"],
    "compare": ["absent", "absent", "OUT"],
    "predict": ["absent.pth", "absent.nii", "OUT"],
    "export": ["absent.pth", "OUT"],
    "demo": ["--out", "OUT"],
    "prepare": ["absent", "OUT"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_folder_for_results_is_looked_at_first(name, tmp_path):
    "Before what is read, which is absent here."
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    (photographs / "cat.jpg").write_text("a cat")
    words = lambda out: [str(out) if word == "OUT" else word for word in OUTPUTS[name]]
    if name not in ("demo", "prepare"):  # which take new folders only
        refused(rsna_seg(name, *words(photographs)), "photographs holds files", "new folder")
    below = photographs / "cat.jpg" / "results"
    refused(rsna_seg(name, *words(below)), "cat.jpg/results cannot be written to", "another folder")
    assert [path.name for path in photographs.iterdir()] == ["cat.jpg"]


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
complete -p rsna_seg >/dev/null && _tyro_rsna_seg
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_completion(tmp_path):
    script = tmp_path / "rsna_seg.bash"
    script.write_text(rsna_seg("completion", "bash").stdout)
    typed = {"tr": "train", "train --fo": "--fold", "predict --engine onn": "onnxruntime"}
    for words, whole in typed.items():
        line = ["bash", "-c", COMPLETE, "bash", str(script), "rsna_seg", *words.split()]
        done = subprocess.run(line, capture_output=True, text=True)
        assert whole in done.stdout.split(), (words, done)
    for shell in ("zsh", "fish"):
        assert "finetune" in rsna_seg("completion", shell).stdout
    assert rsna_seg("completion", "csh").returncode == 2


def test_info_as_a_program_reads_it():
    facts = json.loads(rsna_seg("info", "--size", 64, "--json").stdout)
    assert {"rsna_seg", "Python", "torch", "onnxruntime"} <= set(facts)
    assert sum("slices/s" in text for text in facts.values()) >= 1
    assert f"{os.cpu_count()} cores" in facts["cpu"]


def test_info_on_a_gpu(monkeypatch):
    "With a pretended one: its name, and the speed of the engine that is always taken there."
    gpu = SimpleNamespace(name="A100", major=8, minor=0, total_memory=40e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(info, "pick_engine", lambda *size, **sha256: ("cuda", {}))
    monkeypatch.setattr(info, "make_engine", lambda name, model, size: name)
    monkeypatch.setattr(info, "measure_engine", lambda engine, size: {"cuda": 250.0}[engine])
    assert info.describe_machine()["cuda:0"] == "A100, 8.0, 40 GB"
    assert info.describe_engines(64)["cuda"] == "250.0 slices/s"
