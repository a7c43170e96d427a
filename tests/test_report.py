"The page that `write_report` writes, as a browser shows it: read, sorted, opened, printed, without a network."

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from browser import faults, opened
from matplotlib.figure import Figure
from PIL import Image

from rsna_seg.report.page import Section, write_report

NAN = float("nan")
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
CASES = pd.DataFrame(
    {
        "Dice": [0.9501, NAN, 0.95004, 1e-05, 0.95004, -0.5, math.inf],
        "slices": pd.array([1200, 9, None, 30, 9, 9, 100], dtype="Int64"),
        "scanner": ["site 10", "site 2", None, "Site 1", "site 2", "", "site 10"],
        "HD95": pd.Series([3.5, None, 12, 1e-7, 2, 2, 30.25], dtype=object).to_list(),
        EVIL: list("gfedcba"),
    },
    index=pd.Index(["case 2", "case 10", "case 1", "case 33", "case 4", "case 5 <b>", "case 6"], name="case"),
)
WHY = pd.DataFrame("", CASES.index, CASES.columns)
WHY.iloc[1, 0] = "no liver in this scan"


def picture(kind, size=(900, 300)):
    "A file of grey noise."
    pixels, file = np.random.default_rng(0).integers(0, 255, size[::-1], dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def curve():
    figure = Figure((6, 3))
    figure.add_subplot().plot([0, 1, 3])
    return figure


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    links = {name: f"place of {name}" for name in CASES.index}
    below = pd.DataFrame({"Dice": [0.9]}, index=pd.Index(["Liver"], name="organ"))
    parts = [Section(f"Slices of {name}", f"What is to be seen of {name}.", below, image=picture("JPEG"), anchor=anchor)
             for name, anchor in links.items()]  # fmt: skip
    parts[2] = Section("Slices of case 1", parts=[Section("Within a part", "Deep text.", anchor="deep")], anchor=links["case 1"])
    sections = [
        Section("Cases", "One row each.", CASES, absent=WHY, sortable=True, links=links, parts=parts, notes=["Dice: overlap.", EVIL]),
        Section(EVIL, EVIL, pd.DataFrame({EVIL: [EVIL]}, index=[EVIL]), curve(), EVIL, anchor='odd"> anchor'),
        Section("Fixed table", "Not to be sorted.", pd.DataFrame({"pixels": [1234567]}, index=["all"])),
        Section("Picture", image=picture("PNG"), caption="Noise.", alt="Grey noise"),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("report") / "report.html"
    title = f"Evaluation of best_mobilenet_rsna_refined_of_fold_0_with_a_name_without_any_space.pth {EVIL}"
    write_report(path, title, ["Seven cases.", EVIL], sections, warnings=["case 8: its mask is unreadable.", EVIL])
    return path


@pytest.fixture
def page(browser, report):
    "The report in a window of usual size; nothing may go wrong while a test uses it, and nothing be asked for."
    with opened(browser, report, viewport={"width": 1200, "height": 800}) as (page, seen):
        yield page
        page.wait_for_timeout(50)
    assert seen.problems == [] and seen.elsewhere == [] and seen.requests[0].startswith("file:")


def labels(page):
    return page.get_by_role("table", name="Cases").get_by_role("rowheader").all_inner_texts()


def natural(text):
    "As people sort: 2 before 10, case ignored."
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", text)]


def in_order(column, reverse):
    "Row labels as Python sorts them: stable, and missing values last either way."
    values = dict(zip(CASES.index, CASES.index if column == "case" else CASES[column]))
    none = [k for k, v in values.items() if pd.isna(v) or v == ""]
    key = (lambda k: natural(values[k])) if isinstance(CASES.index[0] if column == "case" else CASES[column].iloc[0], str) else values.get
    return sorted((k for k in values if k not in none), key=key, reverse=reverse) + none


def focused(page):
    return page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.innerText.trim()")


def test_what_a_screen_reader_finds(page):
    cases = page.get_by_role("table", name="Cases")
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["Left out", "Cases", EVIL, "Fixed table", "Picture"]
    assert [page.get_by_role(r).count() for r in ("banner", "main", "contentinfo")] == [1, 1, 1]
    assert page.get_by_role("navigation", name="Sections").get_by_role("link").count() == 4
    assert page.get_by_role("note", name="Left out").get_by_role("listitem").all_inner_texts()[0] == "case 8: its mask is unreadable."
    assert cases.get_by_role("columnheader").count() == 6
    for name in ("case", *CASES.columns):
        assert cases.get_by_role("columnheader", name=name, exact=True).get_by_role("button", name=name, exact=True).count() == 1
    assert cases.get_by_role("rowheader").get_by_role("link").all_inner_texts() == list(CASES.index)
    assert cases.get_by_role("cell", name="no liver in this scan").text_content() == "—no liver in this scan"
    assert cases.get_by_role("cell", name="no value").count() == 3
    assert cases.get_by_role("cell", name="1\u202f200").count() == 1
    fixed = page.get_by_role("table", name="Fixed table")
    assert fixed.get_by_role("button").count() == 0 and fixed.get_by_role("columnheader").all_inner_texts() == ["row", "pixels"]
    alternatives = page.locator("img").evaluate_all("images => images.map(i => i.alt)")
    assert len(alternatives) == 8 and all(alternatives) and "Grey noise" in alternatives
    assert page.get_by_role("img", name="Grey noise").bounding_box()["width"] == 450


@pytest.mark.parametrize("column", ["case", *CASES.columns])
def test_a_click_sorts(page, column):
    button = page.get_by_role("columnheader", name=column, exact=True).get_by_role("button")
    head = button.locator("xpath=..")
    assert labels(page) == list(CASES.index) and head.get_attribute("aria-sort") is None
    for reverse, says in ((False, "ascending"), (True, "descending"), (False, "ascending")):
        button.click()
        assert labels(page) == in_order(column, reverse)
        assert head.get_attribute("aria-sort") == says
        assert page.locator("[aria-sort]").count() == 1


@pytest.mark.slow
def test_pictures_grow_and_nothing_serious_is_wrong(page):
    assert faults(page) == []
    page.get_by_role("button", name="Enlarge: Grey noise").click()
    large = page.get_by_role("dialog").get_by_role("img", name="Grey noise")
    assert large.bounding_box()["width"] > 1000
    page.get_by_role("button", name="Close").click()
    assert large.count() == 0 or not large.is_visible()


def test_sorting_by_two_columns_and_whole_rows(page):
    buttons = page.get_by_role("table", name="Cases").get_by_role("button")
    buttons.nth(1).click()
    buttons.nth(2).click()
    expected = CASES.sort_values("Dice").sort_values("slices", kind="stable").index
    assert labels(page) == list(expected)
    assert page.locator("[aria-sort]").all_inner_texts() == [buttons.nth(2).inner_text()]
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="case 33"))
    assert row.get_by_role("cell").all_inner_texts() == ["0.000", "30", "Site 1", "0.000", "d"]


def test_the_arrow_tells_the_order(page):
    arrow = page.get_by_role("button", name="Dice", exact=True).locator(".arrow")
    drawn = lambda: arrow.evaluate("a => getComputedStyle(a, '::after').content")
    seen = [drawn()]
    for _ in range(2):
        arrow.click()
        seen.append(drawn())
    assert len(set(seen)) == 3


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_is_enough(page, key):
    page.keyboard.press("Tab")
    assert focused(page) == "A Skip to the content"
    page.keyboard.press("Enter")
    for _ in range(10):
        page.keyboard.press("Tab")
        if focused(page) == "BUTTON Dice":
            break
    assert focused(page) == "BUTTON Dice"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for reverse in (False, True):
        page.keyboard.press(key)
        assert labels(page) == in_order("Dice", reverse)
        assert focused(page) == "BUTTON Dice"


def is_open(page, title):
    "Opened, in view, and with the focus on its summary."
    page.wait_for_function("title => document.activeElement.innerText === title", arg=title)
    summary = page.locator("summary", has_text=title)
    assert summary.locator("xpath=..").get_attribute("open") is not None
    box, height = summary.bounding_box(), page.viewport_size["height"]
    assert 0 <= box["y"] < height
    return True


@pytest.mark.parametrize("how", ["mouse", "keyboard"])
def test_a_link_opens_its_case(page, how):
    link = page.get_by_role("link", name="case 5 <b>")
    for _ in range(2):  # the second time the address is there already
        assert not page.get_by_text("What is to be seen of case 5 <b>.").is_visible()
        if how == "mouse":
            link.click()
        else:
            link.focus()
            page.keyboard.press("Enter")
        assert is_open(page, "Slices of case 5 <b>")
        assert page.get_by_text("What is to be seen of case 5 <b>.").is_visible()
        page.keyboard.press("Enter")
    assert page.get_by_text("What is to be seen of case 4.").is_visible() is False


def test_the_address_opens_a_part(browser, report):
    with opened(browser, report, "place%20of%20case%206") as (page, seen):
        assert is_open(page, "Slices of case 6")
        page.evaluate("location.hash = 'deep'")
        assert is_open(page, "Within a part") and page.get_by_text("Deep text.").is_visible()
        page.evaluate("location.hash = 'there is no such place'")
        assert seen.problems == []


def test_every_link_has_a_place(page):
    lost = "links => links.map(a => a.hash.slice(1)).filter(h => !document.getElementById(h))"
    assert page.locator("a").evaluate_all(lost) == []
    page.get_by_role("navigation").get_by_role("link", name=EVIL).click()
    assert page.evaluate("document.querySelector(':target').innerText") == EVIL


def luminance(colour):
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, two):
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


TEXTS = """elements => elements.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  let paper = e;
  while (paper && getComputedStyle(paper).backgroundColor === "rgba(0, 0, 0, 0)") paper = paper.parentElement;
  return [e.tagName + " " + e.innerText, getComputedStyle(e).color, paper ? getComputedStyle(paper).backgroundColor : "none"];
})"""


def test_contrast_in_light_and_dark(browser, report):
    body = {}
    for scheme in ("light", "dark"):
        with opened(browser, report, color_scheme=scheme) as (page, _):
            page.locator("summary").first.click()
            page.get_by_role("button", name="Dice").click()
            texts = page.locator("body *:not(script)").evaluate_all(TEXTS)
            body[scheme] = page.locator("body").evaluate("b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor]")
        assert len(texts) > 60
        for text, *colours in texts:
            ink, paper = ([int(v) for v in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", c).groups()] for c in colours)
            assert contrast(ink, paper) >= 4.5, (scheme, text, colours)
    assert body["light"][0] != body["dark"][0] and body["light"][1] != body["dark"][1]


def test_text_from_outside_is_only_text(page):
    assert page.title().endswith(EVIL)
    assert page.get_by_role("heading", level=1).inner_text().endswith(EVIL)
    assert page.locator("script").count() == 1 and page.locator("img[src='x']").count() == 0
    assert page.get_by_text(EVIL, exact=True).count() >= 6


def test_the_page_can_ask_nobody(browser, report):
    with opened(browser, report) as (page, seen):
        page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://192.0.2.1/x.png'}))")
        failed = page.evaluate("fetch('http://192.0.2.1/x').then(() => false, () => true)")
        page.wait_for_timeout(100)
    assert failed and len([p for p in seen.problems if "Content Security Policy" in p]) >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_all_without_scrolling_sideways(browser, report, scheme):
    with opened(browser, report, viewport={"width": 360, "height": 640}, color_scheme=scheme) as (page, _):
        for box in page.locator("summary").all():
            if box.is_visible():
                box.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.get_by_role("img", name="Grey noise").bounding_box()["width"] <= 360
        inside = page.locator(".scroll").first.evaluate("s => [s.scrollWidth > s.clientWidth, s.tabIndex]")
    assert inside == [True, 0]


def test_without_scripts_all_is_there(browser, report):
    with opened(browser, report, "place%20of%20case%206", java_script_enabled=False) as (page, seen):
        box = page.locator("summary", has_text="Slices of case 6").bounding_box()
        assert 0 <= box["y"] < page.viewport_size["height"]
        assert labels(page) == list(CASES.index)
        page.get_by_role("button", name="Dice").click()
        assert labels(page) == list(CASES.index)
        content = page.get_by_text("What is to be seen of case 6.")
        assert content.count() == 1 and not content.is_visible()
        page.locator("summary", has_text="Slices of case 6").click()
        assert content.is_visible()
        assert seen.elsewhere == []


def test_paper_shows_closed_parts(page):
    page.evaluate("""() => { window.open_on_paper = []; addEventListener("beforeprint", () =>
        window.open_on_paper.push(document.querySelectorAll("details:not([open])").length)) }""")
    page.pdf()
    assert page.evaluate("open_on_paper") == [0]
    assert page.locator("details[open]").count() == 0


def test_paper_is_light(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.get_by_text("What is to be seen of case 4.").evaluate("p => p.checkVisibility({contentVisibilityAuto: true})")


def test_several_levels_of_an_index(tmp_path, browser):
    index = pd.MultiIndex.from_tuples([("10004", 21057), ("10005", 3)], names=["patient", "series"])
    table = pd.DataFrame({"Dice": [0.9, 0.8]}, index=index)
    parts = [Section("The second", "Its text.", anchor="second")]
    write_report(tmp_path / "r.html", "r", [], [Section("Series", table=table, sortable=True, links={("10005", 3): "second"}, parts=parts)])
    with opened(browser, tmp_path / "r.html") as (page, _):
        page.get_by_role("button", name="Dice").click()
        assert page.get_by_role("rowheader").all_inner_texts() == ["10005 / 3", "10004 / 21057"]
        assert page.get_by_role("columnheader").all_inner_texts()[0].strip().startswith("patient / series")
        page.get_by_role("link", name="10005 / 3").click()
        assert is_open(page, "The second")
