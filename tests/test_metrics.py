"The numbers of an evaluation are those of scikit-learn and MONAI on the same arrays, real CT and adversarial ones."

import json
from functools import cache

import numpy as np
import pytest
import torch
from monai.metrics import ConfusionMatrixMetric, compute_average_surface_distance, compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from scipy.special import expit, softmax
from sklearn import metrics as sk

from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.nifti import read_mask
from rsna_seg.ct.organs import CLASSES, ORGANS
from rsna_seg.files import ConfigError
from rsna_seg.report.comparison import write_comparison
from rsna_seg.report.evaluation import write_evaluation
from rsna_seg.scoring.compare import compare
from rsna_seg.scoring.judge import Judge, Spacing, VolumeTally
from rsna_seg.scoring.metrics import (
    METRICS, Confusion, Metric, Outcome, RocHistogram, ScoreHistogram, class_outcomes, dice,
    slice_confusions, volume_dice,
)  # fmt: skip
from rsna_seg.scoring.surfaces import SurfaceTally, tolerances

CHANCE = dict(tiny=0, noise=1, blocks=2)


def iou(matrix):
    return METRICS["iou"].of(class_outcomes(matrix))


@pytest.fixture(scope="module")
def torso(real_ct):
    "A real torso's mask, and the same with a tenth of the voxels moved and some organs partly lost."
    scan = read_scan(real_ct / "totalseg_example" / "ct.nii.gz")
    truth = read_mask(real_ct / "totalseg_example" / "segmentation.nii.gz", scan)
    rng = np.random.default_rng(0)
    guess = np.roll(truth, (1, 2, -1), (0, 1, 2))
    guess[(guess == 4) & (np.arange(len(guess)) % 3 == 0)[:, None, None]] = 3
    return truth, np.where(rng.random(truth.shape) < 0.01, 1, guess).astype(np.uint8), scan


def arrays(kind):
    rng = np.random.default_rng(CHANCE[kind])
    if kind == "tiny":
        return np.array([[[0, 1, 1, 2, 5]]]), np.array([[[0, 1, 2, 2, 5]]])
    truth = rng.integers(0, 6, (3, 40, 40))
    if kind == "blocks":
        truth = np.kron(rng.integers(0, 6, (3, 8, 8)), np.ones((1, 5, 5), int))
    return truth, np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 6, truth.shape))


def check_counts(truth, guess):
    "Confusion, Dice and IoU against both libraries, exactly."
    counts = Confusion()
    counts.update(guess.astype(np.uint8), truth.astype(np.uint8))
    matrix = counts.matrix()
    assert np.array_equal(matrix, sk.confusion_matrix(truth.ravel(), guess.ravel(), labels=range(6)))
    assert np.array_equal(slice_confusions(torch.tensor(guess), torch.tensor(truth)).sum(0), matrix)
    shown = np.flatnonzero(matrix.sum(1))
    assert np.allclose(dice(matrix)[shown], sk.f1_score(truth.ravel(), guess.ravel(), labels=shown, average=None), atol=1e-15, rtol=0)
    assert np.allclose(iou(matrix)[shown], sk.jaccard_score(truth.ravel(), guess.ravel(), labels=shown, average=None), atol=1e-15, rtol=0)
    hot = [torch.nn.functional.one_hot(torch.tensor(a).long(), 6).movedim(-1, 0)[None] for a in (guess, truth)]
    for ours, theirs in ((dice, compute_dice), (iou, compute_iou)):
        expected = theirs(*hot, include_background=True)[0].numpy()  # float32
        assert np.array_equal(ours(matrix)[shown].astype(np.float32), expected[shown])
        assert np.isnan(expected[matrix.sum(1) == 0]).all() and np.isnan(ours(matrix)[matrix.sum(1) == 0]).all()
    metric = ConfusionMatrixMetric(include_background=True, metric_name="sensitivity")
    metric(*hot)
    tp, fp, tn, fn = metric.get_buffer()[0].T.numpy()
    assert np.array_equal(tp, matrix.diagonal()) and np.array_equal(fp + tp, matrix.sum(0)) and np.array_equal(fn + tp, matrix.sum(1))


@pytest.mark.parametrize("kind", CHANCE)
def test_counts_are_the_libraries(kind):
    check_counts(*arrays(kind))


def test_counts_are_the_libraries_on_real_ct(torso):
    truth, guess, _ = torso
    check_counts(truth.astype(int), guess.astype(int))
    values = volume_dice(guess, truth)
    assert list(values.values()) == pytest.approx(sk.f1_score(truth.ravel(), guess.ravel(), labels=range(1, 6), average=None), abs=1e-12)


@pytest.mark.parametrize("slab", [1, 5, 16, 1000])
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (5.0, 0.7, 0.9)])
def test_surfaces_are_monais(torso, slab, spacing):
    truth, guess = torso[0][30:90], torso[1][30:90]
    tally = SurfaceTally(spacing)
    for z in range(0, len(truth), slab):
        tally.add(guess[z : z + slab], truth[z : z + slab])
    tolerance = {o.key: float(o.id - 1) for o in ORGANS}  # that of the liver is 0: only what touches counts
    found, compared = tally.distances(), 0
    for o in ORGANS:
        p, t = (torch.from_numpy(m == o.id)[None, None].float() for m in (guess, truth))
        if not p.any() or not t.any():
            continue
        compared += 1
        outcome = Outcome(1, 1, 1, distances=found[o.key], tolerance_mm=tolerance[o.key])
        hd95, asd, nsd = (METRICS[key].of(outcome) for key in ("hd95_mm", "asd_mm", "nsd"))
        assert hd95 == pytest.approx(compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing).item(), abs=1e-4)
        assert asd == pytest.approx(compute_average_surface_distance(p, t, include_background=True, symmetric=True, spacing=spacing).item(), abs=1e-4)
        theirs = compute_surface_dice(p, t, [tolerance[o.key]], include_background=True, spacing=spacing, use_subvoxels=True).item()
        assert nsd == pytest.approx(theirs, abs=1e-5)
    assert compared == 5


def test_a_volume_on_its_own_grid(torso):
    "Millilitres of a real scan, by its own voxels and spacing."
    truth, guess, scan = torso
    tally = VolumeTally([o.key for o in ORGANS], Spacing(*scan.spacing[1:], scan.slice_mm, scan.positions), {"bowel": 4})
    for z in np.split(np.arange(len(truth)), range(16, len(truth), 16)):
        tally.add(torch.from_numpy(guess[z]), torch.from_numpy(truth[z]))
    rows = tally.rows().set_index("organ")
    voxel = np.prod(scan.spacing) / 1000
    for o in ORGANS:
        assert rows.truth_ml[o.key] == pytest.approx((truth == o.id).sum() * voxel, rel=1e-4)
        assert rows.error_ml[o.key] == pytest.approx(((guess == o.id).sum() - (truth == o.id).sum()) * voxel, rel=1e-3, abs=1e-3)
        assert rows.dice[o.key] == pytest.approx(volume_dice(guess, truth)[o.key])


@cache
def distributions():
    "Scores and truths that networks give, and that break naive histograms."
    rng = np.random.default_rng(0)
    n = 200_000
    positive = rng.random(n) < 0.03
    noise = rng.normal(positive, 1)
    rare = np.zeros(1_000_000, bool)
    rare[[123_456]] = True
    wide = rng.normal(size=len(rare))
    return {
        "trained": (expit(noise * 6 - 10), positive),
        "untrained": (1 / 6 + noise * 0.01, positive),
        "all ties": (np.full(n, 1 / 6), positive),
        "two values": (np.where(noise > 0, 0.25, 0.125), positive),
        "near zero": (np.exp(noise - 60), positive),
        "below the smallest normal": (np.exp(noise - 95), positive),
        "near one": (1 - np.exp(-noise - 11), positive),
        "zeros and ones": (noise > 0, positive),
        "prevalence 1e-6, untrained": (1 / 6 + wide * 0.01, rare),
        "prevalence 1e-6, trained": (expit(wide * 6 - 10), rare),
        "prevalence 1e-6, one crowd": (0.5 + wide * 1e-6, rare),
        "within 1e-4 of a half": (0.5 + noise * 1e-4, positive),
        "first here then there": (np.where(np.arange(n) < n / 2, 0.5 + noise * 1e-4, 0.1 + noise * 1e-3), positive),
        "sorted": (np.sort(1 / 6 + noise * 0.01), np.sort(positive)),
        "uniform": (rng.random(n), positive),
    }  # fmt: skip


@pytest.mark.parametrize("batches", [1, 7, 200])
@pytest.mark.parametrize("name", distributions())
def test_area_is_scikit_learns(name, batches):
    scores, positive = distributions()[name]
    scores, histogram = scores.astype(np.float32), ScoreHistogram()
    for part in np.array_split(np.arange(len(scores)), batches):
        histogram.update(torch.from_numpy(scores[part]), torch.from_numpy(positive[part]))
    area, bound = histogram.area()
    error = abs(area - sk.roc_auc_score(positive, scores))
    assert error <= bound + 1e-9
    assert error < {"trained": 1e-4, "untrained": 1e-4, "uniform": 1e-4, "prevalence 1e-6, one crowd": 1}.get(name, 1e-3)
    assert histogram.counts.sum(0).tolist() == [(~positive).sum(), positive.sum()]
    fpr, tpr = histogram.curve()
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all() and fpr[-1] == tpr[-1] == 1


def test_areas_of_a_network_on_real_ct(real_ct):
    "An untrained network's probabilities of real slices, six classes, many batches."
    import cv2

    from rsna_seg.model import as_input, build_model

    torch.manual_seed(0)
    model, roc, kept = build_model(encoder_weights="none").eval(), RocHistogram(), []
    files = sorted((real_ct / "curvas_png" / "images").glob("*.png"))[::12]
    for file in files:
        image, mask = (cv2.resize(cv2.imread(str(f), 0), (128, 128), interpolation=cv2.INTER_NEAREST) for f in (file, file.parents[1] / "masks" / file.name))
        with torch.inference_mode():
            p = model(as_input(torch.from_numpy(image)[None])).softmax(1)
        roc.update(p, torch.from_numpy(mask)[None])
        kept.append((p.movedim(1, -1).reshape(-1, 6).numpy(), mask.ravel()))
    scores, truth = (np.concatenate(parts) for parts in zip(*kept))
    for c in CLASSES:
        if (truth == c.id).any():
            assert roc.auc()[c.id] == pytest.approx(sk.roc_auc_score(truth == c.id, scores[:, c.id]), abs=1e-4)
    assert np.isfinite(roc.auc()).sum() >= 4


def test_memory_of_the_histogram_is_bounded():
    "However many pixels there are."
    rng, histogram = np.random.default_rng(0), ScoreHistogram()
    for step in range(60):
        scores = softmax(rng.normal(0, 1 + step, (20_000, 6)).astype(np.float32), axis=1)[:, 0]
        histogram.update(torch.from_numpy(scores), torch.from_numpy(rng.integers(0, 2, len(scores))))
    assert histogram.counts.nbytes < 5e6


def test_tolerances_of_the_organs_and_others():
    assert tolerances() == {o.key: o.tolerance_mm for o in ORGANS}
    assert tolerances({"bowel": 4}) == {o.key: 4 if o.key == "bowel" else o.tolerance_mm for o in ORGANS}
    assert set(tolerances(3).values()) == {3}
    for wrong in ({"heart": 2}, -1, float("nan")):
        with pytest.raises(ConfigError):
            tolerances(wrong)


@pytest.fixture
def sensitivity(monkeypatch):
    "A tenth metric, as somebody would add it."
    definition = "the share of the true organ that was found."
    metric = Metric("sensitivity", "sensitivity", lambda o: o.right / o.true, definition, digits=2, counts=True, first=True)
    monkeypatch.setitem(METRICS, "sensitivity", metric)
    return metric


def test_a_metric_is_one_entry_of_one_table(sensitivity, tmp_path):
    "It is in the tables, in metrics.json, on the page with its definition, and in a comparison."
    rng, found = np.random.default_rng(0), {}
    for name, kept in (("careless", 0.6), ("careful", 0.9)):
        judge = Judge([o.key for o in ORGANS], probabilities=False)
        for patient in range(3):
            truth = rng.integers(0, 6, (4, 24, 24)).astype(np.uint8)
            guess = np.where(rng.random(truth.shape) < kept, truth, 0).astype(np.uint8)
            with judge.volume(f"p{patient}", "1", Spacing(1, 1, np.full(4, 2.0))) as case:
                case.add(range(4), torch.from_numpy(guess), torch.from_numpy(truth))
        found[name] = judge.result({"models": [], "part": "all cases", "data": {}})
        page = write_evaluation(found[name], tmp_path / name).read_text()
        assert sensitivity.definition in page
        rng = np.random.default_rng(0)
    volumes = found["careful"].volumes
    share = sum(found["careful"].matrix.diagonal()[1:]) / found["careful"].matrix[1:].sum()
    assert volumes.sensitivity.mean() == pytest.approx(share, abs=0.01) == pytest.approx(0.9, abs=0.03)
    numbers = json.loads((tmp_path / "careful" / "metrics.json").read_text())
    assert numbers["mean_over_patients"]["sensitivity"]["liver"]["n"] == 3
    assert numbers["pooled"]["liver"]["sensitivity"] == pytest.approx(numbers["levels"]["sensitivity"]["liver"]["pooled pixels"])
    assert "sensitivity_liver" in (tmp_path / "careful" / "per_slice.csv").read_text()
    result = compare(tmp_path / "careless", tmp_path / "careful")
    assert result.tables["sensitivity"].loc["liver", "difference"] == pytest.approx(0.3, abs=0.05)
    page = write_comparison(result, tmp_path / "both").read_text()
    assert sensitivity.definition in page and (tmp_path / "both" / "difference_sensitivity.png").exists()
    assert "sensitivity" in json.loads((tmp_path / "both" / "metrics.json").read_text())["scores"]


def test_a_report_older_than_a_metric(sensitivity, monkeypatch, tmp_path):
    "What only the new report knows is not compared."
    mask = torch.arange(6).repeat(2, 6, 1).byte()
    for name in ("new", "old"):
        if name == "old":
            monkeypatch.delitem(METRICS, "sensitivity")
        judge = Judge([o.key for o in ORGANS], probabilities=False)
        with judge.volume("p", "1") as case:
            case.add(range(2), mask, mask)
        write_evaluation(judge.result({"models": [], "part": "all cases", "data": {}}), tmp_path / name)
    monkeypatch.setitem(METRICS, "sensitivity", sensitivity)
    assert {"dice", "sensitivity"} & compare(tmp_path / "old", tmp_path / "new").tables.keys() == {"dice"}
