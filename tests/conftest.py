"Real CT for the tests that want it, and the names of the markers."

from pathlib import Path

import pytest

REAL_CT = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; leave it out with -m 'not long'")


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
