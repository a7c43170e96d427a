"Post-processing on crafted masks: what each step takes, what it must leave, and that nothing happens unasked."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_fill_holes, label

from rsna_seg.anatomy.measure import midline, pieces
from rsna_seg.anatomy.repair import PostprocessConfig, postprocess
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.nifti import read_mask
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render
from rsna_seg.ct.scan import Grid, Scan
from rsna_seg.files import ConfigError

STEPS = {"sides": {"sides": True}, "largest": {"largest": True}, "min_piece": {"min_piece_ml": 1.0}, "fill_holes": {"fill_holes": True}}
EVERY = PostprocessConfig(sides=True, largest=True, min_piece_ml=1.0, fill_holes=True)


def as_scan(hu, affine, positions=None):
    "A scan of voxels in memory."
    positions = affine[2, 3] + affine[2, 0] * np.arange(len(hu)) if positions is None else positions
    return Scan(hu, affine, Grid(Path("made"), hu.shape[::-1], np.eye(4)), np.asarray(positions, float), "made")


def body(shape=(20, 60, 80), spine=40, mm=(10, 4, 4)):
    "A scan of tissue with a spine of two by eight columns, voxels of 0.16 ml."
    hu = np.full(shape, -1000, np.int16)
    hu[:, 5:55, 10:70] = 40
    hu[:, 35:50, spine - 4 : spine + 4] = 400
    affine = np.array([[0, 0, mm[2], 0], [0, mm[1], 0, 0], [mm[0], 0, 0, 0], [0, 0, 0, 1.0]])
    return as_scan(hu, affine)


def done(mask, scan, **on):
    "The mask after some steps; that the input was not written to is checked on the way."
    before = mask.copy()
    after, table = postprocess(mask, scan, PostprocessConfig(**on))
    np.testing.assert_array_equal(mask, before)
    return after, table.set_index(["step", "organ"])


@pytest.fixture(scope="module")
def patient():
    hu, mask, affine = render(draw_patient(5), size=128, slices=32)
    return as_scan(hu, affine), mask


masks = arrays(np.uint8, (6, 12, 14), elements=st.integers(0, 5))


@given(masks)
@settings(max_examples=50, deadline=None)
def test_all_off_changes_nothing(mask):
    after, table = postprocess(mask, body((6, 12, 14), 7))
    np.testing.assert_array_equal(after, mask)
    assert len(table) == 0 and after is mask


@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 7, 1), (1, 1, 7), (1, 1, 1), (1, 4, 4)])
def test_pieces_of_a_line_of_voxels(shape):
    inside = np.ones(shape, bool)
    inside.flat[1::2] = False
    labels, count = pieces(inside)
    theirs, number = label(inside, np.ones((3, 3, 3)))
    assert count == number
    np.testing.assert_array_equal(labels, theirs)


@given(masks, st.floats(0, 3), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_pieces_are_those_of_scipy(mask, floor, least):
    scan = body((6, 12, 14), 7)
    expected = mask.copy()
    for organ in range(1, 6):
        labels, count = label(expected == organ, np.ones((3, 3, 3)))
        ml = np.array([(labels == k).sum() * 0.16 for k in range(1, count + 1)])
        for k in range(count):
            if organ < 5 and k != ml.argmax() and ml[k] < floor - 1e-9 or ml[k] < least - 1e-9:
                expected[labels == k + 1] = 0
    after, table = done(mask, scan, largest=True, largest_floor_ml=floor, min_piece_ml=least)
    gone = np.bincount(mask.ravel(), minlength=6) - np.bincount(after.ravel(), minlength=6)
    np.testing.assert_array_equal(after > 0, expected > 0)
    removed = table.groupby("organ").ml.sum().reindex([o.key for o in ORGANS], fill_value=0)
    np.testing.assert_allclose(removed, gone[1:] * 0.16, atol=1e-9)


@given(masks)
@settings(max_examples=100, deadline=None)
def test_holes_are_those_of_scipy_and_take_from_nobody(mask):
    expected = mask.copy()
    for organ in range(1, 5):
        expected[binary_fill_holes(expected == organ) & (expected == 0)] = organ
    after, table = done(mask, body((6, 12, 14), 7), fill_holes=True)
    np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(after[mask > 0], mask[mask > 0])
    assert table.ml.sum() == pytest.approx((after != mask).sum() * 0.16)


def test_a_hole_is_closed_on_all_sides():
    scan, mask = body(), np.zeros((20, 60, 80), np.uint8)
    mask[5:10, 10:20, 10:20] = 1
    mask[7, 14:16, 14:16] = 0  # a hole
    mask[5:10, 12, 12] = 0  # open at both ends
    mask[0:3, 30:40, 10:20], mask[0, 35, 15] = 2, 0  # open at the end of the scan
    mask[12:17, 10:20, 40:50], mask[14, 14:16, 44:46] = 5, 0  # in bowel
    after, table = done(mask, scan, fill_holes=True)
    assert (after != mask).sum() == 4 and (after[7, 14:16, 14:16] == 1).all()
    assert table.loc[("fill_holes", "liver")].tolist() == [1, pytest.approx(4 * 0.16)]


def test_largest_keeps_what_is_large_enough_in_ml_of_uneven_slices():
    scan = body()
    positions = np.r_[np.arange(10) * 10.0, 90 + np.arange(1, 11) * 40.0]  # the upper half four times as far apart
    scan = replace(scan, positions=positions)
    mask = np.zeros((20, 60, 80), np.uint8)
    mask[2:6, 10:20, 20:30] = 1  # 64 ml
    mask[14:16, 10:15, 20:30] = 1  # 100 voxels of 0.64 ml: as large, and fewer
    mask[2:3, 40:45, 20:30] = 1  # 8 ml
    after, table = done(mask, scan, largest=True)
    assert [(after[k] == 1).any() for k in (3, 14)] == [True, True] and not (after[2, 40:45] == 1).any()
    assert table.loc[("largest", "liver")].tolist() == [1, pytest.approx(8)]
    after, table = done(mask, scan, largest=True, largest_floor_ml=70)
    assert table.loc[("largest", "liver")].tolist() == [2, pytest.approx(72)]


@pytest.mark.parametrize("spine", [34, 40, 46])
def test_kidneys_are_named_by_the_side_of_the_spine(spine):
    scan, truth = body(spine=spine), np.zeros((20, 60, 80), np.uint8)
    truth[5:12, 30:40, spine + 8 : spine + 16], truth[5:12, 30:40, spine - 16 : spine - 8] = 3, 4
    assert np.abs(midline(scan) - spine).max() < 2
    mixed = truth.copy()
    mixed[5:8][truth[5:8] == 3] = 4
    for faulty in (mixed, np.array([0, 1, 2, 4, 3, 5], np.uint8)[truth], truth):
        after, table = done(faulty, scan, sides=True)
        np.testing.assert_array_equal(after, truth)
        assert table.ml.sum() == pytest.approx((faulty != truth).sum() * 0.16)


def test_a_horseshoe_kidney_stays_as_it_is():
    scan, mask = body(), np.zeros((20, 60, 80), np.uint8)
    mask[5:12, 28:34, 20:42], mask[5:12, 28:34, 42:60] = 4, 3
    mask[5:7, 28:34, 50:60] = 4  # even where a part is named wrongly
    np.testing.assert_array_equal(done(mask, scan, sides=True)[0], mask)


def test_mirrored_organs_are_not_renamed():
    scan, mask = body(), np.zeros((20, 60, 80), np.uint8)
    mask[5:12, 30:40, 50:58], mask[5:12, 30:40, 22:30] = 4, 3
    mask[5:12, 10:20, 50:60], mask[5:12, 10:20, 20:30] = 1, 2
    np.testing.assert_array_equal(done(mask, scan, sides=True)[0], mask)
    assert (done(np.where(mask < 3, 0, mask), scan, sides=True)[0] != mask).any()


def test_no_kidney_no_body_no_organ():
    scan, empty = body(), np.zeros((20, 60, 80), np.uint8)
    np.testing.assert_array_equal(postprocess(empty, scan, EVERY)[0], empty)
    air, kidney = replace(scan, hu=np.full_like(scan.hu, -1000)), empty.copy()
    kidney[5:12, 30:40, 50:58] = 4
    assert np.isnan(midline(air)).all()
    np.testing.assert_array_equal(done(kidney, air, sides=True)[0], kidney)
    assert (done(kidney, scan, sides=True)[0][kidney > 0] == 3).all()


@pytest.mark.parametrize("shape", [(1, 40, 40), (2, 7, 5), (1, 1, 1)])
def test_tiny_scans(shape):
    scan, mask = body(shape, 20), np.zeros(shape, np.uint8)
    mask[..., -1] = 3
    after, _ = postprocess(mask, scan, EVERY)
    assert after.shape == shape


def test_the_truth_of_a_phantom_stays(patient):
    scan, truth = patient
    for name, on in STEPS.items():
        after, _ = done(truth, scan, **on)
        assert (after != truth).sum() < (30 if name == "min_piece" else 1), name


def test_the_truth_of_a_torso_stays_and_exchanged_kidneys_go_back(real_ct):
    folder = real_ct / "totalseg_example"
    scan = read_scan(folder / "ct.nii.gz")
    truth = read_mask(folder / "segmentation.nii.gz", scan)
    after, _ = postprocess(truth, scan, EVERY)
    assert (after != truth).sum() <= 5
    exchanged = np.array([0, 1, 2, 4, 3, 5], np.uint8)[truth]
    np.testing.assert_array_equal(done(exchanged, scan, sides=True)[0], truth)


@pytest.mark.parametrize("wrong", [{"largest_floor_ml": -1}, {"min_piece_ml": float("nan")}], ids=str)
def test_what_is_no_volume_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PostprocessConfig(**wrong)


def test_the_settings_are_flags():
    import tyro

    config = tyro.cli(PostprocessConfig, args=["--sides", "--largest", "--min-piece-ml", "2"])
    assert config == PostprocessConfig(sides=True, largest=True, min_piece_ml=2)
