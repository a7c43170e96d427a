"An evaluation from the command line: whose grid, which patients, what is left out, and a page that a browser opens."

import ctypes
import json
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from browser import opened
from command import rsna_seg

from rsna_seg.ct.cases import find_source
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.nifti import read_mask
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle, write_mask
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.evaluate import evaluate, score_masks
from rsna_seg.files import ConfigError, DataError, ScanError
from rsna_seg.model import Card, build_model, load_checkpoint, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.scoring.metrics import volume_dice
from rsna_seg.train import TrainConfig, train

SMALL = dict(size=64, batch_size=8, accumulation=1, epochs=2, lr=3e-3, encoder_weights="none", workers=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Patients whose scans are no squares and larger than the network's picture, a run, and masks of another tool."
    folder = tmp_path_factory.mktemp("world")
    write_kaggle(folder / "kaggle", patients=4, size=96, slices=12, seed=3)
    prepare(folder / "kaggle", folder / "data", config=PrepareConfig(size=96, folds=2, jobs=1))
    train(folder / "data", folder / "runs" / "fold1", TrainConfig(**SMALL, fold=1))
    train(folder / "data", folder / "runs" / "fold0", TrainConfig(**SMALL, fold=0))
    for number in range(4):
        hu, mask, affine = render(draw_patient(number), size=64, slices=16)
        write_mask(folder / "true" / f"c{number}.nii", mask, affine)
        write_mask(folder / "tool" / f"c{number}.nii", np.roll(mask, number, axis=2), affine)
        write_mask(folder / "ct" / f"c{number}_0000.nii", hu, affine)
    return folder


def test_scores_are_those_of_the_predicted_masks(world):
    "What `predict` gives for each scan, compared with its mask voxel by voxel, on the scan's own grid."
    checkpoint = world / "runs" / "fold0" / "best_model_512.pth"
    judged = evaluate(checkpoint, world / "data", workers=0, device="cpu").volumes.set_index(["series", "organ"])
    predictor, seen = Predictor(checkpoint, PredictConfig("torch", crop=False)), 0
    for case in find_source(world / "kaggle").cases:
        if case.series in judged.index.get_level_values("series"):
            scan = read_scan(case.scan)
            truth, found = case.mask_on(scan), predictor(scan).mask
            for organ, value in volume_dice(found, truth).items():
                row, seen = judged.loc[(case.series, organ)], seen + 1
                assert row.dice == pytest.approx(value, abs=2e-3, nan_ok=True)
                ml = (scan.slice_ml * (truth == next(o.id for o in ORGANS if o.key == organ)).sum(axis=(1, 2))).sum()
                assert row.truth_ml == pytest.approx(ml, rel=1e-3)
    assert seen == len(judged) > 0


def test_a_grid_that_is_no_square(tmp_path):
    "Padding and scaling of the slices leave no trace in the scores."
    hu, mask, affine = render(draw_patient(1), size=80, slices=10)
    hu, mask = hu[:, 6:66], mask[:, 6:66]
    affine = affine.copy()
    affine[:3, 3] += 6 * affine[:3, 1]
    write_mask(tmp_path / "ct.nii", hu, affine)
    write_mask(tmp_path / "mask.nii", mask, affine)
    torch.manual_seed(0)
    save_checkpoint(build_model(encoder_weights="none"), tmp_path / "net.pth", Card(size=64))
    direct = evaluate(tmp_path / "net.pth", tmp_path / "ct.nii", mask=tmp_path / "mask.nii", device="cpu")
    assert direct.matrix.sum() == mask.size
    for size in (80, 160):
        prepare(tmp_path / "ct.nii", tmp_path / f"data{size}", tmp_path / "mask.nii", PrepareConfig(size=size, valid=0, jobs=1))
        slices = evaluate(tmp_path / "net.pth", tmp_path / f"data{size}", "train", workers=0, device="cpu")
        assert np.array_equal(slices.matrix.sum(axis=1), direct.matrix.sum(axis=1))  # the truth, voxel by voxel
        both = [e.volumes.set_index("organ")[["truth_ml", "dice"]].astype(float) for e in (slices, direct)]
        assert np.allclose(*both, atol=0.02, rtol=1e-3, equal_nan=True)


def test_organs_that_are_not_to_be_judged(world, tmp_path):
    from rsna_seg.ct.cases import SourceConfig

    checkpoint, source = world / "runs" / "fold0" / "best_model_512.pth", SourceConfig(labelled=("liver", "spleen"), all_series=True)
    volumes = evaluate(checkpoint, world / "kaggle", device="cpu", source=source).volumes
    assert set(volumes.organ[volumes.state == "not labelled"]) == {"left_kidney", "right_kidney", "bowel"}
    packed = evaluate(checkpoint, shutil.make_archive(tmp_path / "k", "zip", world / "kaggle"), device="cpu", source=source)
    pd.testing.assert_frame_equal(packed.volumes, volumes)
    assert packed.about["data"]["source"] == str(tmp_path / "k.zip") and packed.skipped.empty
    few = score_masks(world / "tool", world / "true", labelled=("bowel",)).volumes
    assert set(few.organ[few.state != "not labelled"]) == {"bowel"}
    with pytest.raises(DataError, match="such as c0 from which no patient can be read"):
        score_masks(world / "tool", world / "true", pattern=r"(?P<patient>p\d+)_.*")


@pytest.mark.slow
def test_a_cross_validation_judges_everybody_once(world, tmp_path):
    done = rsna_seg("evaluate", world / "runs", world / "data", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    found, manifest = json.loads((tmp_path / "out" / "metrics.json").read_text()), pd.read_csv(world / "data" / "manifest.csv", dtype=str)
    table = pd.read_csv(tmp_path / "out" / "per_volume.csv", dtype={"patient": str, "series": str})
    assert set(table.patient) == set(manifest.patient) and found["patients"] == 4 and found["slices"] == len(manifest)
    assert [m["config"]["fold"] for m in found["models"]] == [0, 1] and found["notes"] == []
    assert found["models"][0]["sha256"] == load_checkpoint(world / "runs" / "fold0" / "best_model_512.pth")[1].sha256
    assert found["data"]["fingerprint"] == json.loads((world / "data" / "dataset.json").read_text())["fingerprint"]
    alone = evaluate(world / "runs" / "fold1", world / "data", workers=0, device="cpu")
    rows = table.merge(alone.volumes, on=["patient", "series", "organ"])
    assert len(rows) == len(alone.volumes) and np.allclose(rows.dice_x, rows.dice_y, atol=2e-3, equal_nan=True)


def test_patients_of_the_training_are_told(world):
    seen = evaluate(world / "runs" / "fold0", world / "data", workers=0, device="cpu", fold=1)
    assert "2 of the 2 patients were in the training" in seen.about["notes"][0]
    assert evaluate(world / "runs" / "fold0", world / "data", workers=0, device="cpu").about["notes"] == []


def test_runs_that_are_no_cross_validation(world, tmp_path):
    shutil.copytree(world / "runs" / "fold0", tmp_path / "runs" / "a")
    shutil.copytree(world / "runs" / "fold0", tmp_path / "runs" / "b")
    with pytest.raises(ConfigError, match="one of several runs with --fold 0"):
        evaluate(tmp_path / "runs", world / "data", workers=0)
    with pytest.raises(ConfigError, match="holds no training run"):
        evaluate(world / "true", world / "data", workers=0)


@pytest.mark.slow
def test_a_corrupt_case_is_left_out_and_told(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    manifest = pd.read_csv(data / "manifest.csv", dtype=str)
    victim = manifest[manifest.fold == "0"].iloc[4]
    (data / victim["mask"]).write_bytes(b"no picture")
    done = rsna_seg("evaluate", world / "runs", data, tmp_path / "out", "--workers", 2)
    assert done.returncode == 1 and f"left out: series {victim.series} of patient {victim.patient}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [s["series"] for s in found["skipped"]] == [victim.series] and victim["mask"] in found["skipped"][0]["reason"]
    whole = evaluate(world / "runs", world / "data", workers=0, device="cpu")
    rest = whole.volumes[whole.volumes.series != victim.series]
    table = pd.read_csv(tmp_path / "out" / "per_volume.csv", dtype={"patient": str, "series": str})
    assert np.allclose(table.dice, rest.dice, atol=2e-3, equal_nan=True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("Left out") < page.index("Judged on") < page.index(victim["mask"].split("/")[-1]) or page.index(victim["mask"]) < page.index("Judged on")


def test_every_case_corrupt(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    for picture in (tmp_path / "data" / "masks").iterdir():
        picture.write_bytes(b"no picture")
    done = rsna_seg("evaluate", world / "runs" / "fold0", tmp_path / "data", tmp_path / "out")
    assert done.returncode == 2 and "Nothing could be judged" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "report.html").exists()


def test_masks_of_another_tool(world, tmp_path):
    tool = tmp_path / "tool"
    shutil.copytree(world / "tool", tool)
    (tool / "c2.nii").write_bytes((tool / "c2.nii").read_bytes()[:900])
    (tool / "c3.nii").unlink()
    done = rsna_seg("score", tool, world / "true", tmp_path / "out", "--scans", world / "ct", "--tolerance", "liver=5")
    assert done.returncode == 1 and "no prediction" in done.stderr and "c2.nii" in done.stderr, done.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [s["patient"] for s in found["skipped"]] == ["c2", "c3"]
    assert found["auc_roc"] is None and found["tolerance_mm"]["liver"] == 5 and found["tolerance_mm"]["bowel"] == 2
    table = pd.read_csv(tmp_path / "out" / "per_volume.csv").set_index(["patient", "organ"])
    truth, guess = (nib.load(f / "c1.nii").get_fdata().astype(int) for f in (world / "true", tool))
    assert table.dice["c1"].to_dict() == pytest.approx(volume_dice(guess, truth), nan_ok=True)
    assert (table.dice["c0"].dropna() == 1).all() and (table.hd95_mm["c0"].dropna() == 0).all()


def test_a_file_for_each_organ(world, tmp_path):
    "As TotalSegmentator leaves them, against one file of labels; bowel is the union of its parts."
    names = {1: ["liver"], 2: ["spleen"], 3: ["kidney_left"], 4: ["kidney_right"], 5: ["colon", "small_bowel", "duodenum"]}
    for number in range(2):
        image = nib.load(world / "true" / f"c{number}.nii")
        mask = image.get_fdata().astype(np.uint8)
        for organ, parts in names.items():
            for i, part in enumerate(parts):
                own = (mask == organ) & (np.arange(mask.shape[2]) % len(parts) == i)
                path = tmp_path / "total" / f"c{number}" / f"{part}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(own.astype(np.uint8), image.affine), path)
    result = score_masks(tmp_path / "total", world / "true")
    assert result.volumes.patient.nunique() == 2 and (result.volumes.dice.dropna() == 1).all()
    assert len(result.skipped) == 2


def test_masks_that_are_no_pairs(world, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(world / "true" / "c0.nii", tmp_path / "a" / "other.nii.gz")
    with pytest.raises(DataError, match="4 true masks and 1 predictions, but none of the same name, such as c0 and other"):
        score_masks(tmp_path / "a", world / "true")
    with pytest.raises(ScanError, match="nothing does not exist"):
        score_masks(tmp_path / "nothing", world / "true")


def test_real_ct_against_itself_moved(real_ct, tmp_path):
    "One real scan, its mask moved by a voxel of 3 mm."
    path = real_ct / "totalseg_example" / "segmentation.nii.gz"
    scan = read_scan(real_ct / "totalseg_example" / "ct.nii.gz")
    mask, image = read_mask(path, scan), nib.load(path)
    (tmp_path / "true").mkdir()
    (tmp_path / "tool").mkdir()
    shutil.copy(path, tmp_path / "true" / "s.nii.gz")
    nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj).astype(np.uint8), 1, axis=0), image.affine), tmp_path / "tool" / "s.nii.gz")
    rows = score_masks(tmp_path / "tool", tmp_path / "true").volumes.set_index("organ")
    assert (rows.hd95_mm <= 3.0001).all() and (rows.hd95_mm > 2.9).all()
    assert (rows.dice > 0.8).all() and (rows.error_ml.abs() < 5).all()
    for o in ORGANS:
        assert rows.truth_ml[o.key] == pytest.approx((mask == o.id).sum() * 0.027, rel=1e-3)


@pytest.fixture(scope="module")
def reports(world, tmp_path_factory):
    "Two tools judged, and compared."
    folder = tmp_path_factory.mktemp("reports")
    for name, moved in (("worse", 2), ("better", 1)):
        for number in range(4):
            image = nib.load(world / "true" / f"c{number}.nii")
            found = np.roll(np.asarray(image.dataobj), moved, axis=0)
            (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(found, image.affine), folder / "masks" / name / f"c{number}.nii")
        done = rsna_seg("score", folder / "masks" / name, world / "true", folder / name, "--scans", world / "ct")
        assert done.returncode == 0, done.stderr
    done = rsna_seg("compare", folder / "worse", folder / "better", folder / "both")
    assert done.returncode == 0, done.stderr
    done = rsna_seg("evaluate", world / "runs", world / "data", folder / "runs", "--workers", 1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_tools_compared(reports):
    found = json.loads((reports / "both" / "metrics.json").read_text())
    row, tables = found["scores"]["dice"]["liver"], [pd.read_csv(reports / n / "per_volume.csv").set_index(["patient", "organ"]) for n in ("worse", "better")]
    differences = (tables[1].dice - tables[0].dice).xs("liver", level="organ")
    assert row["difference"] == pytest.approx(differences.mean()) and row["n"] == 4
    assert row["low"] is None and row["verdict"] == "too few patients to tell"
    assert rsna_seg("compare", reports / "worse", reports / "masks", reports / "x").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs", "better", "both"])
def test_a_browser_opens_the_report(browser, reports, name):
    "Reads the table of cases, sorts it, opens a case; no error, no request to any host."
    with opened(browser, reports / name / "report.html") as (page, seen):
        table = page.get_by_role("table", name=re.compile("Cases"))
        column = next(i for i, h in enumerate(table.get_by_role("columnheader").all_inner_texts()) if "Dice" in h)

        def values():
            rows = table.locator("tbody tr").all()
            return [float(r.locator("th, td").nth(column).inner_text()) for r in rows]

        before = values()
        assert len(before) >= 4
        button = table.get_by_role("columnheader").nth(column).get_by_role("button")
        button.click()
        assert values() == sorted(before)
        button.press("Enter")
        assert values() == sorted(before, reverse=True)
        link = table.get_by_role("link").first
        case = page.locator(f"details[id='{link.get_attribute('href')[1:]}']")
        assert case.get_attribute("open") is None
        link.click()
        assert case.get_attribute("open") is not None
        if name == "both":  # both predictions in one viewer
            assert (reports / name / case.get_by_role("link").last.get_attribute("href")).is_file()
            assert seen.problems == [] and seen.elsewhere == []
            return
        picture = case.locator("img")
        picture.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete && image.naturalWidth > 100", arg=picture.element_handle())
        assert "prediction" in case.inner_text() and picture.get_attribute("alt")
        assert seen.problems == [] and seen.elsewhere == []


IN_USE = """
import ctypes, threading, time
from rsna_seg.app.cli import main

class Heap(ctypes.Structure):  # bytes, as glibc's mallinfo2 counts them
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks mapped usmblks fsmblks used free keepcost".split()]

heap, most = ctypes.CDLL(None).mallinfo2, 0
heap.restype = Heap

def watch():
    global most
    while True:
        most = max(most, heap().used + heap().mapped)
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
try: main()
finally: print("in use:", most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say what is in use")
def test_memory_does_not_grow_with_slices(tmp_path):
    """Of a volume of 2,000 slices of 512 x 512 less than 2 GB is in use; the logits alone of all slices would be 12 GB.

    What the process has of the system is up to glibc, which keeps what was freed between what is in use: 2.3 to 5.5 GB were seen.
    """
    hu, mask, affine = render(draw_patient(1), size=128, slices=40)
    affine = affine @ np.diag([1 / 50, 1 / 4, 1 / 4, 1])
    for name, voxels in (("ct", hu), ("mask", mask)):
        write_mask(tmp_path / f"{name}.nii", voxels.repeat(50, axis=0).repeat(4, axis=1).repeat(4, axis=2), affine)
    prepare(tmp_path / "ct.nii", tmp_path / "data", tmp_path / "mask.nii", PrepareConfig(valid=0))
    write_kaggle(tmp_path / "kaggle", patients=4, size=64, slices=20)
    prepare(tmp_path / "kaggle", tmp_path / "few", config=PrepareConfig(size=64, jobs=1))
    net = train(tmp_path / "few", tmp_path / "run", TrainConfig(**SMALL | {"epochs": 20})).checkpoint
    command = [sys.executable, "-c", IN_USE, "evaluate", net, tmp_path / "data", tmp_path / "report", "--split", "train"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert 0.3e9 < int(re.search(r"in use: (\d+)", done.stdout)[1]) < 2e9
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["slices"] == 2000
