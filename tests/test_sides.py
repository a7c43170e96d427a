"Left stays left: what the three settings of `sides` do to phantoms, judged by the patient's back and not by the image's edges."

import random
from dataclasses import asdict

import albumentations as A
import numpy as np
import pytest
from skimage.measure import label, regionprops

from rsna_seg.augment import Augment, AugmentConfig
from rsna_seg.ct.phantom import draw_patient, render
from rsna_seg.ct.scan import window
from rsna_seg.files import ConfigError

STILL = dict(horizontal_flip=0, vertical_flip=0, rotate=0, grid_distortion=0, coarse_dropout=0)
FLIPS = {"none": {}, "horizontal": {"horizontal_flip": 1}, "vertical": {"vertical_flip": 1},
         "both": {"horizontal_flip": 1, "vertical_flip": 1}}  # fmt: skip
ANGLES = {"straight": {}, "turned": {"rotate": 1, "rotate_limit": 45}, "far": {"rotate": 1, "rotate_limit": 180},
          "distorted": {"grid_distortion": 1}, "turned and distorted": {"rotate": 1, "grid_distortion": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def slices():
    "Of three patients the slice with most of both kidneys: soft tissue and bone as channels, and the mask."
    found = []
    for seed in (0, 5, 9):
        hu, masks, _ = render(draw_patient(seed), size=160, slices=24)
        z = int(np.minimum((masks == 3).sum((1, 2)), (masks == 4).sum((1, 2))).argmax())
        found.append((np.stack([window(hu[z]), window(hu[z], 500, 200)], -1), masks[z]))
    return found


def largest(binary):
    "Centre (row, col) of the largest piece."
    return np.array(max(regionprops(label(binary)), key=lambda piece: piece.area).centroid)


def left_is_left(image, mask):
    "Whether label 3 lies on the patient's left as seen from the feet, the back being where the spine is."
    back = largest(image[..., 1] > 128) - largest(image[..., 0] > 60)  # from the middle of the body to its spine
    to_the_left = np.array([-back[1], back[0]])  # back down: left is right in the image
    kidneys = [np.argwhere(mask == c).mean(0) for c in (3, 4)]
    return bool((kidneys[0] - kidneys[1]) @ to_the_left > 0)


def judged(slices, sides, flips, angles):
    "Whether left is left, in several draws for each slice."
    augment = Augment(AugmentConfig(**{**STILL, **FLIPS[flips], **ANGLES[angles]}, sides=sides))
    return [left_is_left(*augment(*pair, seed=(k, i))) for k, pair in enumerate(slices) for i in range(8)]


def test_scans_are_not_mirrored(slices):
    assert all(left_is_left(*pair) for pair in slices)
    assert not any(left_is_left(image[:, ::-1], mask[:, ::-1]) for image, mask in slices)
    assert all(left_is_left(np.rot90(image), np.rot90(mask)) for image, mask in slices)


@pytest.mark.parametrize("angles", ANGLES)
@pytest.mark.parametrize("flips", FLIPS)
def test_exchange_and_off_put_every_kidney_on_its_side(slices, flips, angles):
    assert all(judged(slices, "exchange", flips, angles))
    assert all(judged(slices, "off", flips, angles))


@pytest.mark.parametrize("angles", ANGLES)
@pytest.mark.parametrize("flips", FLIPS)
def test_keep_puts_them_on_the_wrong_side_after_a_single_flip(slices, flips, angles):
    assert set(judged(slices, "keep", flips, angles)) == {flips in ("none", "both")}


def plain(image, mask, seed):
    "The recipe as albumentations alone would write it."
    compose = A.Compose([
        A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.Rotate(limit=(-45, 45), p=0.5), A.GridDistortion(p=0.3),
        A.CoarseDropout(p=0.2),
    ])  # fmt: skip
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    compose.set_random_state(np.random.default_rng(number), random.Random(number))
    both = compose(image=image, mask=mask)
    return both["image"], both["mask"]


def test_keep_is_plain_albumentations_bit_for_bit(slices):
    augment = Augment()
    for i in range(200):
        image, mask = slices[i % 3]
        for ours, theirs in zip(augment(image[..., 0], mask, (4, i)), plain(image[..., 0], mask, (4, i))):
            np.testing.assert_array_equal(ours, theirs)


def test_exchange_draws_as_keep_does_and_changes_kidneys_alone(slices):
    keep, exchange, changed = Augment(), Augment(AugmentConfig(sides="exchange")), []
    other = np.array([0, 1, 2, 4, 3, 5])
    for i in range(200):
        (image, mask), (same, exchanged) = (augment(*slices[i % 3], (5, i)) for augment in (keep, exchange))
        np.testing.assert_array_equal(image, same)
        changed.append(not np.array_equal(mask, exchanged))
        np.testing.assert_array_equal(exchanged, other[mask] if changed[-1] else mask)
    assert 0.4 < np.mean(changed) < 0.6  # one flip of two


def test_off_flips_never_and_draws_the_rest_as_keep_does(slices):
    never = Augment(AugmentConfig(**{**STILL, "horizontal_flip": 1, "vertical_flip": 0.5}, sides="off"))
    keep, off, unflipped = Augment(), Augment(AugmentConfig(sides="off")), 0
    for i in range(200):
        pair = slices[i % 3]
        for before, after in zip(pair, never(*pair, (6, i))):
            np.testing.assert_array_equal(before, after)
        moved, kept = off(*pair, (6, i)), keep(*pair, (6, i))
        if not any(t.params for t in keep.compose.transforms[:2]):
            unflipped += 1
            for ours, theirs in zip(moved, kept):
                np.testing.assert_array_equal(ours, theirs)
        assert [bool(t.params) for t in off.compose.transforms[2:5]] == [bool(t.params) for t in keep.compose.transforms[2:5]]
    assert 30 < unflipped < 70


def test_five_transforms_are_drawn_independently(slices):
    "In 3000 draws of the whole recipe: how often each was applied, and that none goes with another."
    augment, (image, mask) = Augment(), slices[0]
    image, mask = image[::8, ::8, 0].copy(), mask[::8, ::8].copy()
    applied, angles = [], []
    for i in range(3000):
        augment(image, mask, (7, i))
        applied.append([bool(t.params) for t in augment.compose.transforms[:5]])
        if applied[-1][2]:
            matrix = augment.compose.transforms[2].params["matrix"]
            angles.append(np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0])))
    wanted = [v for k, v in asdict(augment.config).items() if k in STILL]
    np.testing.assert_allclose(np.mean(applied, axis=0), wanted, atol=0.03)
    together = np.corrcoef(np.array(applied, float).T) - np.eye(5)
    assert np.abs(together).max() < 0.08  # the standard error is 0.02
    assert -45 <= min(angles) < -44 and 44 < max(angles) <= 45 and abs(np.mean(angles)) < 2


def test_neighbouring_slices_as_channels_move_alike(slices):
    augment = Augment(AugmentConfig(sides="exchange"))
    image, mask = slices[1]
    stack = np.stack([image[..., 0], image[..., 1], 255 - image[..., 0]], -1)
    for i in range(100):
        moved, moved_mask = augment(stack, mask, (8, i))
        assert moved.shape == stack.shape and moved.dtype == np.uint8 and moved.flags.c_contiguous
        for channel in range(3):
            alone, alone_mask = augment(stack[..., channel], mask, (8, i))
            np.testing.assert_array_equal(moved[..., channel], alone)
            np.testing.assert_array_equal(moved_mask, alone_mask)


@pytest.mark.parametrize("wrong", [
    {"sides": "mirror"}, {"sides": None}, {"horizontal_flip": 1.1}, {"vertical_flip": -0.1}, {"rotate": float("nan")},
    {"grid_distortion": 2}, {"coarse_dropout": -1}, {"rotate_limit": -45}, {"rotate_limit": 181}, {"rotate_limit": float("nan")},
], ids=str)  # fmt: skip
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))) as error:
        AugmentConfig(**wrong)
    assert "\n" not in str(error.value)
