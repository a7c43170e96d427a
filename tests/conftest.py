"What tests of several files share: real CT, a browser, one thread, and the names of the markers."

import os
from pathlib import Path

import pytest
import torch
from browser import chromium

REAL_CT = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # tests side by side: each has its share of the cores
        threads = max(1, os.cpu_count() // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
        torch.set_num_threads(threads)
    config.option.loadscopereorder = False  # for pytest-xdist: files in the order of `pytest_collection_modifyitems`
    config.addinivalue_line("markers", "long: takes minutes; leave it out with -m 'not long'")


def pytest_collection_modifyitems(items):
    "Files with long tests come first, so that side by side none of them is left alone at the end."
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def real_ct():
    "The folder of real CT beside the project; the test is skipped where it is absent."
    if not REAL_CT.is_dir():
        pytest.skip(f"real CT is not at {REAL_CT}")
    return REAL_CT


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    "Tests must not depend on a network: the model hub is off and its cache empty, for child processes too."
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def one_thread():
    "PyTorch adds up in one order, so that the same input gives the same numbers; small pictures gain nothing from more threads."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium."
    with chromium() as browser:
        yield browser
