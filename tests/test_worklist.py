"The page of many scans: what it says of each, and that 500 of them stay usable in a browser."

import base64
import time

import numpy as np
import pytest
from browser import faults, opened
from test_report import EVIL

from rsna_seg.app.many import Job, write_index
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.scan import jpeg

OUTPUTS = ("nifti", "report", "volumes")

SORT = """() => {
  const start = performance.now();
  [...document.querySelectorAll("thead button")].find(b => b.innerText.startsWith("Liver, ml")).click();
  document.body.getBoundingClientRect();
  return performance.now() - start;
}"""


def record(name, ml=100.0, texts=(), reason=""):
    noise = np.random.default_rng(len(name)).integers(0, 255, (128, 300, 3), dtype=np.uint8)
    rows = [] if reason else [{"organ": o.key, "ml": ml + o.id, "voxels": 9} for o in ORGANS[:-1]]
    findings = [{"kind": "sides", "organ": "liver", "text": text} for text in texts]
    picture = "" if reason else base64.b64encode(jpeg(noise // 8)).decode()
    return {"name": name, "rows": rows, "findings": findings, "reason": reason, "picture": picture}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "500 scans: every tenth with something to check, 5 that failed."
    out = tmp_path_factory.mktemp("many")
    texts = [("The liver has 90 ml; look at it.", EVIL) if n % 10 == 0 else () for n in range(495)]
    records = [record(f"scan {n}", 1000.0 + n, text) for n, text in enumerate(texts)]
    broken = [record(f"broken {n}", reason=f"{n}.dcm ends too soon {EVIL}.") for n in range(5)]
    return write_index(Job((), str(out), outputs=OUTPUTS), records + broken)


def test_the_most_urgent_come_first_and_names_lead_to_pages(tmp_path):
    waiting = record("d", reason="?") | {"reason": ""}
    records = [record("a"), record("b #1", texts=["Look."]), record("c", reason="No <CT>."), waiting]
    page = write_index(Job((), str(tmp_path), outputs=OUTPUTS), records).read_text()
    places = [page.index(f'data-value="{state}"') for state in ("failed", "not done yet", "to check", "done")]
    assert places == sorted(places)
    assert "Scans: 4; 1 failed, 1 not done yet, 1 to check, 1 done." in page
    assert '<a href="b%20%231/report.html">b #1</a>' in page and "No &lt;CT&gt;." in page
    assert '<a href="a/organs.nii.gz">nifti</a>' in page and "c/organs.nii.gz" not in page
    write_index(Job((), str(tmp_path)), records)
    assert '<a href="a/">a</a>' in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_500_scans_stay_usable(browser, many):
    start = time.perf_counter()
    with opened(browser, many, viewport={"width": 1400, "height": 900}) as (page, seen):
        assert time.perf_counter() - start < 20 and many.stat().st_size < 12e6
        names = lambda: page.locator("tbody tr:not([hidden]) th").all_inner_texts()
        assert len(names()) == 500 and names()[0] == "broken 0" and names()[5] == "scan 0"
        assert page.evaluate(SORT) < 2000 and page.evaluate(SORT) < 2000  # ms; 20 when idle
        assert names()[0] == "scan 494" and names()[-1] == "broken 4"
        find = page.get_by_role("searchbox", name="Find")
        find.fill("scan 12")
        assert names()[0] == "scan 129" and len(names()) == 11
        assert page.locator("output").inner_text() == "11 of 500 rows"
        page.get_by_label("state").select_option("to check")
        assert names() == ["scan 120"]
        page.locator("summary:visible").click()
        assert page.get_by_text("The liver has 90 ml; look at it.").locator("visible=true").count() == 1
        find.fill("")
        page.get_by_label("state").select_option("failed")
        assert sorted(names()) == [f"broken {n}" for n in range(5)]
        assert page.get_by_text("3.dcm ends too soon").is_visible()
        page.get_by_label("state").select_option("")
        assert len(names()) == 500
        assert page.locator("img").first.evaluate("i => i.complete && [i.naturalHeight, i.clientHeight]") == [128, 64]
        assert seen.problems == [] and seen.elsewhere == [] and page.locator("script").count() == 1


@pytest.mark.slow
def test_a_telephone_and_a_screen_reader(browser, many):
    with opened(browser, many, viewport={"width": 390, "height": 844}, color_scheme="dark") as (page, seen):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_role("searchbox", name="Find").fill("scan 12")
        assert faults(page) == [] and seen.problems == []
        page.emulate_media(media="print")  # buttons lose their words where a table begins on the next page
        assert page.locator("thead button").first.evaluate("b => getComputedStyle(b).display") == "contents"
