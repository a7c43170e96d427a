"benchmarks/gpu.py: its parts on a processor, as small as they can be, so that they run at once on a card; and its exit without one."

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpu():
    "The script as a module."
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work(gpu, tmp_path_factory):
    return gpu.Work(tmp_path_factory.mktemp("gpu"), "cpu", size=64, batch=2, slices=4, steps=2, seconds=0.2)


@pytest.fixture(scope="module")
def data(gpu, work):
    return gpu.make_data(work)


def test_without_cuda_it_says_so_and_ends_with_2():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "finds no CUDA GPU here" in done.stderr


def values(findings):
    return {finding.name: finding.value for finding in findings}


def test_precisions_waits_resume_and_counts(gpu, work, data):
    machine = values(gpu.look_at_machine(work, data))
    assert machine["every layer in channels_last"]
    found = gpu.compare_precisions(work, data)
    assert values(found)["a NaN moves nothing"] and -1 <= values(found)["cosine of the first gradients"] <= 1  # so few pixels tell no more
    assert gpu.check_waits(work, data) == []
    assert gpu.check_resume(work, data)[0].fine
    assert not any(finding.fine is False for finding in gpu.check_counts(work, data))


def test_speed_and_prediction(gpu, work, data):
    found = values(gpu.measure_speed(work, data))
    assert found["training, slices/s"] > 0 and found["limit, slices/s"] > 0 and 0 <= found["share of the time that waits for data"] <= 1
    found = {finding.name: finding.fine for finding in gpu.check_prediction(work, data)}
    assert found["voxels of the processor's class, float32"] and found["Dice of a volume, processor against card"]


def test_a_part_that_fails_does_not_end_the_others(gpu, work, data, capsys):
    def fails(work, data):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    found = gpu.run_parts(work, data, {"fails": fails, "counts": gpu.check_counts})
    assert [f.fine for f in found["fails"]] == [False] and not any(f.fine is False for f in found["counts"])
    assert "NOT  fails: RuntimeError: ['CUDA error: no kernel image is available']" in capsys.readouterr().out


@pytest.mark.slow
def test_plan_and_several(gpu, work, data):
    assert values(gpu.check_plan(work, data))["planned, slices/s"] > 0
    found = gpu.check_several(work, data)
    wrong = "\n".join(str(finding) for finding in found if not finding.fine)
    assert len(found) == 3 and "two against one" in found[0].name and not wrong, wrong


def test_only_the_parts_that_are_asked_for(gpu, monkeypatch, capsys):
    parts = {name: lambda work, data, name=name: [gpu.is_so(name, True)] for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "make_data", lambda work: None)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "counts", "half precision"])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert "counts: True" in printed and "half precision: True" in printed and "speed" not in printed
