"""`import rsna_seg` is instant, imports go only down the table of rooms, and modules stay small.

The table says what a module of a room may import, beside its own room.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rsna_seg

PACKAGE = Path(rsna_seg.__file__).parent
CHAPTERS = ("data", "augment", "model", "train", "finetune", "evaluate", "predict")
ROOMS = ("files", "ct", "anatomy", "training", "scoring", "engines", "report")
MAY_IMPORT = {
    "files": (),
    "ct": ("files",),
    "anatomy": ("files", "ct"),
    "training": ("files", "ct", "scoring.metrics", "data", "model"),
    "scoring": ("files", "ct"),
    "engines": ("files", "ct", "model"),
    "report": ("files", "ct", "scoring", "anatomy"),
    **{chapter: (*ROOMS, *CHAPTERS[:number]) for number, chapter in enumerate(CHAPTERS)},
    "app": (*ROOMS, *CHAPTERS),
    "__main__": ("app",),
}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "_modidx.py")
}


def imported(module):
    "Modules of the package that a module imports, anywhere in its text."
    here = ["rsna_seg", *module.split(".")]
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("rsna_seg.") for name in names} & set(FILES) - {module}


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_its_room_may(module):
    room = module.split(".")[0]
    allowed = (room, *MAY_IMPORT[room])
    up = [n for n in imported(module) if not any(f"{n}.".startswith(f"{a}.") for a in allowed)]
    assert up == []


def test_no_circle():
    TopologicalSorter({module: imported(module) for module in FILES}).prepare()


def test_modules_stay_small():
    "Of a module, `__all__` is wrapped by nbdev, at 120 columns: the lines after it count."
    lines = {name: path.read_text().splitlines() for name, path in FILES.items()}
    assert {name: len(text) for name, text in lines.items() if len(text) > 400} == {}
    first_cell = "\n# %% ../"
    cells = [path.read_text().partition(first_cell)[2] for path in FILES.values()]
    assert [line for text in cells for line in text.splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("module", FILES)
def test_python_3_10_can_read_it(module):
    "`a[:, *b]` came with 3.11; in brackets of its own it is older."
    text = FILES[module].read_text()
    indices = [n.slice for n in ast.walk(ast.parse(text, feature_version=(3, 10))) if isinstance(n, ast.Subscript)]
    starred = [n for n in indices if isinstance(n, ast.Tuple) and any(isinstance(e, ast.Starred) for e in n.elts)]
    assert [ast.unparse(n) for n in starred if not ast.get_source_segment(text, n).startswith("(")] == []


def test_the_package_stays_small():
    total = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert total <= 14_700


def test_importing_the_package_imports_nothing_heavy():
    heavy = "torch", "numpy", "pandas", "cv2", "matplotlib"
    code = f"import sys, rsna_seg; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_offers_its_first_names():
    "Each can be had and completed. A chapter is the module, also where a function has its name."
    names = ["prepare", "open_data", "read_scan", "Scan", "TrainConfig", "FinetuneConfig"]
    names += ["Predictor", "load_checkpoint", "ORGANS"]
    assert set(rsna_seg.__all__) == {*names, *CHAPTERS} <= set(dir(rsna_seg))
    assert all(getattr(rsna_seg, name) is not None for name in names)
    for chapter in CHAPTERS:
        assert getattr(rsna_seg, chapter) is sys.modules[f"rsna_seg.{chapter}"]
    with pytest.raises(AttributeError, match="no attribute 'segment'"):
        rsna_seg.segment
