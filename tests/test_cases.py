"The pages of judged cases: which there are, what they hold, and the viewer with prediction, truth and errors."

import numpy as np
import pytest
import torch
from browser import faults, opened
from test_viewer import at, canvas, pixels, point, readout, table  # noqa: F401

from rsna_seg.ct.organs import ALL_ORGANS, ORGANS, palette
from rsna_seg.report import cases
from rsna_seg.report.cases import case_data, case_drawer, join_cases, write_case
from rsna_seg.scoring.judge import CaseSlices, Judge, Spacing

SHAPE = (30, 60, 80)  # as in test_viewer, whose millimetres hold here


def masks(wrong_slice=20, missed=True):
    "A liver; of the prediction one slice lacks it, and on another there is a spleen too much."
    truth = np.zeros(SHAPE, np.uint8)
    truth[5:25, 10:40, 10:40] = 1
    predicted = truth.copy()
    predicted[wrong_slice, 10:40, 10:30] = 0 if missed else 2
    predicted[9, 45:55, 50:70] = 2
    return truth, predicted


def judged(draw, name="p", **how):
    "A volume, given to the drawer of a judge."
    truth, predicted = masks(**how)
    judge = Judge(ALL_ORGANS, probabilities=False, draw=draw)
    greys = np.broadcast_to(np.arange(80, dtype=np.uint8) * 3, SHAPE)
    with judge.volume(name, "s", Spacing(1.0, 0.5, np.full(30, 2.5))) as volume:
        for z in np.split(np.arange(30), 3):
            volume.add(z, torch.from_numpy(predicted[z]), torch.from_numpy(truth[z]), greys[z])


def test_a_long_volume_is_kept_evenly_and_with_its_worst_slice():
    case, plane = CaseSlices("long", [], limit=5), np.zeros((2, 2), np.uint8)
    for z in range(97):
        case.add([z + 1], None, [plane], [plane], [int(z == 37)])
    kept = case.spread()
    assert 5 <= len(kept) <= 10 and 37 in kept and kept[37][3] == 38
    assert np.ptp(np.diff([*kept])) <= 2 * case.every


def test_only_the_worst_volumes_keep_a_page(tmp_path, monkeypatch):
    "And no page of an earlier run stays beside them."
    monkeypatch.setattr(cases, "MOST_CASES", 2)
    monkeypatch.setattr(cases, "_draw_case", lambda *_: None)
    (tmp_path / "best_s.html").write_text("of another model")
    draw, rows = case_drawer(tmp_path), []
    for name, part in (("good", 2), ("bad", 15), ("best", 1), ("middle", 8)):
        truth, predicted = masks()
        predicted[5 : 5 + part] = 0
        judge = Judge(["liver"], probabilities=False, draw=draw)
        with judge.volume(name, "s") as volume:
            volume.add(np.arange(30), torch.from_numpy(predicted), torch.from_numpy(truth))
        rows.append(judge.done[0][0].dice.mean())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad_s.html", "middle_s.html"]
    assert rows[1] < rows[3] < rows[0] < rows[2]


def test_two_pages_become_one_on_the_slices_that_both_have(tmp_path):
    kept, paths = [], [tmp_path / "a.html", tmp_path / "b.html"]
    judged(kept.append)
    judged(kept.append, wrong_slice=12)
    a, b = map(case_data, kept)
    b |= {k: b[k][1:] for k in ("ranks", "hu", "labels", "texts")}
    b |= {"others": [b["others"][0][1:]], "start": [9, 0, 0]}
    for path, data, case in zip(paths, (a, b), kept):
        write_case(path, data, case.rows)
    both = join_cases(*paths, ("old", "new"))
    assert both["ranks"] == a["ranks"][1:] and both["masks"] == ["old", "new", "Truth"]
    assert both["texts"][both["start"][0]] == "z 12"  # as wrong as z 20, and the first of them
    assert join_cases(paths[0], tmp_path / "none.html", ("old", "new")) is None


@pytest.fixture(scope="module")
def page_of_case(tmp_path_factory):
    kept, folder = [], tmp_path_factory.mktemp("case")
    judged(kept.append)
    write_case(folder / "p.html", case_data(kept[0]), kept[0].rows)
    return folder / "p.html"


@pytest.mark.slow
def test_a_case_opens_at_its_worst_slice_and_blinks(browser, page_of_case):
    truth, predicted = masks()
    with opened(browser, page_of_case, viewport={"width": 1300, "height": 800}) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert at(page, 20)
        page.keyboard.press("x")
        spots = [(20, 15, 20), (20, 15, 35), (20, 50, 60)]  # missed, found, background
        tint = lambda: np.ptp(pixels(page, "axial", spots), axis=1) > 8
        assert tint().tolist() == [False, True, False]
        page.get_by_role("button", name="Truth").click()
        assert tint().tolist() == [True, True, False]
        page.keyboard.press("t")
        assert tint().tolist() == [False, True, False]
        page.get_by_role("checkbox", name="Errors").check()
        assert tint().tolist() == [True, False, False]
        liver = np.abs(pixels(page, "axial", spots[:1]) - palette()[1]).max()
        assert liver < 12  # the missed part in full colour
        point(page, "axial", spots[0])
        assert readout(page) == "60 grey · Prediction: no organ · Truth: Liver · slice 20"
        page.get_by_role("button", name="Slice 9, 100 % of Spleen wrong").click()
        assert at(page, 9)
        page.get_by_role("button", name="Blink").click()
        page.wait_for_function("() => document.querySelector('[data-mask=\"1\"]').ariaPressed === 'true'")
        page.wait_for_function("() => document.querySelector('[data-mask=\"0\"]').ariaPressed === 'true'")
        page.keyboard.press("v")
        organs = page.get_by_role("table", name="Organs")
        dice = 2 * (truth & predicted == 1).sum() / ((truth == 1).sum() + (predicted == 1).sum())
        assert f"{dice:.3f}" in organs.inner_text() and "Most wrong on" in organs.inner_text()
        assert organs.get_by_role("rowheader").all_inner_texts() == [o.name for o in ORGANS]
        assert faults(page) == []
        assert seen.problems == [] and seen.elsewhere == []


@pytest.mark.slow
def test_a_case_on_a_telephone_in_the_dark(browser, page_of_case):
    options = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with opened(browser, page_of_case, **options) as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert canvas(page, "axial").bounding_box()["height"] > 200
        assert faults(page) == [] and seen.problems == []
