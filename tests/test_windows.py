"The window of PNG: told, or estimated, or said to be unknown; carried to the network, and compared there."

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from rsna_seg.anatomy.inspect import inspect_data
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.inputs import read_input
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle
from rsna_seg.ct.png import find_landmarks, judge_window
from rsna_seg.ct.scan import window
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.files import ConfigError, DataError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import Card, build_model, load_checkpoint, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.report.dataset import write_quality
from rsna_seg.train import TrainConfig, train

WINDOWS = {"50/400": (50, 400), "0..255": (127.5, 255), "-500..800": (150, 1300), "air": (0, 2048), "lung": (-600, 1500)}
ONE_EPOCH = {"size": 64, "batch_size": 8, "accumulation": 1, "epochs": 1, "mixed_precision": "no", "workers": 0}
LIVER = PrepareConfig(size=128, labelled=("liver",), valid=0.5, jobs=1)


def judged(grey, given=None):
    return judge_window(find_landmarks(np.bincount(np.ravel(grey), minlength=256)), given)


def write_pairs(folder, volumes, level, width):
    "PNG pairs of volumes of HU; the masks show a bright half as liver."
    for patient, hu in enumerate(volumes):
        for z, plane in enumerate(hu):
            for kind, pixels in (("images", window(plane, level, width)), ("masks", (plane > 30).astype(np.uint8))):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / kind / f"p{patient}_1_{z:03d}.png"), pixels)
    return folder


@pytest.fixture(scope="module")
def bodies():
    return [render(draw_patient(seed), size=128, slices=10)[0] for seed in range(2)]


@pytest.fixture(scope="module")
def torso(real_ct):
    return read_scan(real_ct / "totalseg_example" / "ct.nii.gz").hu[::3]


def error(found, level, width):
    "The larger of the errors of black and white, as a share of the width."
    return (abs(found.level - level) + abs(found.width - width) / 2) / width


@pytest.mark.parametrize("name", WINDOWS)
def test_real_torso_in_known_windows(torso, name):
    grey = window(torso, *WINDOWS[name])
    found = judged(grey)
    if name == "0..255":  # fat is black: no more than a usual window can be assumed
        assert found[:3] == (127.5, 255, "assumed")
    else:
        assert found.sure == "estimated" and error(found, *WINDOWS[name]) < 0.25
    assert judged(grey, WINDOWS[name]) == (*WINDOWS[name], "known", "")
    if name != "50/400":
        assert "cannot be level 50, width 400" in judged(grey, (50, 400)).note


@pytest.mark.parametrize("name, sure", [
    ("curvas_png", (127.5, 255, "assumed")), ("msd_liver_slices", (127.5, 255, "assumed")),
    ("msd_spleen_slices", (127.5, 255, "assumed")), ("kits19_kidney_slices", (127.5, 255, "assumed")),
    ("chaos_ct_liver_slices", (50, 400, "estimated")),
])  # fmt: skip
def test_public_sets(real_ct, name, sure):
    files = sorted((real_ct / name / "images").rglob("*.png"))
    grey = np.concatenate([cv2.imread(str(file), 0).ravel() for file in files[:: 1 + len(files) // 60]])
    assert judged(grey)[:3] == sure
    noted = judged(grey, (50, 400)).note != ""
    assert noted == (name not in ("chaos_ct_liver_slices", "msd_liver_slices"))  # whose tissue is liver, 97 HU


@pytest.mark.parametrize("name", WINDOWS)
def test_phantoms(name):
    "Each patient alone; a note on the right window is a false alarm, none on 50/400 a miss."
    alarms = misses = 0
    for seed in range(20, 40):
        grey = window(render(draw_patient(seed), size=96, slices=8)[0], *WINDOWS[name])
        found = judged(grey)
        alarms += judged(grey, WINDOWS[name]).note != ""
        misses += name != "50/400" and judged(grey, (50, 400)).note == ""
        assert found.sure == "assumed" if name == "0..255" else error(found, *WINDOWS[name]) < 0.25
    assert alarms <= 1 and misses <= 2


def test_empty_and_odd_pictures():
    for grey in (np.zeros(100, np.uint8), np.full(100, 255, np.uint8), np.arange(256, dtype=np.uint8)):
        assert judged(grey)[:3] == (50, 400, "assumed") and judged(grey, (40, 80))[:3] == (40, 80, "known")


def test_prepare_says_what_it_believes(bodies, tmp_path):
    source = write_pairs(tmp_path / "source", bodies, 150, 1300)
    data = prepare(source, tmp_path / "unknown", config=LIVER)
    info = json.loads((data.folder / "dataset.json").read_text())
    assert info["level"] is info["width"] is info["window_of_png"] is None
    assert data.window.sure == "estimated" and error(data.window, 150, 1300) < 0.25
    assert info["notes"][-1] == data.window.note and "is not known; by soft tissue at grey" in data.window.note
    assert prepare(source, tmp_path / "unknown", config=LIVER).info == info
    small = prepare(source, tmp_path / "small", config=replace(LIVER, size=64))
    assert small.window == data.window  # of the source's pictures, not of the shrunk ones
    assert judge_window(find_landmarks(small.grey_counts)) == small.window  # so the page shows what it says
    told = prepare(source, tmp_path / "told", config=replace(LIVER, window_of_png=(150, 1300)))
    assert told.window == (150, 1300, "known", "") and told.info["notes"] == []
    wrong = prepare(source, tmp_path / "wrong", config=replace(LIVER, window_of_png=(50, 400)))
    assert wrong.window.sure == "known" and "cannot be level 50, width 400" in wrong.info["notes"][-1]
    with pytest.raises(DataError, match="window_of_png"):
        prepare(source, tmp_path / "told", config=LIVER)
    with pytest.raises(DataError, match="--window-of-png LEVEL WIDTH"):
        prepare(source, tmp_path / "never", config=replace(LIVER, level=150, width=1300))
    assert not (tmp_path / "never").exists()
    quality = inspect_data(data.folder, jobs=1)
    page = write_quality(quality).read_text()
    assert data.window.note in str(quality) and "estimated" in page and "Window" in page


@pytest.mark.parametrize("level, width, known", [(50, 400, False), (-600, 1500, True)])
def test_older_folders(bodies, tmp_path, level, width, known):
    "They said 50/400 where nothing was told, so that only another window was told."
    data = prepare(write_pairs(tmp_path / "source", bodies, level, width), tmp_path / "data", config=LIVER)
    older = {**data.info, "level": float(level), "width": float(width)}
    del older["window_of_png"], older["window"]
    (data.folder / "dataset.json").write_text(json.dumps(older))
    assert open_data(data.folder).window[:3] == (level, width, "known" if known else "estimated")


@pytest.fixture(scope="module")
def sets(bodies, tmp_path_factory):
    "Datasets: PNG in a wide window, known and unknown; the network that each gives."
    folder = tmp_path_factory.mktemp("sets")
    source = write_pairs(folder / "source", bodies, 150, 1300)
    prepare(source, folder / "unknown", config=LIVER)
    prepare(source, folder / "wide", config=replace(LIVER, window_of_png=(150, 1300)))
    write_kaggle(folder / "kaggle", 2, size=64, slices=4)
    prepare(folder / "kaggle", folder / "hu", config=PrepareConfig(size=64, valid=0.5, jobs=1))
    for name in ("unknown", "wide", "hu"):
        train(folder / name, folder / f"{name}_run", TrainConfig(encoder_weights="none", **ONE_EPOCH))
    return folder


def test_the_card_carries_it(sets):
    cards = {name: load_checkpoint(sets / f"{name}_run" / "best_model_512.pth")[1] for name in ("unknown", "wide", "hu")}
    assert (cards["hu"].level, cards["hu"].width, cards["hu"].window) == (50, 400, "known")
    assert (cards["wide"].level, cards["wide"].width, cards["wide"].window) == (150, 1300, "known")
    guess = open_data(sets / "unknown").window
    assert (cards["unknown"].level, cards["unknown"].width, cards["unknown"].window) == guess[:3]
    assert any(guess.note in note for note in cards["unknown"].notes)
    assert cards["hu"].notes == cards["wide"].notes == []


def checkpoint(sets, name):
    return sets / f"{name}_run" / "best_model_512.pth"


def test_evaluate_maps_and_notes(sets):
    how = {"workers": 0, "device": "cpu"}
    [note] = evaluate(checkpoint(sets, "hu"), sets / "wide", **how).about["notes"]
    assert note == "wide: its window, level 150, width 1300 (known), is brought to level 50, width 400; it shows nothing beyond -500 to 800 HU."
    for model, data in (("hu", "unknown"), ("unknown", "hu")):
        notes = evaluate(checkpoint(sets, model), sets / data, **how).about["notes"]
        assert any("(estimated)" in note and "the scores say nothing" in note for note in notes)
    assert not any("window" in n for n in evaluate(checkpoint(sets, "hu"), sets / "hu", **how).about["notes"])


def test_predict_refuses_or_notes(sets, bodies, tmp_path):
    narrow = write_pairs(tmp_path / "narrow", bodies[:1], 127.5, 255) / "images"
    wide = write_pairs(tmp_path / "wide", bodies[:1], 150, 1300) / "images"
    predictor = Predictor(checkpoint(sets, "hu"), PredictConfig("torch"))
    assert any("cannot be level 50, width 400" in note for note in predictor(wide).notes)
    right = Predictor(checkpoint(sets, "hu"), PredictConfig("torch", window_of_png=(150, 1300)))
    result = right(wide)
    assert not any("window" in note and "grey" in note for note in result.notes)
    hu = read_input(wide, None, None, 150, 1300).hu
    assert np.abs(hu - bodies[0]).max(where=np.abs(bodies[0] - 50) < 200, initial=0) <= 3  # in 255 steps of 5 HU
    with pytest.raises(ConfigError, match="lack 150 HU of the network's level 50, width 400"):
        Predictor(checkpoint(sets, "hu"), PredictConfig("torch", window_of_png=(127.5, 255)))
    guessed = Predictor(checkpoint(sets, "unknown"), PredictConfig("torch"))
    scan = next((sets / "kaggle" / "train_images").glob("*/*"))
    assert any("is not known; by soft tissue" in note for note in guessed(scan).notes)
    assert narrow.is_dir()


def test_finetuning_in_another_window_is_said(sets, tmp_path, capsys):
    finetune(checkpoint(sets, "hu"), sets / "wide", tmp_path / "run", FinetuneConfig(**ONE_EPOCH))
    assert "level 50, width 400" in capsys.readouterr().out


def test_cards_of_older_versions(tmp_path):
    "Without a spacing they were of PNG pairs, whose window nobody had asked for."
    net = build_model(encoder_weights="none")
    for spacing, sure in (([], "assumed"), ([[1, 1, 1], [2, 1, 1]], "known")):
        save_checkpoint(net, tmp_path / "w.pth", Card(dataset="1", spacing=spacing))
        card = json.loads((tmp_path / "w.json").read_text())
        del card["window"]
        torch.save(net.state_dict(), tmp_path / "w.pth")
        (tmp_path / "w.json").write_text(json.dumps({**card, "sha256": ""}))
        assert load_checkpoint(tmp_path / "w.pth")[1].window == sure
