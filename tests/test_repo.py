"What is generated is in step with its source, and the notebooks show what they did."

import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    path.relative_to(TOP)
    for path in (TOP / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
PAPERS = "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", ".github"


def run(*words, cwd):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project in which generators may write."
    folder = tmp_path_factory.mktemp("copy") / "rsna_seg"
    unwanted = shutil.ignore_patterns(
        ".git", "_proc", "_docs", "*.egg-info", "__pycache__", ".pytest_cache", "rsna_seg_demo"
    )  # fmt: skip
    return shutil.copytree(TOP, folder, ignore=unwanted)


def differences(copy, *paths):
    "Files below the paths that differ between the project and its copy, either way."
    names = set()
    for top in (TOP, copy):
        for path in paths:
            files = [top / path] if (top / path).is_file() else (top / path).rglob("*")
            files = [p for p in files if p.is_file() and "__pycache__" not in p.parts]
            names |= {p.relative_to(top) for p in files}
    content = lambda file: file.read_bytes() if file.is_file() else None
    return sorted(str(name) for name in names if content(TOP / name) != content(copy / name))


def test_notebooks_are_clean_and_exported(copy):
    run("nbdev_clean", cwd=copy)
    run("nbdev_export", cwd=copy)
    assert differences(copy, "nbs", "rsna_seg") == []


def test_readme_and_links_are_in_step(copy):
    run(sys.executable, ".ci/derive.py", cwd=copy)
    assert differences(copy, "README.md", "nbs", *PAPERS) == []


def test_another_owner_goes_everywhere(copy):
    settings = (copy / "settings.ini").read_text()
    (copy / "settings.ini").write_text(re.sub(r"(?m)^user = .*$", "user = somebody-else", settings))
    run(sys.executable, ".ci/derive.py", cwd=copy)
    ini = ConfigParser(delimiters=["="])
    ini.read(TOP / "settings.ini")
    owner = ini["DEFAULT"]["user"]
    texts = [copy / "README.md", copy / "nbs" / "nbdev.yml", *(copy / n for n in NOTEBOOKS)]
    texts += [*(copy / "nbs" / "guide").glob("*.md"), *(copy / paper for paper in PAPERS)]
    for text in (p.read_text() for p in texts if p.is_file()):
        assert f"/{owner}/rsna_seg" not in text and f"{owner}.github.io" not in text
    for name in set(NOTEBOOKS) - {Path("nbs/index.ipynb")}:
        assert "github/somebody-else/rsna_seg" in (copy / name).read_text()
    (copy / "settings.ini").write_text(settings)
    run(sys.executable, ".ci/derive.py", cwd=copy)


@pytest.mark.parametrize("name", NOTEBOOKS, ids=str)
def test_notebook_shows_what_it_did(name):
    "Saved outputs, and no saved errors, warnings or widgets; small enough for git. Installs what it imports."
    text = (TOP / name).read_text()
    notebook = json.loads(text)
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    assert len(text) < 150_000
    assert "widgets" not in notebook["metadata"]
    assert outputs or name.name == "index.ipynb"
    assert "rsna_seg[dev]" not in text  # which would change what Colab has
    peers = {"monai": "'monai", "onnxruntime": "engines]", "openvino": "engines]"}
    source = "".join(line for cell in cells for line in cell["source"])
    assert [p for p, extra in peers.items() if f"import {p}" in source and extra not in source] == []
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
