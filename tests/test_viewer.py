"The report of one scan, as a browser shows it from a disk: slices to scroll through, organs in their places, no network."

import json
import re

import numpy as np
import pandas as pd
import pytest
from browser import opened
from test_report import EVIL, contrast

from rsna_seg.ct.organs import ORGANS, palette
from rsna_seg.report.scan import write_scan_report

SHAPE, SPACING = (30, 60, 80), (2.5, 1.0, 0.5)
SCALE = 13  # pixels of the canvas for each of the scan


def scan():
    "Grey steps, a liver on the patient's right, a spleen in two pieces with a gap, a left kidney; nothing is symmetric."
    grey, mask = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    grey[:] = 40 + 5 * np.arange(30)[:, None, None]
    grey[:, 40:] += 30
    for z in range(10, 20):
        mask[z, 8 : 20 + z, 6:30] = 1
    mask[3:6, 10:20, 50:74] = mask[25:27, 10:18, 50:60] = 2
    mask[8:14, 40:52, 48:66] = 3
    return grey, mask


def table(mask):
    voxels = [int((mask == o.id).sum()) for o in ORGANS]
    rows = {"ml": voxels, "voxels": voxels, "mean_hu": [99.96 if v else np.nan for v in voxels], "edges": [v > 0 for v in voxels]}
    organs = pd.DataFrame(rows, index=pd.Index([o.key for o in ORGANS], name="organ"), dtype=object)
    organs.loc["bowel"] = None
    return organs


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path, (grey, mask) = tmp_path_factory.mktemp("scan") / "report.html", scan()
    write_scan_report(path, f"Scan {EVIL}", [EVIL], table(mask), ["Spleen: two pieces.", EVIL], grey, mask, SPACING, notes=[EVIL])
    return path


@pytest.fixture
def page(browser, report):
    "The report once the viewer runs; nothing may go wrong while a test uses it, and nothing be asked for."
    with opened(browser, report, viewport={"width": 1200, "height": 700}) as (page, seen):
        page.locator("canvas").wait_for()
        yield page
        page.wait_for_timeout(50)
    assert seen.problems == [] and seen.elsewhere == [] and seen.requests[0].startswith("file:")


def drawn(page, z):
    "Waits until the slice is on the canvas, and its words beside it."
    page.wait_for_function("z => document.querySelector('canvas').dataset.slice === String(z)", arg=z)
    text = page.locator(".where b").inner_text()
    assert text == f"Slice {z + 1} of 30, {2.5 * z:g} mm from the feet end"
    assert page.locator(".slice").get_attribute("aria-valuetext").startswith(text)
    return True


READ = """(canvas, places) => {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  return places.map(([row, col]) => [...context.getImageData(col, row, 1, 1).data].slice(0, 3));
}"""


def pixels(page, places):
    "The colours of the canvas in the middle of pixels (row, col) of the scan."
    page.wait_for_timeout(60)  # a frame or two
    middles = [[int((row + 0.5) * SCALE), int((col + 0.5) * SCALE)] for row, col in places]
    return np.array(page.locator("canvas").evaluate(READ, middles))


def expected(z, places, opacity=0.3):
    grey, mask = scan()
    mix = lambda g, m: np.full(3, g) if m == 0 else (1 - opacity) * g + opacity * np.array(palette()[m])
    return np.array([mix(float(grey[z][p]), mask[z][p]) for p in places])


def inner(z, label):
    "A pixel of the organ, away from its outline."
    return tuple(np.argwhere(scan()[1][z] == label).mean(0).round().astype(int))


def move_to(page, z):
    page.locator(".slice").fill(str(z))
    return drawn(page, z)


def over_picture(page):
    "The pointer on the picture, and the page at rest."
    page.locator(".stage").scroll_into_view_if_needed()
    page.locator(".stage").hover()
    page.wait_for_timeout(300)


def test_what_a_screen_reader_finds(page):
    viewer = page.get_by_role("group", name="Slices of the scan")
    slider = viewer.get_by_role("slider", name="Slice, from the feet to the head")
    assert slider.get_attribute("aria-valuetext") == "Slice 14 of 30, 32.5 mm from the feet end: Liver, Left kidney"
    assert viewer.get_by_role("switch", name="Show organs").is_checked() and viewer.get_by_role("slider", name="Opacity").count() == 1
    assert viewer.get_by_role("img").get_attribute("aria-label").startswith("Slice 14 of 30")
    toggles = viewer.locator("button[aria-pressed]")
    assert toggles.all_inner_texts() == ["Liver", "Spleen", "Left kidney"] and viewer.get_by_role("button").count() == 4 * 3
    assert viewer.get_by_role("listitem").nth(3).inner_text().split("\n") == ["Right kidney", "not found"]
    assert viewer.get_by_role("listitem").nth(4).inner_text().split("\n") == ["Bowel", "not looked for"]
    viewer.get_by_role("button", name="Slice where Spleen is largest").click()
    page.wait_for_function("() => document.querySelector('[role=status]').textContent.startsWith('Slice 4 of 30')")
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert headings == ["Please check", "Organs", "Slices", "About this scan"]
    assert page.get_by_role("note", name="Please check").get_by_role("listitem").first.inner_text() == "Spleen: two pieces."


def test_the_table_names_organs_units_and_reasons(page):
    organs = page.get_by_role("table", name="Organs")
    assert organs.get_by_role("columnheader").all_inner_texts() == ["organ", "volume, ml", "voxels", "mean, HU", "reaches the edge"]
    assert organs.get_by_role("rowheader").all_inner_texts() == [o.name for o in ORGANS]
    assert organs.get_by_role("rowheader").get_by_role("link").all_inner_texts() == ["Liver", "Spleen", "Left kidney"]
    swatches = organs.locator(".swatch").evaluate_all("s => s.map(e => getComputedStyle(e).backgroundColor)")
    assert swatches == [f"rgb{palette()[o.id]}" for o in ORGANS]
    assert organs.get_by_role("cell", name="not looked for").count() == 4 and organs.get_by_role("cell", name="not found").count() == 1
    assert organs.get_by_role("row").nth(2).get_by_role("cell").all_inner_texts()[2:] == ["100.0", "yes"]


def test_organs_lie_where_the_mask_says(page):
    "Every tenth pixel or so of three slices, away from the outlines: in its place, and not mirrored."
    mask = scan()[1]
    for z in (4, 12, 25):
        assert move_to(page, z)
        plain = lambda r, c: len(set(mask[z, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].ravel())) == 1 and not 38 <= r <= 41
        places = [(r, c) for r in range(0, 60, 5) for c in range(0, 80, 4) if plain(r, c)]
        assert {int(mask[z][p]) for p in places} == set(np.unique(mask[z]))
        assert np.abs(pixels(page, places) - expected(z, places)).max() <= 4
    side = {letter: page.get_by_text(letter, exact=True).bounding_box()["x"] for letter in "RL"}
    middle = page.locator(".stage").evaluate("s => s.getBoundingClientRect().left + s.clientWidth / 2")
    assert side["R"] < middle - 100 and side["L"] > middle + 100


def test_the_outline_is_drawn_inside_the_organ(page):
    move_to(page, 12)  # liver: rows 8 to 31, columns 6 to 29
    row = np.array(page.locator("canvas").evaluate(READ, [[20 * SCALE, x] for x in range(80 * SCALE)]))
    solid = np.flatnonzero(np.abs(row - palette()[1]).max(1) <= 3)
    assert list(solid) == [6 * SCALE, 6 * SCALE + 1, 30 * SCALE - 2, 30 * SCALE - 1]


def test_switch_opacity_and_toggles(page):
    move_to(page, 12)
    places = [inner(12, 1), inner(12, 3), (2, 2)]
    near = lambda wanted: np.abs(pixels(page, places) - wanted).max() <= 4
    grey = expected(12, places, 0)
    assert near(expected(12, places))
    page.get_by_role("slider", name="Opacity").fill("80")
    assert near(expected(12, places, 0.8))
    liver = page.get_by_role("button", name="Liver", exact=True)
    liver.click()
    assert liver.get_attribute("aria-pressed") == "false"
    assert near([grey[0], *expected(12, places, 0.8)[1:]])
    liver.press("Enter")
    assert liver.get_attribute("aria-pressed") == "true" and near(expected(12, places, 0.8))
    page.get_by_role("switch").uncheck()
    assert near(grey)
    page.get_by_role("link", name="Liver").click()  # shows it again
    assert drawn(page, 19) and page.get_by_role("switch").is_checked()


def test_the_wheel_moves_slices_and_lets_the_page_go_at_the_ends(page):
    move_to(page, 2)
    over_picture(page)
    start = page.evaluate("scrollY")
    page.mouse.wheel(0, -100)
    assert drawn(page, 3)
    for z in (2, 1, 0):
        page.mouse.wheel(0, 100)
        assert drawn(page, z)
    page.mouse.wheel(0, 0.5)
    assert page.evaluate("scrollY") == start
    page.mouse.wheel(0, 100)
    page.wait_for_function("start => scrollY > start", arg=start)
    page.mouse.wheel(0, -50)  # a page on its way goes on, though the pointer is on the picture
    page.wait_for_timeout(100)
    assert drawn(page, 0)


def test_keys_and_drag(page):
    page.locator(".stage").click()
    assert page.evaluate("document.activeElement.className") == "slice"
    for key, z in (("ArrowUp", 14), ("ArrowLeft", 13), ("ArrowDown", 12), ("Home", 0), ("End", 29), ("PageDown", 26), ("PageUp", 29)):
        page.keyboard.press(key)
        assert drawn(page, z), key
    move_to(page, 13)
    over_picture(page)
    box = page.locator(".stage").bounding_box()
    x, y, step = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"] / 30
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 3 * step, y)
    assert drawn(page, 16)
    page.mouse.move(x + 3 * step, y + 5 * step)
    assert drawn(page, 11)
    page.mouse.up()
    page.mouse.move(x, y)
    assert drawn(page, 11)


def test_an_organ_is_a_click_away(page):
    mask = scan()[1]
    for organ, z in (("Liver", 19), ("Spleen", 3), ("Left kidney", 8)):
        page.get_by_role("link", name=organ).click()
        assert drawn(page, z) and (mask[z] == next(o.id for o in ORGANS if o.name == organ)).any()
        assert page.evaluate("document.activeElement.className") == "slice"
        assert page.locator("canvas").evaluate("c => c.getBoundingClientRect().top") >= 0
    for way, slices in (("head", (25, 26, 26)), ("feet", (25, 5))):
        for z in slices:
            page.get_by_role("button", name=f"Next slice with Spleen towards the {way}").click()
            assert drawn(page, z)
    page.get_by_role("button", name="Slice where Liver is largest").click()
    assert drawn(page, 19)


def test_the_pointer_names_the_organ(page):
    move_to(page, 12)
    over_picture(page)
    box, name = page.locator(".stage").bounding_box(), page.locator(".under")
    for label, text in ((1, "Liver"), (3, "Left kidney")):
        row, col = inner(12, label)
        page.mouse.move(box["x"] + (col + 0.5) / 80 * box["width"], box["y"] + (row + 0.5) / 60 * box["height"])
        assert name.inner_text() == text
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    assert not name.is_visible()


def test_millimetres_decide_the_proportions(page):
    box, bar = page.locator("canvas").bounding_box(), page.locator(".bar")
    assert box["width"] / box["height"] == pytest.approx(40 / 60, abs=0.01)
    length = int(bar.inner_text().removesuffix(" mm"))
    assert length == 10 and bar.bounding_box()["width"] == pytest.approx(box["width"] * length / 40, abs=1)


def test_slices_come_without_flicker(page):
    "From one slice to the next the canvas never is empty."
    page.evaluate("""() => { const canvas = document.querySelector("canvas"), copy = document.createElement("canvas");
        const context = copy.getContext("2d", { willReadFrequently: true }); window.looks = [];
        (function look() { context.clearRect(0, 0, 9, 9); context.drawImage(canvas, 0, 0); looks.push(context.getImageData(5, 5, 1, 1).data[0]);
          requestAnimationFrame(look); })(); }""")
    for z in (0, 29, 15):
        move_to(page, z)
    looks = page.evaluate("looks")
    assert len(looks) > 3 and min(looks) >= 38


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_dark_and_a_telephone(browser, report, scheme):
    with opened(browser, report, viewport={"width": 360, "height": 640}, color_scheme=scheme) as (page, seen):
        page.locator("canvas").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for box in page.locator(".viewer button, .viewer input").all():
            place = box.bounding_box()
            assert place["x"] >= 0 and place["x"] + place["width"] <= 360
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Liver", exact=True).click()
        for ink in page.locator(".viewer button, .where *, .hint, .why, .none, .ends").evaluate_all("e => e.map(e => getComputedStyle(e).color)"):
            assert contrast(*([int(v) for v in re.findall(r"\d+", c)] for c in (ink, paper))) >= 4.5
        assert seen.problems == [] and (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_without_scripts_there_is_a_picture(browser, report):
    with opened(browser, report, java_script_enabled=False) as (page, seen):
        picture = page.locator(".stage img")
        picture.scroll_into_view_if_needed()
        assert picture.is_visible() and picture.get_attribute("alt").startswith("Slice 14 of 30")
        assert page.locator(".stage").bounding_box()["height"] > 300
        assert page.get_by_text("allow JavaScript").is_visible() and page.locator(".where").inner_text().startswith("Slice 14 of 30")
        assert [page.locator(f"{part}:visible").count() for part in ("canvas", ".viewer input", ".viewer button", ".side")] == [0, 0, 0, 4]
        assert page.get_by_role("table", name="Organs").get_by_role("rowheader").count() == 5
        assert seen.elsewhere == []


def test_paper_shows_the_slice(page):
    move_to(page, 12)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("canvas").is_visible() and page.locator(".where").is_visible()
    assert page.locator(".viewer input:visible, .viewer button:visible").count() == 0
    assert len(page.pdf()) > 10_000


def test_text_from_outside_is_only_text(page):
    assert page.title() == f"Scan {EVIL}" and page.get_by_text(EVIL, exact=True).count() >= 3
    assert page.locator("img[src='x']").count() == 0 and page.locator("script").count() == 2


def test_thinned_and_scaled_down(tmp_path, browser):
    grey, mask = scan()
    path = tmp_path / "small.html"
    write_scan_report(path, "Small", [], table(mask), [], grey, mask, SPACING, most=10, side=40)
    with opened(browser, path) as (page, seen):
        page.locator("canvas").wait_for()
        told = page.locator(".omitted").all_inner_texts()
        assert told[0].startswith("10 of the 30 slices are shown, evenly spaced (1, 4, 7, 11, … 30). The other 20 are left out")
        assert told[1].startswith("Slices of 60 × 80 pixels are shown scaled down to 40")
        page.locator(".slice").focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowDown")
        assert page.locator(".where b").inner_text() == "Slice 27 of 30, 65 mm from the feet end"
        assert seen.problems == []


def test_no_organ_no_table_and_what_does_not_fit(tmp_path, browser):
    grey, mask = scan()
    path = tmp_path / "empty.html"
    write_scan_report(path, "Empty", ["No organ."], table(mask)[:0], [], grey[:1], 0 * mask[:1], SPACING)
    with opened(browser, path) as (page, seen):
        page.locator("canvas").wait_for()
        assert page.locator(".where").inner_text().split("\n") == ["Slice 1 of 1, 0 mm from the feet end", "no organ"]
        assert seen.problems == []
    with pytest.raises(ValueError, match="must be the same"):
        write_scan_report(tmp_path / "bad.html", "Bad", [], table(mask), [], grey[1:], mask, SPACING)
    assert [p.name for p in tmp_path.iterdir()] == ["empty.html"]


def test_the_data_is_one_json_that_html_cannot_end(report):
    "Nothing in the JSON closes the script element early."
    data = re.search(r'<script type="application/json">(.*?)</script>', report.read_text(encoding="utf-8"), re.S)[1]
    assert len(json.loads(data)["grey"]) == 30 and "<" not in data
