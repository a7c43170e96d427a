"Every kind of finding where it belongs, and none on good scans; facts against plain numpy."

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rsna_seg.anatomy.checks import KINDS, check_organs, check_segmentation
from rsna_seg.anatomy.measure import organ_facts
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.nifti import read_mask
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_series
from rsna_seg.ct.scan import Grid, Scan
from rsna_seg.ct.store import open_data
from rsna_seg.model import Card, build_model, load_checkpoint
from rsna_seg.predict import Segmentation
from rsna_seg.train import TrainConfig, _keep

SOLID = ("liver", "spleen", "left_kidney", "right_kidney")


def as_scan(hu, affine, positions=None):
    "A scan of voxels in memory, its source in RAS order."
    positions = affine[2, 3] + affine[2, 0] * np.arange(len(hu)) if positions is None else positions
    source = Grid(Path("made"), hu.shape[::-1], np.diag([-1, -1, 1, 1]) @ affine[:, [2, 1, 0, 3]])
    return Scan(hu, affine, source, np.asarray(positions, float), "made")


@pytest.fixture(scope="module")
def patient():
    "A whole and healthy patient: the scan and the true mask."
    hu, mask, affine = render(draw_patient(5), size=320, slices=40)
    return as_scan(hu, affine), mask


def found(mask, scan, **how):
    "Kinds and organs of the findings; each text is one sentence."
    findings = check_segmentation(mask, scan, **how)
    assert all(f.kind in KINDS and f.text.endswith(".") and "\n" not in f.text and ". " not in f.text for f in findings)
    return [(f.kind, f.organ) for f in findings]


def kinds(*given, **how):
    return {kind for kind, _ in found(*given, **how)}


def without(mask, *organs):
    return np.where(np.isin(mask, organs), 0, mask).astype(np.uint8)


def test_a_good_scan_has_no_finding(patient):
    scan, mask = patient
    assert found(mask, scan) == [("cut_off", "bowel")]  # the phantom ends above the pelvis
    assert found(mask, scan, taught=SOLID) == []
    assert found(mask, scan, taught=SOLID, trained=(7, (380, 440))) == []


@pytest.mark.parametrize("seed", [0, 1, 6, 7, 8])
def test_good_scans_in_every_phase_have_no_finding(seed):
    hu, mask, affine = render(draw_patient(seed), size=296, slices=30)
    assert found(mask, as_scan(hu, affine), taught=SOLID) == []


@pytest.mark.parametrize("seed, missing", [(2, "left_kidney"), (3, "spleen"), (10, "right_kidney")])
def test_a_missing_organ(seed, missing):
    hu, mask, affine = render(draw_patient(seed), size=296, slices=30)
    scan = as_scan(hu, affine)
    assert found(mask, scan, taught=SOLID) == [("missing", missing)]
    assert found(mask, scan, taught=[key for key in SOLID if key != missing]) == []


def test_organs_that_are_cut_off(patient):
    scan, mask = patient
    top = slice(0, 26)
    half = replace(scan, hu=scan.hu[top], positions=scan.positions[top])
    assert {("cut_off", "liver"), ("cut_off", "spleen")} <= set(found(mask[top], half))
    column = int(np.argwhere(mask == 1)[:, 2].min()) + 12  # the image's border runs through the liver
    narrow = replace(scan, hu=scan.hu[..., column:])
    assert found(mask[..., column:], narrow, taught=SOLID) == [("cut_off", "liver")]
    assert organ_facts(mask[..., column:], narrow).edges["liver"] == "right side"


def test_stray_voxels_on_an_edge_do_not_cut_an_organ_off(patient):
    scan, mask = patient
    for edge in np.s_[-1, 150:160, 150:160], np.s_[0, 150:160, 150:160], np.s_[10:20, :2, 150:160]:
        stray = mask.copy()
        stray[edge] = 1  # 1.5 to 2.4 cm2 of a liver's cross-section of more than 100
        assert organ_facts(stray, scan).edges["liver"] == ""
    stray[-1, 120:190, 120:190] = 1
    assert organ_facts(stray, scan).edges["liver"] == "head end"


def test_an_organ_counts_as_cut_off_once_a_few_percent_are_lost(patient):
    scan, mask = patient
    whole = organ_facts(mask, scan).ml
    cuts = [slice(0, top) for top in range(14, 40)] + [slice(bottom, None) for bottom in range(1, 26)]
    for z in cuts:
        part = organ_facts(mask[z], replace(scan, hu=scan.hu[z], positions=scan.positions[z]))
        for organ in SOLID:
            lost = 1 - part.ml[organ] / whole[organ]
            if lost < 0.005 or lost > 0.1:
                assert bool(part.edges[organ]) == (lost > 0.1 and part.ml[organ] > 0), (z, organ, lost)


@pytest.mark.parametrize("fill, edges", [(-2000, "field of view"), (40, "")])
def test_the_round_field_of_view(patient, fill, edges):
    scan, mask = patient
    size = mask.shape[1]
    away = np.hypot(*(np.indices(mask.shape[1:]) - (size - 1) / 2))
    hu, blob = scan.hu.copy(), np.zeros_like(mask)
    hu[:, away > size / 2] = fill
    blob[10:20, 38:58, 40:60] = 2  # on the circle, far from the border
    blob[:, away > size / 2] = 0
    assert organ_facts(blob, replace(scan, hu=hu)).edges["spleen"] == edges


def test_volumes_that_cannot_be(patient):
    scan, mask = patient
    large = replace(scan, affine=scan.affine @ np.diag([1, 1.2, 1.2, 1]))
    assert ("volume", "left_kidney") not in found(mask, scan)
    assert found(without(mask, 5), large, taught=SOLID) == []  # 280 ml of kidney: large, not impossible
    larger = replace(scan, affine=scan.affine @ np.diag([1, 1.2, 1.2, 1]) @ np.diag([1, 1.001, 1, 1]), positions=scan.positions * 1.6)
    assert ("volume", "left_kidney") in found(mask, larger)
    lobe = without(mask, 1)
    lobe[20:24][mask[20:24] == 1] = 1
    texts = [f.text for f in check_segmentation(lobe, scan) if (f.kind, f.organ) == ("volume", "liver")]
    assert len(texts) == 1 and "Kim 2021" in texts[0] and "adults" in texts[0] and "800 to 2500 ml" in texts[0]


def test_contradictory_sides(patient):
    scan, mask = patient
    mirrored = np.ascontiguousarray(mask[..., ::-1])
    assert found(mirrored, replace(scan, hu=scan.hu[..., ::-1]), taught=SOLID) == [("sides", "liver")]
    exchanged = np.array([0, 1, 2, 4, 3, 5], np.uint8)[mask]
    assert found(exchanged, scan, taught=SOLID) == [("sides", "right_kidney")]
    half = mask.copy()
    half[:15][half[:15] == 3] = 4
    assert ("piece_side", "right_kidney") in found(half, scan, taught=SOLID)
    assert not {"sides", "piece_side"} & kinds(half, scan, taught=("liver", "spleen"))


@pytest.mark.parametrize("axis, ends", [(0, "head to feet"), (1, "front to back")])
def test_organs_upside_down_or_back_to_front(patient, axis, ends):
    scan, mask = patient
    turned_mask = np.ascontiguousarray(np.flip(mask, axis))
    findings = [f for f in check_segmentation(turned_mask, scan) if f.kind == "order"]
    assert len(findings) == 1 and ends in findings[0].text
    few = replace(scan, hu=scan.hu[18:22], positions=scan.positions[18:22])
    assert "order" not in kinds(turned_mask[18:22], few)


def test_the_body_s_middle_need_not_be_in_the_picture(patient):
    scan, mask = patient
    left_half = slice(mask.shape[2] // 2 - 40, None)
    half = replace(scan, hu=scan.hu[..., left_half])
    assert "sides" not in kinds(mask[..., left_half], half)


@pytest.mark.parametrize("side, found_kinds", [(0.3, []), (-0.02, []), (-0.3, ["sides"])])
def test_an_organ_without_its_opposite_is_held_to_the_body_s_middle(patient, side, found_kinds):
    scan, mask = patient
    spleen = organ_facts(mask, scan).loc[["spleen"]].assign(side=side)
    assert [f.kind for f in check_organs(spleen, 40)] == found_kinds


def test_scans_of_other_parts_of_the_body(patient):
    scan, mask = patient
    assert found(np.zeros_like(mask), scan) == [("no_organs", "")]
    crumbs = np.zeros_like(mask)
    crumbs[20, 100:140, 100:140], crumbs[20, 200:205, 200:205] = 1, 5
    assert found(crumbs, scan) == [("no_organs", "")]
    rows, cols = np.indices(mask.shape[1:]) - 160
    head, chest = (np.full(mask.shape, -1000, np.int16) for _ in range(2))
    head[:, (rows / 75) ** 2 + (cols / 60) ** 2 < 1] = 40  # 220 cm2
    chest[:, (rows / 90) ** 2 + (cols / 130) ** 2 < 1] = 40
    chest[:, (rows / 70) ** 2 + ((np.abs(cols) - 60) / 45) ** 2 < 1] = -850
    for hu in (head, chest):
        assert kinds(np.zeros_like(mask), replace(scan, hu=hu)) == {"content", "no_organs"}
    assert found(without(mask, 1, 2, 3, 4), scan, taught=("bowel",)) == [("cut_off", "bowel")]


def test_few_slices_and_a_short_scan(patient):
    scan, mask = patient
    part = lambda which: (mask[which], replace(scan, hu=scan.hu[which], positions=scan.positions[which]))
    assert {"few_slices", "short_scan"} <= kinds(*part(slice(10, 19)))
    assert {"few_slices", "short_scan"} & kinds(*part(slice(10, 25))) == {"short_scan"}
    every_fifth = kinds(*part(slice(0, 40, 5)))
    assert {"few_slices", "spacing"} <= every_fifth and "short_scan" not in every_fifth


RECIPE = 5, (350, 450)  # mm in training: between slices, field of view


@pytest.mark.parametrize("factors, trained, what", [
    ((1, 1, 1), None, ""), ((1, 1, 1), RECIPE, ""), ((1, 1.1, 1.1), RECIPE, ""), ((1.5, 1, 1), RECIPE, ""),
    ((0.2, 1, 1), RECIPE, ""), ((1, 1.4, 1.4), RECIPE, "field of view is 558 mm"), ((1, 0.7, 0.7), RECIPE, "field of view is 279 mm"),
    ((1, 1.4, 1.4), None, ""), ((2.54,) * 3, None, "field of view"), ((0.1,) * 3, None, "field of view"),
    ((2, 1, 1), RECIPE, "slices are 12.1 mm apart"), ((2, 1, 1), None, "slices are 12.1 mm apart"),
], ids=str)  # fmt: skip
def test_spacing(patient, factors, trained, what):
    scan, mask = patient
    other = replace(scan, affine=scan.affine @ np.diag([*factors, 1]), positions=scan.positions * factors[0])
    texts = [f.text for f in check_segmentation(mask, other, trained=trained) if f.kind == "spacing"]
    assert len(texts) == bool(what) and what in "".join(texts)
    assert all(("in training" in text) == (trained is not None) for text in texts)


@pytest.mark.parametrize("size", [64, 256, 512])
@pytest.mark.parametrize("pixels", [96, 320])
def test_a_scan_like_those_of_training_has_no_odd_spacing(patient, size, pixels):
    "Whatever the network's size and the scan's pixels, the same patient in the same field of view is usual."
    scan, mask = patient
    step = 320 / pixels
    at = (np.arange(pixels) * step).astype(int)
    other = replace(scan, hu=scan.hu[:, at][..., at], affine=scan.affine @ np.diag([1, step, step, 1]))
    pixel = 400 / size
    card = Card(size=size, spacing=[[5, pixel, pixel], [6, pixel, pixel]], versions={})
    findings = lambda scan: {f.kind for f in Segmentation(mask[:, at][..., at], scan, card).findings}
    assert "spacing" not in findings(other)
    assert "spacing" in findings(replace(other, affine=other.affine @ np.diag([1, 1.5, 1.5, 1])))


def test_the_card_knows_the_network_s_pixels_when_it_trains_at_another_size(example, tmp_path):
    data = open_data(example.data)
    loop = SimpleNamespace(judged=build_model(encoder_weights="none"), taught=list(SOLID))
    scores = {"valid_dice": 0.5, "valid_dice_spleen": np.nan, "train_dice": 0.9}
    fields = {}
    for size in (64, 96):
        config = TrainConfig(size=size)
        _keep(tmp_path, loop, data, config, [scores])
        card = load_checkpoint(tmp_path / config.checkpoint)[1]
        assert card.metrics == {"valid_dice": 0.5}
        fields[size] = np.array(card.spacing)[:, 1:] * size
    pixels = data.part("train")[["row_mm", "col_mm"]]
    np.testing.assert_allclose(fields[96], [pixels.min() * 96, pixels.max() * 96], rtol=1e-4)
    np.testing.assert_allclose(fields[64], fields[96], rtol=1e-4)


def turned(degrees):
    "A rotation about the patient's left-right axis, 4x4."
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])


def test_scans_along_the_body(patient, tmp_path):
    scan, mask = patient
    lean = lambda degrees: kinds(mask, replace(scan, affine=turned(degrees) @ scan.affine))
    assert "not_axial" not in lean(20) and "not_axial" in lean(38)
    oblong = replace(scan, affine=scan.affine @ np.diag([1, 3, 1, 1]))
    assert "not_axial" in kinds(mask, oblong)
    hu, affine = scan.hu[::2, ::8, ::8], scan.affine @ np.diag([2, 8, 8, 1])
    axial = read_scan(write_series(tmp_path / "axial", hu, affine))
    coronal = read_scan(write_series(tmp_path / "coronal", hu.swapaxes(0, 1), affine[:, [1, 0, 2, 3]]))
    np.testing.assert_array_equal(axial.hu, coronal.hu)
    assert ["not_axial" in kinds(mask[::2, ::8, ::8], s) for s in (axial, coronal)] == [False, True]


def test_values_that_are_no_hounsfield_units(patient):
    scan, mask = patient
    raw = (scan.hu + np.int16(1024)).clip(0)
    picture = (np.clip(scan.hu, -150, 250) + 150).astype(np.int16)
    clipped = np.clip(scan.hu, -150, 250)
    shifted = [scan.hu + np.int16(by) for by in (-1024, -500, -100, 100, 500)]
    for hu in (raw, picture, clipped, *shifted):
        assert found(mask, replace(scan, hu=hu), taught=SOLID) == [("hu_scale", "")]


def test_values_that_are_hounsfield_units(patient):
    "Padding, a calibration a little off, a scan inside the body and a metal implant are no other scale."
    scan, mask = patient
    away = np.hypot(*(np.indices(mask.shape[1:]) - 159.5)) > 158
    padded, metal = scan.hu.copy(), scan.hu.copy()
    padded[:, away], metal[20:24, 150:170, 150:170] = -3024, 3071
    for hu in (padded, padded.clip(-2000), metal, scan.hu + np.int16(20), scan.hu - np.int16(24)):
        assert "hu_scale" not in kinds(mask, replace(scan, hu=hu))
    inside = np.s_[:, 110:210, 90:230]
    assert "hu_scale" not in kinds(mask[inside], replace(scan, hu=scan.hu[inside]))


def test_pictures_show_a_window_by_nature(patient):
    scan, mask = patient
    pictures = replace(scan, hu=np.clip(scan.hu, -150, 250), source=replace(scan.source, pictures=("a.png",)))
    assert found(mask, pictures, taught=SOLID) == []


def test_crumbs_of_an_organ_are_none(patient):
    scan, mask = patient
    for rows, text in ((5, "Hardly any spleen (0 ml)"), (30, "Hardly any spleen (8 ml)")):
        crumbs = without(mask, 2)
        crumbs[20, 170 : 170 + rows, 200 : 200 + rows] = 2
        findings = check_segmentation(crumbs, scan, SOLID)
        assert [(f.kind, f.organ) for f in findings] == [("missing", "spleen")] and text in findings[0].text
    unmeasured = replace(scan, source=replace(scan.source, measured=False))
    assert found(without(mask, 2), unmeasured, taught=SOLID) == [("no_spacing", ""), ("missing", "spleen")]


masks = arrays(np.uint8, (5, 9, 9), elements=st.sampled_from([0, 0, 0, 1, 2, 5]))
gaps = st.lists(st.floats(0.5, 20), min_size=4, max_size=4)


@given(masks, gaps, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_facts_are_those_of_numpy_at_the_true_positions(mask, gaps, seed):
    rng, positions = np.random.default_rng(seed), 7 + np.r_[0, np.cumsum(gaps)]
    hu = rng.integers(-1000, 1500, mask.shape).astype(np.int16)
    affine = np.array([[0, 0, 0.8, -30], [0, 0.7, 0, 12], [np.ptp(positions) / 4, 0, 0, 7], [0, 0, 0, 1]])
    scan = as_scan(hu, affine, positions)
    facts = organ_facts(mask, scan)
    for organ in ORGANS:
        at, fact = np.argwhere(mask == organ.id), facts.loc[organ.key]
        voxel = scan.slice_ml[at[:, 0]]
        assert fact.voxels == len(at) and fact.ml == pytest.approx(voxel.sum())
        if not len(at):
            assert np.isnan(fact[["mean_hu", "x_mm", "y_mm", "z_mm"]].astype(float)).all() and fact.edges == ""
            continue
        assert fact.mean_hu == pytest.approx(hu[mask == organ.id].mean())
        place = np.stack([at[:, 2] * 0.8 - 30, at[:, 1] * 0.7 + 12, positions[at[:, 0]]], 1)
        np.testing.assert_allclose(fact[["x_mm", "y_mm", "z_mm"]].astype(float), (place * voxel[:, None]).sum(0) / voxel.sum())


def test_places_under_a_tilted_gantry():
    affine = np.array([[0, 0, 1, 0], [1.5, 1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]])
    mask = np.zeros((4, 6, 6), np.uint8)
    mask[3, 2:4, 1:3] = 2
    facts = organ_facts(mask, as_scan(np.zeros(mask.shape, np.int16), affine))
    np.testing.assert_allclose(facts.loc["spleen", ["x_mm", "y_mm", "z_mm"]].astype(float), (affine @ [3, 2.5, 1.5, 1])[:3])


def test_facts_can_stand_for_the_organs_of_a_segmentation(patient):
    scan, mask = patient
    mask = without(mask, 2)
    pd.testing.assert_frame_equal(organ_facts(mask, scan), Segmentation(mask, scan).organs)


def test_one_slice(patient):
    scan, mask = patient
    one = replace(scan, hu=scan.hu[20:21], positions=scan.positions[20:21])
    assert "feet end, head end" in organ_facts(mask[20:21], one).edges["liver"]
    assert {"few_slices", "short_scan", "cut_off"} <= kinds(mask[20:21], one)


def test_a_real_torso_is_cut_off_at_the_head(real_ct):
    folder = real_ct / "totalseg_example"
    scan = read_scan(folder / "ct.nii.gz")
    mask = read_mask(folder / "segmentation.nii.gz", scan)
    assert found(mask, scan) == [("cut_off", "liver"), ("cut_off", "spleen")]
    assert found(mask, scan, taught=("left_kidney", "right_kidney"), trained=(5, (350, 450))) == []


@pytest.mark.slow
def test_real_scans_raise_few_false_alarms(real_ct, tmp_path):
    "The page's table, with a column for the real data sets."
    words = [sys.executable, "benchmarks/alarms.py", "--real", real_ct, "--json", tmp_path / "rates.json"]
    subprocess.run(words, cwd=Path(__file__).parents[1], check=True)
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert set(rates) == set(KINDS)
    for kind, row in rates.items():
        alarms = [value for name, value in row.items() if "false alarms" in name and value is not None]
        hits = [value for name, value in row.items() if "hits" in name and value is not None]
        assert hits and max(alarms) <= 5 and min(hits) >= 90, (kind, row)
