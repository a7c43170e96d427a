"""Write what follows from settings.ini and the notebooks: owner in links, nbs/nbdev.yml, README.md.

README.md is the front page, nbs/index.ipynb, as Markdown, with its links seen from the top folder.
"""

import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.quarto import refresh_quarto_yml

top = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=["="])
ini.read(top / "settings.ini", encoding="utf-8")
user, repo = ini["DEFAULT"]["user"], ini["DEFAULT"]["repo"]


def with_owner(text):
    "The text with the owner from settings.ini in links to the repository and its pages."
    text = re.sub(rf"(github(?:\.com)?)/[\w.-]+/{repo}\b", rf"\1/{user}/{repo}", text)
    return re.sub(rf"https://[\w-]+\.github\.io/{repo}\b", f"https://{user}.github.io/{repo}", text)


def readme():
    "The front page as Markdown."
    page = nbformat.read(top / "nbs" / "index.ipynb", as_version=4)
    page.cells = [c for c in page.cells if not c.source.startswith("#| hide")]
    text = MarkdownExporter().from_notebook_node(page)[0]
    links = r"\]\((?!https?:|#)([^)]+)\)"
    return re.sub(links, r"](nbs/\1)", text).strip() + "\n"


LINKING = "nbs/**/*.ipynb", "nbs/guide/*.md", "C*.md", "CITATION.cff", ".github/ISSUE_TEMPLATE/*.yml"
for path in sorted(path for pattern in LINKING for path in top.glob(pattern)):
    text = path.read_text(encoding="utf-8")
    if with_owner(text) != text:
        path.write_text(with_owner(text), encoding="utf-8")
refresh_quarto_yml()
(top / "README.md").write_text(readme(), encoding="utf-8")
