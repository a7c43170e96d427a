"What is claimed about models: intervals that hold, winners that are none by chance, one number everywhere, and no NaN."

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from rsna_seg.app.commands import Compare, Score
from rsna_seg.ct.organs import ALL_ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_mask
from rsna_seg.files import DataError
from rsna_seg.report.comparison import _sentences, differences_figure
from rsna_seg.report.evaluation import write_evaluation
from rsna_seg.scoring.compare import compare
from rsna_seg.scoring.intervals import MEAN, VERDICTS, compare_patients, holm, mean_interval, sign_flips, subset_means
from rsna_seg.scoring.judge import Judge, Spacing, metrics

TOO_FEW, UNSURE = VERDICTS[3], VERDICTS[2]
CHAPTERS = sorted((Path(__file__).resolve().parents[1] / "nbs").glob("0[02-6]_*.ipynb"))


def cells_of(chapter):
    "Kind, source, and what is shown (texts, names of other forms) of each cell that a reader sees."
    for cell in json.loads(chapter.read_text())["cells"]:
        source, outputs = "".join(cell["source"]), cell.get("outputs", [])
        texts = ["".join(o.get("text", []) or o.get("data", {}).get("text/plain", [])) for o in outputs]
        pictures = sum("image/" in " ".join(o.get("data", {})) or "data:image" in str(o.get("data", {}).get("text/html")) for o in outputs)
        if not source.startswith("#| hide"):
            yield cell["cell_type"], source, "\n".join(texts), pictures


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_shows_before_it_defines(chapter):
    "What one has at the end and how long it takes, a picture, and at most four definitions in a row."
    cells = list(cells_of(chapter))
    first_export = next(i for i, (_, source, *_) in enumerate(cells) if re.match(r"#\| export\s+(@|def |class )", source))
    opening = cells[:first_export]
    prose = [source for kind, source, *_ in opening if kind == "markdown"]
    assert "colab-badge" in prose[1] and "\n" not in prose[1]
    assert "The page takes" in prose[2] and any(pictures for *_, pictures in opening)
    row = 0
    for kind, source, *_ in cells:
        if kind == "code":
            row = row + len(re.findall(r"(?m)^(?:def|class) ", source)) if source.startswith("#| export") else 0
            assert row <= 4, source
            assert all(len(line) <= 100 for line in source.splitlines()), source


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_score_in_the_prose_is_one_that_the_page_shows(chapter):
    cells = list(cells_of(chapter))
    shown = "\n".join(source + text for kind, source, text, _ in cells if kind == "code")
    for kind, source, *_ in cells:
        if kind == "markdown" and "benchmarks/" not in source and "ImageNet's own mean" not in source:
            for number in re.findall(r"(?<![\d.,])0\.\d\d+(?!\d)", re.sub(r"`[^`]*`", "", source)):
                assert number in shown, (number, source)


def judged(patients, kept, seed=0, labelled=ALL_ORGANS):
    "A result on noise: of each patient's organs about the share `kept` is found."
    rng, judge = np.random.default_rng(seed), Judge(labelled, probabilities=False)
    for patient in range(patients):
        truth = np.random.default_rng(patient).choice([0, *(1 + ALL_ORGANS.index(key) for key in labelled)], (4, 16, 16)).astype(np.uint8)
        found = np.where(rng.random(truth.shape) < kept + 0.002 * patient, truth, 0).astype(np.uint8)
        with judge.volume(f"p{patient}", "1", Spacing(1, 1, np.full(4, 2.0), np.arange(4) * 2.0)) as case:
            case.add(range(4), torch.from_numpy(found), torch.from_numpy(truth))
    return judge.result({"models": [], "part": "all cases", "notes": [], "data": {}})


def reports(folder, patients, **how):
    "Report folders, as far as a comparison reads them, of a model that finds 60 % and of one that finds 90 %."
    for name, kept in (("rough", 0.6), ("fine", 0.9)):
        result = judged(patients, kept, **how)
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.json").write_text(json.dumps(metrics(result)))
        result.volumes.to_csv(folder / name / "per_volume.csv", index=False)
        result.slices.to_csv(folder / name / "per_slice.csv", index=False)
    return compare(folder / "rough", folder / "fine")


def whiskers(figure):
    "Ends of the whiskers that a comparison's figure shows, by organ."
    lines = figure.axes[0].lines[::2]
    return dict(zip(ALL_ORGANS, ([float(x) for x in line.get_xdata()] for line in lines)))


@pytest.mark.parametrize("patients", [1, 2, 3, 5, 6, 7, 8, 10])
def test_one_rule_for_headline_table_and_picture(tmp_path, patients):
    "An obvious winner is called one when the patients are enough: at 6 for the mean, at 8 for each of five organs."
    result = reports(tmp_path, patients)
    mean = "fine is better" if patients >= 6 else TOO_FEW
    each = "fine is better" if patients >= 8 else TOO_FEW
    assert result.shown().verdict[MEAN] == mean and set(result.shown().verdict.drop(MEAN)) == {each}
    assert set(result.shown("hd95_mm").verdict.drop(MEAN)) <= {each, TOO_FEW, UNSURE}
    text = _sentences(result)
    organs = "liver, spleen, left kidney, right kidney and bowel."
    assert f": {mean}" in text[1]
    assert text[2:] == [f"{each} by more than chance in: {organs}" if patients >= 8 else f"{TOO_FEW.capitalize()} in: {organs}"]
    drawn = whiskers(differences_figure(result))
    assert all((low > 0) == (patients >= 8) and np.isnan(low) == (patients < 8) for low, _ in drawn.values())
    words = f"{text} {result!r} {result._repr_html_()} {differences_figure(result).axes[0].get_xlabel()}"
    assert "nan" not in words.lower() and (("interval" in words) == (patients >= 6))


def test_a_single_organ_needs_fewer_patients(tmp_path):
    result = reports(tmp_path, 6, labelled=["liver"])
    assert result.shown().verdict["liver"] == result.shown().verdict[MEAN] == "fine is better"
    assert result.shown().verdict["bowel"] == "" and "nan" not in repr(result).lower()


def test_the_winner_of_a_score_that_should_be_small():
    a = pd.DataFrame({key: np.linspace(2, 3, 9) for key in ALL_ORGANS})
    assert set(compare_patients(a, a - 1).verdict) == {"lower"} and set(compare_patients(a, a + 1).verdict) == {"higher"}
    assert set(compare_patients(a, a).verdict) == {UNSURE} and (compare_patients(a, a).p == 1).all()


@pytest.mark.parametrize("values", ["normal", "rounded", "zeros"])
def test_p_is_that_of_scipy_and_the_interval_agrees(values):
    rng = np.random.default_rng(0)
    for n in (2, 5, 6, 8, 11):
        gains = {"normal": rng.normal(0.5, 1, n), "rounded": rng.integers(-2, 4, n) / 100, "zeros": np.zeros(n)}[values]
        means = subset_means(gains)
        expected = stats.permutation_test((gains,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flips(means)[0] == pytest.approx(expected.pvalue)
        for level in (0.05, 0.01, 0.3):
            p, low, high = sign_flips(means, level)
            assert (low > 0 or high < 0) == (p <= level) and np.isnan(low) == (2 / 2**n > level)


def test_a_model_is_not_compared_with_itself(tmp_path):
    reports(tmp_path, 2)
    for pair, names in (("rough rough".split(), None), ("rough fine".split(), ("net", "net"))):
        with pytest.raises(DataError, match="Both models are called"):
            compare(*(tmp_path / name for name in pair), names)


def test_holm():
    p = pd.Series([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p).fillna(-1).tolist() == pytest.approx([0.03, 0.06, -1, 0.06, 0.02])
    assert holm(pd.Series([0.5, 0.9])).tolist() == [1, 1]


@pytest.mark.parametrize("n", [2, 5, 8, 20, 60])
def test_equal_models_have_no_winner(n):
    "In at most 5 % of comparisons for an organ, and at most 5 % for any of five; three standard errors of grace."
    rng = np.random.default_rng(n)
    scores = np.where(rng.random((2, 5, n, 500)) < 0.05, 0, 1 - rng.beta(1.2, 20, (2, 5, n, 500)))
    p = np.array([sign_flips(subset_means(gains))[0] for gains in scores[1] - scores[0]])
    assert (p <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / p.size)
    claims = [holm(pd.Series(five)).min() <= 0.05 for five in p.T]
    assert np.mean(claims) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)


@pytest.mark.parametrize("failures", [0, 0.05, 0.2])
@pytest.mark.parametrize("n", [2, 5, 13, 50])
def test_the_interval_holds_the_true_mean(n, failures):
    "At least 93 % of the time, also where no patient shows that others fail."
    rng, truth = np.random.default_rng(n), (1 - failures) * (1 - 1.2 / 21.2)
    studies = np.where(rng.random((120, n)) < failures, 0, 1 - rng.beta(1.2, 20, (120, n)))
    ends = np.array([mean_interval(study)[1:] for study in studies])
    assert ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean() >= 0.93
    assert (0 <= ends).all() and (ends <= 1).all()


def test_one_patient_has_no_interval_and_no_word_of_one(tmp_path, capsys):
    "In the notebook, on the command line and on both pages."
    result = judged(1, 0.9)
    page = write_evaluation(result, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    Compare(tmp_path / "a", tmp_path / "b", tmp_path / "both").run()
    pages = [p.read_text() for p in (page, tmp_path / "both" / "report.html")]
    plain = [re.sub(r"(?s)<script.*?</script>|<style.*?</style>|base64,[^\"]*", "", text) for text in pages]
    for words in (repr(result), result._repr_html_(), capsys.readouterr().out, *plain):
        assert MEAN in words.lower() and not re.search(r"\bnan\b|95 % from|nterval", words)


def test_one_number_everywhere(tmp_path, capsys):
    "The mean over patients, of whom one has two scans, in the notebook, on the command line, on the page and in the JSON."
    for name, moved in (("p0_a", 0), ("p0_b", 4), ("p1_a", 1)):
        _, mask, affine = render(draw_patient(int(name[1])), size=48, slices=10)
        write_mask(tmp_path / "true" / f"{name}.nii", mask, affine)
        write_mask(tmp_path / "tool" / f"{name}.nii", np.roll(mask, moved, axis=2), affine)
    score = dict(predicted=tmp_path / "tool", truth=tmp_path / "true", pattern=r"(?P<patient>p\d)_.*")
    Score(**score, out=tmp_path / "out").run()
    printed = capsys.readouterr().out
    volumes = pd.read_csv(tmp_path / "out" / "per_volume.csv")
    dice = volumes.groupby(["organ", "patient"]).dice.mean().groupby("organ").mean().mean()
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    number = f"{dice:.3f}"
    assert found["mean_over_patients"]["dice"][MEAN]["mean"] == pytest.approx(dice)
    assert number != f"{volumes.groupby('organ').dice.mean().mean():.3f}"  # the mean over volumes
    row = next(line for line in printed.splitlines() if line.startswith(MEAN)).removeprefix(MEAN).split()
    pooled = f"{found['levels']['dice'][MEAN]['pooled pixels']:.3f}"
    assert row[0] == number and row[-1] == pooled != number
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"over patients: {number} (" in page and f"of pooled pixels {pooled}" in page
