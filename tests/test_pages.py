"The pages of an evaluation, of a comparison and of a dataset, as a browser shows them from a disk."

import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from browser import faults, opened
from test_viewer import at

from rsna_seg.anatomy.inspect import inspect_data
from rsna_seg.ct.organs import ALL_ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle
from rsna_seg.ct.scan import window
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.report.cases import case_drawer
from rsna_seg.report.comparison import write_comparison
from rsna_seg.report.dataset import write_quality
from rsna_seg.report.evaluation import write_evaluation
from rsna_seg.scoring.compare import compare
from rsna_seg.scoring.judge import Judge, Spacing
from rsna_seg.scoring.metrics import METRICS

pytestmark = pytest.mark.slow
SPACING, PATIENTS = Spacing(5.0, 5.0, np.full(12, 20.0)), 11  # as many rows have a search field
NAMES = "the_first_of_two_networks", "a_refined_network"
NOTES = ["PNGs: the window is assumed.", "the window is assumed."]


def evaluation(folder, shift, patients):
    "Predictions are the truth, moved a little; of the last patient, slice 6 lacks the liver."
    judge = Judge(ALL_ORGANS, probabilities=False, draw=case_drawer(folder / "cases"))
    bodies = [render(draw_patient(seed), size=64, slices=12)[:2] for seed in (0, 1)]
    for number in range(patients):
        hu, truth = bodies[number % 2]
        found = np.roll(truth, shift + number % 3, 2)
        if number == PATIENTS - 1:
            found[6:7][truth[6:7] == 1] = 0
        with judge.volume(f"p{number}", "liver", SPACING) as case:
            case.add(np.arange(12), *map(torch.from_numpy, (found, truth)), window(hu))
    about = {"part": "all", "notes": NOTES, "models": [], "data": {"kind": ["PNG pairs", "DICOM"]}}
    return write_evaluation(judge.result(about, folder / "cases"), folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    evaluation(out / "old", 0, patients=4)
    made = {"new": evaluation(out / "new", 1, PATIENTS)}
    write_kaggle(out / "kaggle", patients=4, size=64, slices=12)
    prepare(out / "kaggle", out / "data", config=PrepareConfig(size=64, jobs=1))
    made["dataset"] = write_quality(inspect_data(out / "data", jobs=1), out / "quality")
    made["comparison"] = write_comparison(compare(out / "old", out / "new", NAMES), out / "both")
    return made


@pytest.mark.parametrize("name", ["new", "comparison", "dataset"])
@pytest.mark.parametrize("scheme, width", [("light", 1300), ("dark", 360)])
def test_light_dark_and_a_telephone(browser, pages, name, scheme, width):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with opened(browser, pages[name], **options) as (page, seen):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert faults(page) == [] and seen.problems == [] and seen.elsewhere == []
        for one in page.locator("th .swatch:visible").all()[:20]:  # on the line of its name
            assert one.locator("xpath=..").bounding_box()["height"] < 30
        button = page.locator("figure .enlarge").first
        picture = page.locator("figure img").first.bounding_box()
        box = button.bounding_box()  # hides nothing of the picture
        assert box["y"] >= picture["y"] + picture["height"] or box["x"] >= picture["x"] + picture["width"]


@pytest.mark.parametrize("name", ["new", "comparison"])
def test_numbers_have_the_digits_of_their_metric(browser, pages, name):
    "A mean is written in as many as a case."
    with opened(browser, pages[name]) as (page, _):
        tables = page.locator("table").evaluate_all("""tables => tables.map(t =>
            [...t.rows].map(row => [...row.cells].map(cell => cell.textContent.trim())))""")
    checked = set()
    for heads, *rows in tables:
        for column, head in enumerate(heads):
            for m in (m for m in METRICS.values() if head.rstrip("↕ ").endswith(m.name)):
                numbers = re.findall(r"\d+\.?(\d*)", " ".join(r[column] for r in rows if "—" not in r[column]))
                assert {len(digits) for digits in numbers} <= {m.digits}, (head, rows)
                checked |= {m.key} if numbers else set()
    assert {"dice", "hd95_mm"} <= checked or name == "comparison"


def test_from_the_worst_case_to_its_worst_slice(browser, pages):
    with opened(browser, pages["new"], viewport={"width": 1300, "height": 800}) as (page, seen):
        text = page.locator("main").inner_text()
        assert page.locator(".summary").inner_text().count("window is assumed") == 1
        assert "Kind: PNG pairs, DICOM" in text
        cases = page.get_by_role("table", name=re.compile("^Cases"))
        names = lambda: cases.locator("tbody tr:visible th").all_inner_texts()
        assert len(names()) == PATIENTS
        page.get_by_role("searchbox", name="Find").fill("P10")
        assert names() == ["p10 / liver"]
        assert page.locator("output").first.inner_text() == f"1 of {PATIENTS} rows"
        cases.get_by_role("link", name="p10 / liver").click()
        part = page.locator("details[open]")
        enlarge = part.get_by_role("button", name=re.compile("^Enlarge"))
        for close in ("Escape", "Close"):
            enlarge.press("Enter")
            large = page.get_by_role("dialog").get_by_role("img")
            assert large.is_visible()
            if close == "Escape":
                page.keyboard.press(close)
            else:
                page.get_by_role("button", name=close).click()
            assert not page.get_by_role("dialog").is_visible()
            assert enlarge.evaluate("b => b === document.activeElement")
        part.locator("img").click()
        assert page.get_by_role("dialog").is_visible()
        page.keyboard.press("Escape")
        slices = pd.read_csv(pages["new"].parent / "per_slice.csv").query("patient == 'p10'")
        part.get_by_role("link").click()
        page.locator(".viewer[data-ready]").wait_for()
        assert at(page, int(slices.z[slices.pixel_accuracy.idxmin()]))
        assert seen.problems == [] and seen.elsewhere == []


def test_largest_slices_on_demand(browser, pages):
    with opened(browser, pages["dataset"]) as (page, seen):
        part = page.locator("details").first
        boxes = [page.locator("details").nth(k).bounding_box() for k in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side while closed
        picture = part.locator("img")
        assert not picture.is_visible()
        page.get_by_role("table", name="Every series").get_by_role("link").first.click()
        page.wait_for_function("i => i.complete && i.naturalWidth > 400", arg=picture.element_handle())
        assert picture.is_visible() and "Where each organ is largest: liver z " in part.inner_text()
        assert seen.problems == [] and seen.elsewhere == []


@pytest.mark.parametrize("width", [1300, 390])
def test_two_models_beside_the_viewer(browser, pages, width):
    "Long names do not widen the page, and no text lies on another in the planes."
    case = next((pages["comparison"].parent / "cases").glob("*.html"))
    with opened(browser, case, viewport={"width": width, "height": 800}) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for plane in page.locator(".plane").all():
            texts = [text.bounding_box() for text in plane.locator("span:visible").all()]
            apart = lambda a, b: a["x"] + a["width"] <= b["x"] or a["y"] + a["height"] <= b["y"]
            for a, b in combinations([t for t in texts if t["width"]], 2):
                assert apart(a, b) or apart(b, a), (a, b)
        assert faults(page) == [] and seen.problems == []
