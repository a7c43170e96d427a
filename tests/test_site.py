"The front page, the guide and the site: short, true, in step with the code, and fit to be read on a desk and on a phone."

import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import opened
from test_repo import NOTEBOOKS, TOP, copy, run  # noqa: F401, copy is a fixture

from rsna_seg.ct.find import find_layout

README = (TOP / "README.md").read_text()
GUIDE = sorted((TOP / "nbs" / "guide").glob("*.md"))
PAGES = [path.relative_to("nbs") for path in NOTEBOOKS] + [p.relative_to(TOP / "nbs") for p in GUIDE]
CHAPTERS = [path.name for path in NOTEBOOKS if re.match(r"0\d_", path.name) and len(path.parts) == 2]


def blocks(language, text=README):
    "The code of this language in a Markdown text."
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def test_the_front_page_is_short_and_leads_on():
    "At most 500 words beside code and pictures; doors to Colab and Kaggle, to each chapter, to each page of the guide."
    prose = re.sub(r"(?ms)^```.*?^```$|!\[.*?\]\(.*?\)|\]\(.*?\)", "", README)
    assert len(prose.split()) <= 500
    assert [len(code.splitlines()) for code in blocks("text")] == [8]
    assert [len(code.split("\n\n")[-1].splitlines()) for code in blocks("python")] == [4]
    assert [len(code.splitlines()) for code in blocks("sh")] == [1, 5, 1]
    assert "colab-badge.svg" in README and "open-in-kaggle.svg" in README
    linked = set(re.findall(r"\]\((nbs/[^)#]+)", README))
    assert {f"nbs/{name}" for name in CHAPTERS} | {f"nbs/guide/{p.name}" for p in GUIDE} <= linked
    assert [link for link in linked if not (TOP / link).exists()] == []


def test_the_front_page_python_runs(example, tmp_path, monkeypatch):
    "As it stands there, with a checkpoint and a scan at the places that it names."
    (code,) = blocks("python")
    checkpoint, scan = re.search(r"Predictor\(\"(.*?)\"", code)[1], re.search(r"read_scan\(\"(.*?)\"", code)[1]
    (tmp_path / checkpoint).parent.mkdir(parents=True)
    (tmp_path / checkpoint).symlink_to(example.checkpoint)
    (tmp_path / scan).symlink_to(next(find_layout(example.unseen).scans.glob("train_images/*/*")))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code, namespace)
    assert namespace["result"].organs.ml.sum() > 0


def test_messages_of_the_questions_are_those_of_the_code():
    "Each quoted message stands in the package, whatever names and numbers come between its words."
    source = "".join(path.read_text() for path in sorted((TOP / "rsna_seg").rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # a sentence over several lines
    messages = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"(?m)^> (`.*)$", (TOP / "nbs/guide/questions.md").read_text())))
    pieces = {piece.strip(" ;:") for message in messages for piece in message.split("…")} - {""}
    assert len(messages) > 25 and [piece for piece in sorted(pieces) if piece not in source] == []


def test_numbers_of_the_speed_page_are_those_of_the_pages_behind():
    "And each has a command, of a script that is there."
    text = (TOP / "nbs/guide/speed.md").read_text()
    rows = re.findall(r"(?m)^\| [^|]+ \| ([\d.]+) \| ([\d.]+)[^|]+\| `(\S+?\.py).*?` \| \[.*?\]\((.*?)\)", text)
    assert len(rows) == 3
    for ours, theirs, script, page in rows:
        words = (TOP / "nbs/guide" / page).resolve().read_text()
        assert f" {ours} " in words and theirs in words and script in words
    scripts = set(re.findall(r"benchmarks/\w+\.py", text))
    assert [name for name in sorted(scripts) if not (TOP / name).exists()] == []


def test_the_papers_of_the_release():
    "One version and one owner everywhere; templates that GitHub can read, of which the bug's asks for `rsna_seg info`."
    ini = ConfigParser(delimiters=["="])
    ini.read(TOP / "settings.ini")
    version = ini["DEFAULT"]["version"]
    assert yaml.safe_load((TOP / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"(?m)^## (.*)$", (TOP / "CHANGELOG.md").read_text())[1] == version
    forms = {p.stem: yaml.safe_load(p.read_text()) for p in (TOP / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "data", "config"}
    assert any("rsna_seg info" in str(part["attributes"]) for part in forms["bug"]["body"])


def below(entries):
    "Entries of the sidebar, each followed by what it holds."
    return [one for entry in entries for one in (entry, *below(entry.get("contents", [])))]


def test_the_sidebar_names_every_page_once():
    "Story, tutorials and guide are unfolded, as all of the first level are; each room, a level below, folds."
    sidebar = yaml.safe_load((TOP / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    assert sorted(entry["href"] for entry in below(sidebar) if "href" in entry) == sorted(map(str, PAGES))
    *open_parts, rooms = [part for part in sidebar if "section" in part]
    assert [part["section"] for part in open_parts] == ["The story", "Tutorials", "Guide"]
    assert not [entry for part in open_parts for entry in part["contents"] if "section" in entry]
    assert all("text" in room["contents"][0] for room in rooms["contents"] if "section" in room)
    assert {room["section"].lower() for room in rooms["contents"] if "section" in room} >= {
        page.parts[0] for page in PAGES if len(page.parts) > 1} - {"guide", "tutorials"}  # fmt: skip


class Page(HTMLParser):
    "What a page holds: links, ids, pictures, and its text inside and outside of code."

    ALONE = {"img", "br", "hr", "meta", "link", "input", "wbr", "source"}

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.pictures, self.inside = [], set(), [], []
        self.text, self.code = "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id")} - {None}
        self.links += [attributes[k] for k in ("href", "src") if attributes.get(k)]
        self.pictures += [attributes["src"]] if tag == "img" else []
        self.inside += [] if tag in self.ALONE else [tag]

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "pre" in self.inside:
            self.code += data
        elif not {"script", "style"} & set(self.inside):
            self.text += data


@pytest.fixture(scope="module")
def site(copy):  # noqa: F811
    "The folder of the built site."
    run(sys.executable, ".ci/site.py", cwd=copy)
    run("smalldocs", "render", "_proc", cwd=copy)
    return copy / "_proc" / "_docs"


needs_smalldocs = pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")


@pytest.mark.slow
@needs_smalldocs
def test_the_site_builds_offline(site):
    "One page a notebook or text; links lead somewhere and stay inside; badges; no raw link, no traceback."
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert {site / page.with_suffix(".html") for page in PAGES} == set(pages)
    host = yaml.safe_load((TOP / "nbs/nbdev.yml").read_text())["website"]["site-url"]
    wrong = []
    for path, page in pages.items():
        name = str(path.relative_to(site))
        for link in page.links:
            parts = urlsplit(link)
            if link.startswith(f"{host}/"):
                wrong.append(f"{name}: {link} leaves the site")
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.exists() or fragment and target in pages and fragment not in pages[target].ids:
                wrong.append(f"{name}: {link} leads nowhere")
        if not name.startswith("guide/") and not any("badge" in src for src in page.pictures):
            wrong.append(f"{name}: no badge")
        wrong += [f"{name}: raw link {raw}" for raw in re.findall(r"\]\([\w./:]+", page.text)]
        wrong += [f"{name}: raw link {raw}" for raw in re.findall(r"\]\(https?:\S+", page.code)]
        wrong += [f"{name}: traceback"] if "Traceback (most recent" in page.text + page.code else []
    assert wrong == []
    assert "<td data-words>The left kidney lies" in (site / "report/04_dataset.html").read_text()


LAYOUT = """() => {
    const main = document.querySelector('main'), edge = main.getBoundingClientRect().right
    const inside = e => e.closest('pre, table, .cell-output-display') || e
    const name = e => e.tagName + ' ' + (e.innerText || e.alt || '').slice(0, 80)
    const wide = [...main.querySelectorAll('pre')].filter(e => e.scrollWidth > e.clientWidth + 1)
    const code = wide.filter(e => innerWidth > 767 || e.matches('.sourceCode') || !e.closest('.cell-output'))
    const out = [...main.querySelectorAll('*')].filter(e => inside(e).getBoundingClientRect().right > edge + 1)
    const cut = [...main.querySelectorAll('table:has(td[data-words]:last-child)')].filter(
        e => innerWidth > 767 && e.scrollWidth > e.clientWidth + 1 && e.rows[0].cells.length < 7)
    const badges = [...main.querySelectorAll('a > img')].filter(e => !e.getClientRects().length)
    return [...code, ...out, ...cut, ...badges].map(name).concat(
        document.documentElement.scrollWidth > innerWidth ? ['the page is wider than the window'] : [])
}"""


@pytest.mark.slow
@needs_smalldocs
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_a_desk_and_a_phone(site, browser, width):
    "No line of code, table or picture is wider than its column, no sentence in a table cut; badges are visible."
    wrong = {}
    for path in sorted(site.rglob("*.html")):
        with opened(browser, path, viewport={"width": width, "height": 900}) as (page, _):
            if found := page.evaluate(LAYOUT):
                wrong[str(path.relative_to(site))] = found[:3]
    assert wrong == {}
