"""Print how the notebooks read: size of exported cells, definitions in a cell, longest line.

Models: a median of about 10 lines, one definition a cell, rarely more than 40 lines, 100 columns.
"""

import ast
import statistics
from pathlib import Path

import nbformat

top = Path(__file__).resolve().parent.parent


def exported(notebook):
    "Exported cells but for imports, each a list of lines."
    cells = [c.source for c in notebook.cells if c.source.startswith("#| export")]
    parsed = [(source.splitlines()[1:], ast.parse(source).body) for source in cells]
    imports = ast.Import, ast.ImportFrom
    return [lines for lines, body in parsed if not all(isinstance(n, imports) for n in body)]


def definitions(lines):
    "How many functions and classes a cell holds."
    body = ast.parse("\n".join(lines)).body
    return sum(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in body)


everything = []
print(f"{'notebook':32} cells median  >40  defs  widest")
for path in sorted((top / "nbs").rglob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    cells = exported(notebook)
    if ".ipynb_checkpoints" in path.parts or not cells:
        continue
    everything += cells
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    widest = max(len(line) for source in code for line in source.splitlines())
    median = statistics.median(map(len, cells))
    long = sum(len(lines) > 40 for lines in cells)
    mean = statistics.mean(map(definitions, cells))
    name = str(path.relative_to(top / "nbs"))
    print(f"{name:32} {len(cells):5} {median:6.0f} {long:4} {mean:5.1f} {widest:7}")
lengths = [len(lines) for lines in everything]
median, long = statistics.median(lengths), sum(length > 40 for length in lengths)
print(f"all: {len(lengths)} exported cells, median {median:.0f} lines, {long} above 40")
