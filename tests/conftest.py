"What the tests share: the words of their command line, one trained network, real CT, a browser."

import os
import tempfile
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest
from browser import chromium

FIRST = ("test_demo.py", "test_real_ct.py")  # they hold the longest tests; one trains the example
REAL_CT = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests use CUDA, hidden otherwise")


def pytest_configure(config):
    config.option.markexpr = config.option.markexpr or "not slow"
    if not config.option.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch looks, in child processes too
    os.environ["TQDM_DISABLE"] = "1"  # a bar stands between the lines that tests read
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # side by side: each its share
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(workers)))
    config.option.loadscopereorder = False  # pytest-xdist keeps the order below


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """For `--dist loadgroup`: a file's tests stay in one process, for the sake of its fixtures.

    Long files come first, and those that use the example when it is there. Notebooks, each a process
    of its own, fill the gaps at the end.
    """
    late = {item.path.name for item in items if "example" in item.fixturenames}
    for item in items:
        if item.path.name != "test_notebooks.py":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))

    def turn(item):
        name = item.path.name
        if name in FIRST:
            return FIRST.index(name)
        return len(FIRST) + (2 if name == "test_notebooks.py" else name in late)

    items.sort(key=turn)


@pytest.fixture(scope="session")
def real_ct():
    "The folder of real CT beside the project; the test is skipped where it is absent."
    if not REAL_CT.is_dir():
        pytest.skip(f"real CT is not at {REAL_CT}")
    return REAL_CT


@pytest.fixture(scope="session")
def example():
    "The small network that works, its data and patients it never saw; trained at most once."
    from rsna_seg.app.demo import example

    return example()


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    "Tests need no network: the model hub is off and its cache empty, for child processes too."
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    "What tests and their child processes leave in the system's temporary folder goes with the tests' own."
    get_temp_dir()  # multiprocessing's own folder goes with the process, after all of these
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("tmp")
    patch.setenv("TMPDIR", str(folder))
    patch.setattr(tempfile, "tempdir", str(folder))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def one_thread():
    "PyTorch adds up in one order, so that the same input gives the same numbers."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium."
    with chromium() as browser:
        yield browser
