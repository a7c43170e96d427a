"The page of one scan, as a browser shows it from a disk: three planes in HU, organs in their places, no network."

import json
import re
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from browser import faults, opened
from test_report import EVIL, contrast

from rsna_seg.anatomy.checks import Finding
from rsna_seg.ct.inputs import from_array
from rsna_seg.ct.organs import ORGANS, palette
from rsna_seg.ct.scan import window
from rsna_seg.report.scan import hu_step, viewer_data, write_scan_report

pytestmark = pytest.mark.slow  # a browser's minute; the quick tests shall end in ten

SHAPE, SPACING = (30, 60, 80), (2.5, 1.0, 0.5)
AFFINE = np.array([[0, 0, 0.5, -20], [0, 1, 0, -90], [2.5, 0, 0, 300], [0, 0, 0, 1]])  # (z, row, col) -> mm, LPS
PLANES = ("axial", "coronal", "sagittal")


def volume():
    "HU of which no two neighbours are alike; a liver on the right, a spleen in two pieces, a left kidney; nothing is symmetric."
    z, row, col = np.ogrid[:30, :60, :80]
    hu = (7 * z + 3 * row - 2 * col + 40 * ((z + row + 2 * col) % 3)).astype(np.int16)
    hu[:, 55:, :4], hu[:, 55:, 4:8] = -3024, 3071
    mask = np.zeros(SHAPE, np.uint8)
    for z in range(10, 20):
        mask[z, 8 : 20 + z, 6:30] = 1
    mask[3:6, 10:20, 50:74] = mask[25:27, 10:18, 50:60] = 2
    mask[8:14, 40:52, 48:66] = 3
    return hu, mask


def scan():
    return from_array(volume()[0], AFFINE, space="LPS", name="scan")


def table(mask):
    voxels = [int((mask == o.id).sum()) for o in ORGANS]
    rows = {"ml": [v / 100 for v in voxels], "voxels": voxels, "mean_hu": [99.96 if v else np.nan for v in voxels], "edges": [v > 0 for v in voxels]}
    organs = pd.DataFrame(rows, index=pd.Index([o.key for o in ORGANS], name="organ"), dtype=object)
    organs.loc["bowel"] = None
    return organs


def doubts(mask):
    "Sure everywhere, but for half of the kidney on one slice."
    sure = np.full(mask.shape, 255, np.uint8)
    sure[9, 40:46] = 100
    return sure


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path, mask = tmp_path_factory.mktemp("scan") / "report.html", volume()[1]
    findings = [Finding("volume", "spleen", "Spleen: two pieces."), Finding("few_slices", "", EVIL)]
    facts, instances = {"Patient": EVIL}, [str(130 - z) for z in range(30)]
    write_scan_report(path, f"Scan {EVIL}", scan(), mask, table(mask), findings, facts, [EVIL], sure=doubts(mask), instances=instances)
    return path


@pytest.fixture
def page(browser, report):
    "The report once the volume is there; nothing may go wrong while a test uses it, and nothing be asked for."
    with opened(browser, report, viewport={"width": 1300, "height": 800}) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        yield page
        page.wait_for_timeout(50)
    assert seen.problems == [] and seen.elsewhere == [] and seen.requests[0].startswith("file:")


def canvas(page, plane):
    return page.locator(f"[data-plane={plane}] canvas")


def slider(page, plane):
    return page.locator(f"[data-view={plane}] .slice")


def at(page, z=None, row=None, col=None):
    "Waits until the planes go through this voxel."
    for plane, index in zip(PLANES, (z, row, col)):
        if index is not None:
            page.wait_for_function("([p, i]) => document.querySelector(`[data-plane=${p}] canvas`).dataset.slice === String(i)", arg=[plane, index])
    return True


def extent(plane):
    "Pixels and mm across and down a plane."
    (nz, nr, nc), (z, r, c) = SHAPE, SPACING
    return {"axial": (nc, nr, c, r), "coronal": (nc, nz, c, z), "sagittal": (nr, nz, r, z)}[plane]


def places(page, plane, voxels):
    "Where the middles of voxels (z, row, col) lie on the canvas, CSS pixels, without zoom."
    box = canvas(page, plane).bounding_box()
    width, height, mm_x, mm_y = extent(plane)
    scale = min(box["width"] / width / mm_x, box["height"] / height / mm_y)
    across_down = {"axial": lambda z, r, c: (c, r), "coronal": lambda z, r, c: (c, 29 - z), "sagittal": lambda z, r, c: (r, 29 - z)}[plane]
    points = np.array([across_down(*v) for v in voxels]) + 0.5
    return (points - [width / 2, height / 2]) * [mm_x * scale, mm_y * scale] + [box["width"] / 2, box["height"] / 2]


READ = """(canvas, points) => {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true }), ratio = canvas.width / canvas.clientWidth;
  context.drawImage(canvas, 0, 0);
  return points.map(([x, y]) => [...context.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data].slice(0, 3));
}"""


def pixels(page, plane, voxels):
    page.wait_for_timeout(60)  # a frame or two
    return np.array(canvas(page, plane).evaluate(READ, places(page, plane, voxels).tolist()))


def point(page, plane, voxel):
    "The pointer in the middle of a voxel."
    box = canvas(page, plane).bounding_box()
    x, y = places(page, plane, [voxel])[0]
    page.mouse.move(box["x"] + x, box["y"] + y)


def readout(page):
    return page.locator(".readout").inner_text().replace("−", "-")


def choose(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_the_volume_in_the_browser_is_the_scan(page):
    "Every HU and every label, through packing and unpacking: the pixels of all planes say so, and 200 readouts."
    hu, mask = volume()
    page.keyboard.press("x")
    for z, row, col in np.random.default_rng(0).integers(0, SHAPE, (30, 3)).tolist():
        for plane, index in zip(PLANES, (z, row, col)):
            slider(page, plane).fill(str(index))
        for plane in PLANES:
            point(page, plane, (z, row, col))
            words = readout(page).split(" · ")
            organ = next((o.name for o in ORGANS if o.id == mask[z, row, col]), "no organ")
            x, y, up = (AFFINE @ [z, row, col, 1])[:3]
            unsure = ["unsure"] * int(doubts(mask)[z, row, col] < 191)
            assert words == [f"{hu[z, row, col]} HU", organ, *unsure, f"x {x:.1f}, y {y:.1f}, z {up:.1f} mm", f"instance {130 - z}"]


@pytest.mark.parametrize("step", [1, 4])
def test_rounded_hu_are_as_near_as_the_page_says(step, monkeypatch, tmp_path, browser):
    hu, mask = volume()
    monkeypatch.setattr("rsna_seg.report.scan.hu_step", lambda *_: step)
    write_scan_report(tmp_path / "page.html", "rounded", scan(), mask, table(mask))
    with opened(browser, tmp_path / "page.html", viewport={"width": 1300, "height": 800}) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert f"to multiples of {step} from -200 to 300 HU, of {8 * step} beyond" in page.locator(".omitted").inner_text()
        slider(page, "axial").fill("12")
        for row, col in ((3, 70), (20, 20), (50, 40), (57, 1), (57, 6)):
            point(page, "axial", (12, row, col))
            told, true = int(readout(page).split(" HU")[0]), hu[12, row, col]
            assert abs(told - true) <= (step / 2 if -200 <= true <= 300 else 4 * step)


def test_a_large_scan_is_rounded_and_a_small_one_is_not():
    noise = np.random.default_rng(0).normal(0, 15, (512, 512)).astype(np.int16)
    assert hu_step([noise], 30) == 0 and hu_step([noise], 200) in (1, 2, 4)
    sizes = [len(viewer_data(scan(), volume()[1])["hu"][0])]
    assert sizes[0] < 60 * 80 * 2 * 1.4


@pytest.mark.parametrize("plane", PLANES)
def test_organs_lie_where_the_mask_says(page, plane):
    "Away from outlines: fill over grey in its place, not mirrored, in all three planes."
    hu, mask = volume()
    page.keyboard.press("x")
    for z, row, col in ((4, 15, 60), (12, 44, 20), (18, 25, 52)):
        for name, index in zip(PLANES, (z, row, col)):
            slider(page, name).fill(str(index))
        fixed = {"axial": 0, "coronal": 1, "sagittal": 2}[plane]
        grid = np.indices(SHAPE).reshape(3, -1).T[::7]
        voxels = [v for v in grid.tolist() if v[fixed] == (z, row, col)[fixed]]
        flat = [v for v in voxels if (np.ptp(mask[tuple(slice(max(0, i - 1), i + 2) for i in v)]) == 0)]
        seen = pixels(page, plane, flat)
        organs = np.array([mask[tuple(v)] for v in flat])
        tint = seen.max(1) - seen.min(1)
        assert len(flat) > 20 and ((tint > 10) == (organs > 0)).all()
        for organ in set(organs) - {0}:
            grey = (seen[organs == organ] - 0.3 * np.array(palette()[organ])) / 0.7
            assert np.ptp(grey, axis=1).max() <= 6


def test_window_and_level(page):
    "Presets, numbers, keys and a drag; the greys are those of the window."
    hu, _ = volume()
    page.keyboard.press("x")
    page.keyboard.press("o")
    slider(page, "axial").fill("22")
    spots = [(22, r, c) for r in range(2, 50, 6) for c in range(2, 78, 9)]
    grey = lambda level, width: window(np.array([hu[v] for v in spots]), level, width)

    def shows(level, width):
        number = lambda name: int(page.get_by_label(name, exact=True).input_value())
        assert (number("level"), number("width")) == (level, width)
        assert page.locator(".group [data-window][aria-pressed=true]").count() == (((level, width)) in ((50, 400), (90, 150), (-600, 1500), (400, 1800)))
        box, (w, h, x, y) = canvas(page, "axial").bounding_box(), extent("axial")
        assert box["width"] / w > 4  # pixels are large, so smoothing leaves their middles nearly alone
        assert np.corrcoef(pixels(page, "axial", spots)[:, 0], grey(level, width))[0, 1] > 0.9

    shows(50, 400)
    for name, key, level, width in (("Liver", "l", 90, 150), ("Lung", "g", -600, 1500), ("Bone", "b", 400, 1800), ("Soft tissue", "s", 50, 400)):
        choose(page, f"{name} window") if name != "Bone" else page.keyboard.press(key)
        if name == "Soft tissue":
            shows(level, width)
        assert page.locator("[data-window][aria-pressed=true]").inner_text() == name
    page.get_by_label("level", exact=True).fill("100")
    page.get_by_label("width", exact=True).fill("300")
    page.keyboard.press("Tab")
    shows(100, 300)
    page.locator("[data-plane=axial]").focus()
    page.keyboard.press("]")
    page.keyboard.press("{")
    shows(90, 320)
    choose(page, "Window")
    point(page, "axial", (22, 30, 40))
    page.mouse.down()
    box = canvas(page, "axial").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2 + 40, steps=4)
    page.mouse.up()
    level, width = (int(page.get_by_label(n, exact=True).input_value()) for n in ("level", "width"))
    assert level < 60 and width > 350
    choose(page, "Cross")
    point(page, "axial", (22, 30, 40))
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + box["width"] / 2 - 30, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up(button="right")
    assert int(page.get_by_label("width", exact=True).input_value()) < width
    choose(page, "Reset")
    shows(50, 400)


def test_a_click_puts_all_planes_through_the_point(page):
    for plane, voxel in (("axial", (12, 20, 15)), ("coronal", (4, 20, 60)), ("sagittal", (26, 14, 60))):
        slider(page, plane).fill(str(voxel[PLANES.index(plane)]))
        point(page, plane, voxel)
        page.mouse.down()
        page.mouse.up()
        assert at(page, *voxel)
    page.locator("[data-plane=coronal]").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("PageUp")
    assert at(page, 27, 15, 59)
    page.locator("[data-plane=axial]").focus()
    for key in ("ArrowDown", "ArrowRight", "PageDown"):
        page.keyboard.press(key)
    assert at(page, 26, 16, 60)
    page.mouse.move(5, 5)
    assert readout(page).startswith(f"{volume()[0][26, 16, 60]} HU · no organ")


def test_zoom_and_pan_keep_what_is_below_the_pointer(page):
    point(page, "axial", (0, 20, 60))
    before = readout(page)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -240)
    page.keyboard.up("Control")
    page.wait_for_timeout(60)
    box = canvas(page, "axial").bounding_box()
    x, y = places(page, "axial", [(0, 20, 60)])[0] + [box["x"], box["y"]]
    page.mouse.move(x + 1, y)
    page.mouse.move(x, y)
    assert readout(page) == before
    page.mouse.move(x + 40, y)  # less far than without the zoom
    moved = float(re.search(r"x (-?[\d.]+)", readout(page))[1]) - float(re.search(r"x (-?[\d.]+)", before)[1])
    assert 0 < moved < 40 / (places(page, "axial", [(0, 20, 61)])[0][0] - places(page, "axial", [(0, 20, 60)])[0][0]) * 0.5
    choose(page, "Move")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 50, y - 30, steps=3)
    assert readout(page) == before
    page.mouse.up()
    choose(page, "Reset")
    page.mouse.move(x, y)
    assert readout(page) == before


def test_distances_are_millimetres(page):
    choose(page, "Distance")
    for plane, start, end in (("axial", (0, 10, 10), (0, 40, 70)), ("coronal", (5, 0, 10), (25, 0, 70)), ("sagittal", (5, 10, 0), (25, 50, 0))):
        point(page, plane, start)
        page.mouse.down()
        point(page, plane, end)
        page.mouse.up()
        true = np.linalg.norm(np.multiply(np.subtract(start, end), SPACING))
        assert page.locator("[role=status]").inner_text() == f"{true:.1f} mm" or abs(float(page.locator("[role=status]").inner_text()[:-3]) - true) < 0.4
    page.keyboard.press("Escape")
    page.locator("[data-plane=axial]").focus()  # the same by keys
    page.keyboard.press("d")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("d")
    page.wait_for_timeout(600)  # by then the slice of the last step would be said
    assert page.locator("[role=status]").inner_text() == "5.0 mm"


def test_organs_fill_outline_opacity_and_unsure(page):
    slider(page, "axial").fill("12")
    inside, middle = (12, 20, 15), [(12, 20, 15), (12, 46, 57), (12, 2, 2)]
    page.keyboard.press("x")
    tint = lambda: np.ptp(pixels(page, "axial", middle), axis=1) > 8
    assert tint().tolist() == [True, True, False]
    choose(page, "Liver")
    assert tint().tolist() == [False, True, False]
    page.locator(".organ[data-id='1']").press("Enter")
    assert tint().tolist() == [True, True, False]
    page.keyboard.press("3")
    assert tint().tolist() == [True, False, False] and page.locator(".organ[data-id='3']").get_attribute("aria-pressed") == "false"
    page.keyboard.press("f")  # outlines alone
    assert not tint().any() and not page.get_by_role("checkbox", name="Fill").is_checked()
    edge = canvas(page, "axial").evaluate(READ, [((places(page, "axial", [inside])[0] + [0, dy])).tolist() for dy in range(-300, 300)])
    assert (np.abs(np.array(edge) - palette()[1]).max(1) < 40).sum() >= 2
    page.keyboard.press("f")
    before = pixels(page, "axial", middle[:1])
    page.keyboard.press(".")
    page.keyboard.press(".")
    assert page.get_by_role("slider", name="Opacity").input_value() == "50"
    nearer = np.abs(pixels(page, "axial", middle[:1]) - palette()[1]).sum() < np.abs(before - palette()[1]).sum()
    assert nearer
    page.get_by_role("checkbox", name="Organs").uncheck()
    assert not tint().any()
    page.get_by_role("button", name="Slice 10, 50 % of Left kidney unsure").click()
    assert at(page, 9) and page.get_by_role("checkbox", name="Unsure").is_checked()
    white = pixels(page, "axial", [(9, 42, 57), (9, 49, 57)])
    assert white[0].min() > 200 and white[1].min() < 200


def test_an_organ_is_a_click_away(page):
    for organ, z in (("Liver", 19), ("Spleen", 3), ("Left kidney", 8)):
        page.get_by_role("button", name=f"Largest slice with {organ}").click()
        assert at(page, z)
    for way, slices in (("head", (25, 26, 26)), ("feet", (25, 5))):
        for z in slices:
            page.get_by_role("button", name=f"Next slice with Spleen towards the {way}").click()
            assert at(page, z)
    page.get_by_role("table", name="Measurements").get_by_role("link", name="Liver").click()
    assert at(page, 19) and page.evaluate("document.activeElement.dataset.plane") == "axial"


def test_the_wheel_moves_slices_and_lets_the_page_go_at_the_ends(page):
    slider(page, "axial").fill("2")
    point(page, "axial", (2, 30, 40))
    page.wait_for_timeout(300)
    start = page.evaluate("scrollY")
    page.mouse.wheel(0, -100)
    assert at(page, 3)
    for z in (2, 1, 0):
        page.mouse.wheel(0, 100)
        assert at(page, z)
    page.mouse.wheel(0, 0.5)
    assert page.evaluate("scrollY") == start
    page.mouse.wheel(0, 100)
    page.wait_for_function("start => scrollY > start", arg=start)
    on_its_way = "c => { dispatchEvent(new Event('scroll')); c.dispatchEvent(new WheelEvent('wheel', { deltaY: -50, cancelable: true })); }"
    canvas(page, "axial").evaluate(on_its_way)  # goes on, though the pointer is on the picture
    page.wait_for_timeout(100)
    assert at(page, 0)


def test_sliders_and_their_keys(page):
    slider(page, "axial").focus()
    for key, z in (("Home", 0), ("End", 29), ("ArrowLeft", 28), ("PageDown", 25)):
        page.keyboard.press(key)
        assert at(page, z), key
    assert slider(page, "axial").get_attribute("aria-valuetext") == "Slice 26 of 30, 62.5 mm from the feet end: Spleen"
    slider(page, "coronal").focus()
    page.keyboard.press("Home")
    assert at(page, 25, 0) and slider(page, "coronal").get_attribute("aria-valuetext") == "Row 1 of 60"


def test_help_and_one_large_plane(page):
    page.keyboard.press("?")
    keys = page.get_by_role("dialog", name="Mouse, fingers, keys")
    assert keys.is_visible() and "one organ on or off" in keys.inner_text()
    page.keyboard.press("Escape")
    assert not keys.is_visible()
    page.locator("[data-plane=coronal]").focus()
    page.keyboard.press("m")
    assert canvas(page, "coronal").is_visible() and not canvas(page, "axial").is_visible()
    box = canvas(page, "coronal").bounding_box()
    assert box["width"] > 600
    bars = [page.locator(f"[data-plane={plane}] .bar").inner_text() for plane in ("axial", "coronal")]
    for _ in range(5):
        page.get_by_role("button", name="Larger").click()  # the plane that is seen
    page.wait_for_timeout(60)
    zoomed = [page.locator(f"[data-plane={plane}] .bar").text_content() for plane in ("axial", "coronal")]
    assert zoomed[0] == bars[0] or not bars[0]
    assert int(zoomed[1].split()[0]) < int(bars[1].split()[0])
    page.get_by_role("button", name="Coronal plane large, or all three").click()
    assert canvas(page, "axial").is_visible()


def test_keys_do_not_disturb_typing(page):
    page.get_by_label("level", exact=True).focus()
    page.keyboard.press("o")
    page.keyboard.press("0")
    assert page.get_by_role("checkbox", name="Organs").is_checked() and page.get_by_label("level", exact=True).input_value().endswith("0")


TOUCH = """async ([selector, kind, points]) => {
  const canvas = document.querySelector(selector);
  canvas.setPointerCapture = () => {};
  for (const [type, pointerId, clientX, clientY] of points) {
    canvas.dispatchEvent(new PointerEvent(type, { pointerId, clientX, clientY, pointerType: kind, bubbles: true, button: 0, isPrimary: pointerId === 1 }));
    await new Promise(requestAnimationFrame);
  }
}"""


def test_touch(browser, report):
    "A tap sets the cross, a finger sideways moves through the slices, two fingers zoom; the page scrolls up and down."
    with opened(browser, report, viewport={"width": 390, "height": 844}, has_touch=True) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        slider(page, "axial").fill("10")
        box = canvas(page, "axial").bounding_box()
        x, y = places(page, "axial", [(10, 20, 60)])[0] + [box["x"], box["y"]]
        page.touchscreen.tap(x, y)
        assert at(page, 10, 20, 60)
        touch = lambda *points: page.evaluate(TOUCH, ["[data-plane=axial] canvas", "touch", points])
        step = max(4, box["width"] / 30)
        touch(("pointerdown", 1, x, y), ("pointermove", 1, x + 3 * step, y), ("pointerup", 1, x + 3 * step, y))
        assert at(page, 13, 20, 60)
        wide = page.locator("[data-plane=axial] .bar").inner_text()
        touch(("pointerdown", 1, x - 20, y), ("pointerdown", 2, x + 20, y), ("pointermove", 2, x + 180, y), ("pointermove", 1, x - 180, y),
              ("pointerup", 1, x - 180, y), ("pointerup", 2, x + 180, y))
        page.wait_for_timeout(60)
        assert page.locator("[data-plane=axial] .bar").inner_text() != wide and at(page, 13, 20, 60)
        choose(page, "Distance")
        touch(("pointerdown", 1, x - 20, y), ("pointerdown", 2, x + 20, y), ("pointermove", 2, x + 90, y), ("pointerup", 1, x, y), ("pointerup", 2, x, y))
        assert "mm" not in page.locator("[role=status]").inner_text().split(":")[0].replace("mm from", "")
        choose(page, "Cross")
        assert canvas(page, "axial").evaluate("c => getComputedStyle(c).touchAction") == "pan-y"
        choose(page, "Window")
        assert canvas(page, "axial").evaluate("c => getComputedStyle(c).touchAction") == "none"
        assert seen.problems == []


def test_what_a_screen_reader_finds(page):
    viewer = page.get_by_role("group", name="Slices of the scan")
    assert [s.get_attribute("aria-label") for s in viewer.locator(".slice").all()] == [
        "Slice, from the feet to the head", "Row, from front to back", "Column, from right to left"]
    assert canvas(page, "axial").get_attribute("aria-label") == "axial plane. Slice 14 of 30, 32.5 mm from the feet end: Liver, Left kidney"
    page.get_by_role("button", name="Largest slice with Spleen").click()
    page.wait_for_function("() => document.querySelector('[role=status]').textContent.startsWith('Slice 4 of 30')")
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert headings == ["Please check", "Slices and organs", "Measurements", "About this scan"]
    assert page.get_by_role("note", name="Please check").get_by_role("listitem").all_inner_texts() == [EVIL]
    letters = {p: page.locator(f"[data-plane={p}] .side").all_inner_texts() for p in PLANES}
    assert letters == {"axial": [*"RLAP"], "coronal": [*"RLHF"], "sagittal": [*"APHF"]}
    boxes = [page.locator(f"[data-plane=sagittal] .side.{side}").bounding_box() for side in ("right", "left", "top", "low")]
    stripes = [(s.get_attribute("x"), s.get_attribute("width"), s.get_attribute("fill")) for s in page.locator(".map rect").all()]
    liver, spleen, kidney = (o.color for o in ORGANS[:3])
    assert stripes == [("10", "10", liver), ("3", "3", spleen), ("25", "2", spleen), ("8", "6", kidney)]
    assert boxes[0]["x"] < boxes[2]["x"] < boxes[1]["x"] and boxes[2]["y"] < boxes[0]["y"] < boxes[3]["y"]


def test_the_first_screen_holds_picture_and_organs(page):
    "Each organ with its numbers, what is usual and by whom, and its warnings; the table below has the rest."
    organs = page.get_by_role("table", name="Organs")
    assert organs.bounding_box()["y"] < 400 and canvas(page, "axial").bounding_box()["y"] < 300
    assert organs.get_by_role("rowheader").all_inner_texts() == [o.name for o in ORGANS]
    swatches = organs.locator(".swatch").evaluate_all("s => s.map(e => getComputedStyle(e).backgroundColor)")
    assert swatches == [f"rgb{palette()[o.id]}" for o in ORGANS]
    text = organs.inner_text()
    assert "Kim 2021" in text and "800–2500" in text and "100" in text
    assert text.index("Spleen: two pieces.") > text.index("Spleen") and text.index("Spleen: two pieces.") < text.index("Left kidney")
    assert "Right kidney not found Bowel not looked for" in " ".join(text.split())
    more = page.get_by_role("table", name="Measurements")
    assert more.get_by_role("columnheader").all_inner_texts() == ["organ", "volume, ml", "voxels", "mean, HU", "reaches the edge"]
    assert more.get_by_role("cell", name="not looked for").count() == 4 and more.get_by_role("cell", name="not found").count() == 1


def test_millimetres_decide_the_proportions(page):
    bar = page.locator("[data-plane=axial] .bar")
    one, ten = places(page, "axial", [(0, 0, 0), (0, 0, 20)])
    assert bar.inner_text() == "20 mm" or bar.inner_text() == "10 mm"
    length = int(bar.inner_text().removesuffix(" mm"))
    assert bar.bounding_box()["width"] == pytest.approx((ten - one)[0] * length / 10, abs=1.5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_dark_and_a_telephone(browser, report, scheme):
    with opened(browser, report, viewport={"width": 360, "height": 640}, color_scheme=scheme) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360 and faults(page) == []
        for box in page.locator(".viewer button:visible, .viewer input:visible").all():
            place = box.bounding_box()
            assert place["x"] >= 0 and place["x"] + place["width"] <= 360
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator(".organ[data-id='1']").click()
        for ink in page.locator(".organs button, .bar-of-tools [aria-pressed=false], .where, .readout, .why, .none, .source td, kbd").evaluate_all("e => e.map(e => getComputedStyle(e).color)"):
            assert contrast(*([int(v) for v in re.findall(r"\d+", c)] for c in (ink, paper))) >= 4.5
        assert seen.problems == [] and (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_without_scripts_there_is_a_picture(browser, report):
    with opened(browser, report, java_script_enabled=False) as (page, seen):
        picture = page.locator(".still img")
        picture.scroll_into_view_if_needed()
        assert picture.is_visible() and picture.get_attribute("alt").startswith("Slice 14 of 30")
        assert page.locator(".still").bounding_box()["height"] > 300
        assert page.get_by_text("allow JavaScript").is_visible() and page.locator(".where").inner_text().startswith("Slice 14 of 30")
        assert [page.locator(f"{part}:visible").count() for part in ("canvas", ".viewer input", ".bar-of-tools", ".side")] == [0, 0, 0, 4]
        assert page.get_by_role("table", name="Organs").get_by_role("rowheader").count() == 5
        assert seen.elsewhere == []


def test_paper_shows_the_planes(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert all(canvas(page, plane).is_visible() for plane in PLANES) and page.locator(".where").is_visible()
    assert page.locator(".viewer input:visible, .bar-of-tools:visible").count() == 0
    assert len(page.pdf()) > 10_000


def test_text_from_outside_is_only_text(page):
    assert page.title() == f"Scan {EVIL}" and page.get_by_text(EVIL, exact=True).count() >= 3
    assert page.locator("img[src='x']").count() == 0 and page.locator("script").count() == 2


def test_thinned_and_scaled_down(tmp_path, browser):
    hu, mask = volume()
    path = tmp_path / "small.html"
    write_scan_report(path, "Small", scan(), mask, table(mask), most=10, side=40)
    with opened(browser, path, viewport={"width": 1300, "height": 800}) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        told = page.locator(".omitted").all_inner_texts()
        assert told[0].startswith("Every 3rd slice is shown here, 10 of 30") and told[1].startswith("Slices of 60 × 80 pixels are shown scaled down to 40")
        slider(page, "axial").focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        assert page.locator(".where").inner_text() == "Slice 25 of 30, 60 mm from the feet end: no organ"
        point(page, "axial", (8, 10.5, 20.5))  # between pixels 10 and 11, 20 and 21: of the page's pixels
        x, y, z = (float(v) for v in re.search(r"x (\S+), y (\S+), z (\S+) mm", readout(page)).groups())
        assert (x, y, z) == pytest.approx((-9.75, -79.5, 360), abs=0.11)
        assert readout(page).endswith("slice 25") and seen.problems == []


def test_no_organ_no_spacing_one_slice_and_what_does_not_fit(tmp_path, browser):
    hu, mask = volume()
    path = tmp_path / "empty.html"
    one = from_array(hu[:1], AFFINE, space="LPS", name="one")
    object.__setattr__(one.source, "measured", False)
    write_scan_report(path, "Empty", one, 0 * mask[:1], table(mask)[:0])
    with opened(browser, path) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert page.locator(".where").inner_text() == "Slice 1 of 1: no organ"
        assert page.locator(".bar:visible").count() == 0  # as nobody knows its length
        assert "mm" not in readout(page) and readout(page).endswith("slice 1") and seen.problems == []
    with pytest.raises(ValueError, match="must be the same"):
        write_scan_report(tmp_path / "bad.html", "Bad", scan(), mask[1:], table(mask))
    assert [p.name for p in tmp_path.iterdir()] == ["empty.html"]


def test_the_data_is_one_json_that_html_cannot_end(report):
    "Nothing in the JSON closes the script element early."
    data = re.search(r'<script type="application/json">(.*?)</script>', report.read_text(encoding="utf-8"), re.S)[1]
    assert len(json.loads(data)["hu"]) == 30 and "<" not in data


@pytest.mark.slow
def test_six_hundred_slices_open_in_seconds_and_below_a_gigabyte(browser, tmp_path):
    "Noise as in CT in a body amid air; the memory is that of all the browser's processes, at any time until the volume is there."
    rng, body = np.random.default_rng(0), np.hypot(*np.indices((512, 512)) - 255.5) < 200
    some = [np.where(body, rng.normal(40, 20, body.shape), rng.normal(-1000, 8, body.shape)).astype(np.int16) for _ in range(6)]
    large = from_array(np.stack([some[z % 6] for z in range(600)]), np.diag([1, 1, 1, 1])[[2, 1, 0, 3]], space="LPS", name="large")
    mask = np.broadcast_to((np.hypot(*np.indices((512, 512)) - 200) < 60).astype(np.uint8), large.hu.shape)
    write_scan_report(tmp_path / "page.html", "large", large, mask, table(mask[:1]))
    assert (tmp_path / "page.html").stat().st_size < 60e6
    chromium = [p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()]
    before = sum(p.memory_full_info().uss for p in chromium)
    start, peak = time.perf_counter(), 0
    with opened(browser, tmp_path / "page.html", viewport={"width": 1300, "height": 800}) as (page, seen):
        page.locator("canvas[data-slice]").first.wait_for()
        assert time.perf_counter() - start < 5
        while not page.query_selector(".viewer[data-ready]"):
            assert time.perf_counter() - start < 20
            now = [p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()]
            peak = max(peak, sum(p.memory_full_info().uss for p in now) - before)
            page.wait_for_timeout(100)
        assert 100e6 < peak < 1e9 and seen.problems == []
