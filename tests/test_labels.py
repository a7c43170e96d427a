"What the numbers of a mask mean: tables of other datasets, encodings of PNG, and damage that must not pass."

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from rsna_seg.ct.labels import PRESETS, label_map, named_labels
from rsna_seg.ct.organs import ORGANS, palette
from rsna_seg.ct.phantom import draw_patient, render
from rsna_seg.ct.png import (
    ENCODINGS, check_damage, mask_damage, mask_labels, png_classes, png_values,
)  # fmt: skip
from rsna_seg.files import DataError

SOLID = ("liver", "spleen", "left_kidney", "right_kidney")
SOURCES = {  # the organs' ids as the datasets publish them: liver, spleen, left kidney, right kidney, bowel; largest id
    "rsna": ((1, 2, 3, 4, (5,)), 5),
    "totalsegmentator": ((5, 1, 3, 2, (18, 19, 20)), 117),
    "amos": ((6, 1, 3, 2, ()), 15),
    "btcv": ((6, 1, 3, 2, ()), 13),
    "flare22": ((1, 3, 13, 2, ()), 13),
}
COLOURS = np.array(palette(), np.uint8)


def read_mask_png(path, encoding="raw", labels=PRESETS["rsna"]):
    return png_classes(png_values(path, encoding), path, encoding, labels)


@pytest.fixture(scope="module")
def bodies():
    "Masks of synthetic patients at several sizes."
    return {size: [render(draw_patient(seed), size, slices)[1] for seed in (0, 3, 5)] for size, slices in ((64, 20), (128, 20), (256, 12), (512, 6))}


@pytest.fixture(scope="module")
def mask(bodies):
    "A slice with all five organs."
    return max((m for body in bodies[256] for m in body), key=lambda m: (len(np.unique(m)), (m > 0).sum()))


def write(folder, pixels, name="mask.png"):
    path = folder / name
    assert cv2.imwrite(str(path), pixels)
    return path


def write_indexed(folder, index, colours, name="indexed.png"):
    image = Image.fromarray(index)
    image.putpalette([int(v) for colour in colours for v in colour])
    image.save(folder / name)
    return folder / name


def jpeg(pixels, quality):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)


def resized(pixels, factor, how=cv2.INTER_LINEAR):
    return cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=how)


def refusal(path, encoding="raw", labels=PRESETS["rsna"]):
    with pytest.raises(DataError) as error:
        read_mask_png(path, encoding, labels)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("which", SOURCES)
def test_presets_give_the_published_ids(which):
    (*single, bowel), last = SOURCES[which]
    labels = label_map(which)
    expected = np.zeros(last + 1, np.uint8)
    expected[single] = (1, 2, 3, 4)
    expected[list(bowel)] = 5
    ids = np.arange(last + 1)
    for dtype in (np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64):
        classes = labels.to_classes(ids.astype(dtype), "mask.nii")
        assert classes.dtype == np.uint8
        np.testing.assert_array_equal(classes, expected)
    assert labels.labelled == (SOLID + ("bowel",) if bowel else SOLID)
    if which == "totalsegmentator":
        assert labels.to_classes(np.array([-1, 118, 70000]), "mask.nii").tolist() == [0, 0, 0]
    else:
        for beyond in (last + 1, -1, 300, 65535, 2**40):
            with pytest.raises(DataError, match=rf"mask.nii has the value {beyond} at 1 pixel, first at row 0, column 1; the label map {which}"):
                labels.to_classes(np.array([[0, beyond]]), "mask.nii")


def test_values_without_meaning_are_counted_and_placed():
    volume = np.zeros((4, 5, 6), np.int16)
    volume[2, 3, 1:4] = 7
    with pytest.raises(DataError, match=r"m.nii has the value 7 at 3 voxels, first at index \(2, 3, 1\); the label map rsna knows 0 to 5"):
        label_map("rsna").to_classes(volume, "m.nii")
    with pytest.raises(DataError, match=r"first at index \(2, 3, 33\)"):
        label_map("rsna").to_classes(volume, "m.nii", start=(0, 0, 32))
    for strange, why in ((2.5, "nearest neighbour"), (np.nan, "write 0 for NaN"), (np.inf, "nearest neighbour")):
        with pytest.raises(DataError, match=f"no whole numbers.*{why}"):
            label_map("rsna").to_classes(np.array([1.0, strange]), "m.nii")
    assert label_map("rsna").to_classes(np.array([True, False]), "m.nii").tolist() == [1, 0]


def test_names_in_any_spelling():
    total = label_map("totalsegmentator")
    assert [total.class_of(n) for n in ("kidney_left", "Left kidney", "KIDNEY-RIGHT", "small_bowel", "Duodenum", "rib_left_1")] == [3, 3, 4, 5, 5, 0]
    assert label_map("amos").class_of("duodenum") == 0
    for organ in ORGANS:
        assert label_map("rsna").class_of(organ.name) == label_map("rsna").class_of(organ.key) == organ.id
    with pytest.raises(DataError, match="seg.dcm: the label map rsna does not know the name 'Tumour'"):
        label_map("rsna").class_of("Tumour", "seg.dcm")


def test_bowel_is_labelled_only_as_a_whole(tmp_path):
    labelled = lambda *names: named_labels({name: i for i, name in enumerate(("background", *names))}).labelled
    assert labelled("liver", "colon", "duodenum") == ("liver",)
    assert labelled("colon", "small_bowel") == ("bowel",)
    assert labelled("intestine", "left kidney") == ("left_kidney", "bowel")
    word = named_labels({"liver": 1, "duodenum": 9, "colon": 10, "intestine": 11, "adrenal": 12, "rectum": 13})
    assert word.to_classes(np.array([0, 1, 9, 10, 11, 12, 13]), "m").tolist() == [0, 1, 5, 5, 5, 0, 5]
    one, two = tmp_path / "one.json", tmp_path / "dataset.json"
    one.write_text(json.dumps({"labels": {"0": "background", "1": "spleen", "2": "right kidney"}}))
    two.write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1, "right kidney": 2}}))
    assert label_map(one).ids == label_map(two).ids == {0: 0, 1: 2, 2: 4}


@pytest.mark.parametrize("text, complaint", [
    ("", "cannot be read as JSON"), ("{", "cannot be read as JSON"), ("{}", "holds no JSON object"), ("[1]", "holds no JSON object"),
    ('{"1": "lung"}', "gives '1' the class 'lung'"), ('{"1": 6}', "gives '1' the class 6"), ('{"1": true}', "class True"),
    ('{"1": 1.5}', "class 1.5"), ('{"1": null}', "names no organ"), ('{"1": "liver", "other": "liver"}', "can only be"),
    ('{"70000": "liver"}', "whole number from 0 to 65534"), ('{"#ff0000": "liver"}', "--encoding"),
    ('{"spleen": 1}', "under \"labels\""), ('{"labels": {"aorta": 1}}', "none of liver"), ('{"labels": {"liver": "x"}}', "'x'"),
    ('{"labels": {"liver": [1, 2]}}', "whole number"), ('{"labels": {}}', "none of liver"),
])  # fmt: skip
def test_wrong_label_files_are_refused(tmp_path, text, complaint):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        label_map(path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, complaint", [
    ("no", "cannot be read as JSON"), ('{"red": "liver"}', "'red'"), ('{"#ff00": "liver"}', "#rrggbb"),
    ('{"#ff0000": "lung"}', "lung"), ('{"#000000": "background"}', "no organ"),
])  # fmt: skip
def test_wrong_colour_tables_are_refused(tmp_path, text, complaint):
    path = tmp_path / "colours.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        mask_labels(path)
    assert complaint in str(error.value)


def test_unknown_names_of_maps_and_encodings():
    for call in (lambda: label_map("amoss"), lambda: label_map("missing.json"), lambda: mask_labels("x60")):
        with pytest.raises(DataError, match="There is no"):
            call()


def test_every_encoding_round_trips(tmp_path, mask):
    bgr = COLOURS[mask][..., ::-1]
    table = tmp_path / "colours.json"
    table.write_text(json.dumps({"#{:02x}{:02x}{:02x}".format(*c): i for i, c in enumerate(palette())}))
    alpha = np.dstack([bgr, np.where(mask, 128, 0).astype(np.uint8)])
    files = [("raw", mask), ("raw", mask.astype(np.uint16)), ("raw", np.dstack([mask] * 3)), ("x40", mask * 40), ("x51", mask * 51),
             ("x51", np.dstack([mask * 51] * 3)), ("rgb", bgr), ("rgb", alpha), (table, bgr)]  # fmt: skip
    for i, (encoding, pixels) in enumerate(files):
        classes = read_mask_png(write(tmp_path, pixels, f"{i}.png"), encoding)
        assert classes.dtype == np.uint8
        np.testing.assert_array_equal(classes, mask)
    indexed = write_indexed(tmp_path, mask, palette())
    np.testing.assert_array_equal(read_mask_png(indexed, "palette"), mask)
    np.testing.assert_array_equal(read_mask_png(indexed, "rgb"), mask)
    strange = write_indexed(tmp_path, mask, [(9 * i, 200, i) for i in range(6)], "strange.png")
    np.testing.assert_array_equal(read_mask_png(strange, "palette"), mask)
    amos = np.array([0, 6, 1, 3, 2, 13], np.uint8)[mask]
    np.testing.assert_array_equal(read_mask_png(write(tmp_path, amos), labels=PRESETS["amos"]), mask * (mask < 5))
    assert mask_labels(table).labelled == mask_labels("rgb").labelled == tuple(o.key for o in ORGANS)
    assert set(ENCODINGS) == {"raw", "x40", "x51", "palette", "rgb"}


def test_grey_of_few_bits(tmp_path):
    import struct
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header, rows = struct.pack(">IIBBBBB", 4, 2, 4, 0, 0, 0, 0), b"\0\x01\x23" + b"\0\x45\x00"
    path = tmp_path / "four_bits.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert read_mask_png(path).tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]


def test_the_wrong_encoding_is_told_the_right_one(tmp_path, mask):
    assert "--encoding x40" in refusal(write(tmp_path, mask * 40))
    assert "--encoding x51" in refusal(write(tmp_path, mask * 51), "x40")
    assert "--encoding raw" in refusal(write(tmp_path, mask), "x51")
    assert "--encoding raw" in refusal(write(tmp_path, mask), "palette")
    assert "--encoding raw" in refusal(write(tmp_path, mask), "rgb")
    bgr = np.ascontiguousarray(COLOURS[mask][..., ::-1])
    assert "--encoding rgb" in refusal(write(tmp_path, bgr))
    assert "--encoding rgb" in refusal(write(tmp_path, bgr), "palette")
    assert "--encoding palette" in refusal(write_indexed(tmp_path, mask, palette()))
    assert "black and white" in refusal(write(tmp_path, (mask > 0).astype(np.uint8) * 255))
    assert "--encoding FILE.json" in refusal(write(tmp_path, 255 - bgr), "rgb")
    total = np.array([0, 5, 1, 3, 2, 18], np.uint8)[mask]
    assert "totalsegmentator" in refusal(write(tmp_path, total))
    hu = np.random.default_rng(0).integers(0, 255, mask.shape).astype(np.uint8)
    assert "it is a picture" in refusal(write(tmp_path, hu))


def test_a_renumbered_palette_is_refused(tmp_path, mask):
    order = np.array([0, 3, 1, 2, 5, 4])
    for colours in (COLOURS, np.repeat(np.arange(6)[:, None], 3, 1)):
        path = write_indexed(tmp_path, np.argsort(order)[mask].astype(np.uint8), colours[order])
        assert "renumbered" in refusal(path, "palette")


def test_what_is_no_png(tmp_path, mask):
    path = tmp_path / "mask.png"
    assert "cannot be read" in refusal(path)
    path.write_bytes(cv2.imencode(".jpg", mask)[1].tobytes())
    assert "JPEG" in refusal(path)
    for file, encoding in ((write(tmp_path, mask), "raw"), (write_indexed(tmp_path, mask, palette()), "palette")):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert "damaged" in refusal(file, encoding)


@pytest.mark.parametrize("encoding", ["x40", "x51", "rgb"])
@pytest.mark.parametrize("damage", [
    lambda p: jpeg(p, 75), lambda p: jpeg(p, 90), lambda p: jpeg(p, 98),
    lambda p: resized(p, 0.7), lambda p: resized(p, 2), lambda p: resized(p, 0.5, cv2.INTER_AREA),
])  # fmt: skip
def test_damage_of_scaled_and_coloured_masks(tmp_path, mask, encoding, damage):
    pixels = np.ascontiguousarray(COLOURS[mask][..., ::-1]) if encoding == "rgb" else mask * int(encoding[1:])
    harmed = damage(pixels)
    path = write(tmp_path, harmed)
    message = refusal(path, encoding)
    assert "resized with interpolation or saved as JPEG" in message
    values = png_values(path, encoding)
    wrong = ~np.isin(values, list(mask_labels(encoding).ids))
    row, col = np.argwhere(wrong)[0]
    value, count = values[row, col], (values == values[row, col]).sum()
    shown = f"#{value:06x}" if encoding == "rgb" else f"{value}"
    assert f"has the value {shown} at {count} pixel" in message and f"first at row {row}, column {col}" in message


SOUND = [lambda m: m, *(lambda m, f=f: resized(m, f, cv2.INTER_NEAREST) for f in (0.5, 0.6, 0.8, 1.25, 1.7, 2, 4))]
HARMFUL = [
    *(lambda m, f=f: resized(m, f) for f in (0.25, 0.5, 0.75, 0.9, 1.25, 2, 3, 4)),
    *(lambda m, f=f: resized(m, f, cv2.INTER_AREA) for f in (0.25, 0.5, 0.8)),
    *(lambda m, f=f: resized(m, f, cv2.INTER_CUBIC) for f in (0.5, 0.75, 1.5, 2)),
    *(lambda m, q=q: jpeg(m, q) for q in (50, 75, 90, 95, 98, 100)),
    lambda m: cv2.warpAffine(m, cv2.getRotationMatrix2D((len(m) / 2, len(m) / 2), 4, 1), m.shape),
]


def test_sound_series_pass_and_interpolated_ones_do_not(bodies):
    for size, patients in bodies.items():
        for body in patients:
            for treat in SOUND:
                check_damage({z: mask_damage(treat(m)) for z, m in enumerate(body)}, "masks")
            for treat in HARMFUL if size < 512 else HARMFUL[::3]:
                with pytest.raises(DataError, match=r"masks: at \d+ pixels.* most of them in \d.* --trust-masks"):
                    check_damage({z: mask_damage(treat(m)) for z, m in enumerate(body)}, "masks")


def test_sound_slices_pass_one_by_one(bodies):
    for patients in bodies.values():
        for m in (m for body in patients for m in body):
            check_damage({"m": mask_damage(m)}, "masks")


def test_counts_and_the_worst_slice():
    values = np.zeros((5, 6), np.uint8)
    values[2:, 3], values[2:, 4:] = 2, 5
    one = mask_damage(values)
    assert one.tolist() == mask_damage(values.T).tolist() == [3, 6 + 3]
    check_damage({}, "masks")
    check_damage({"a": np.array([9, 0])}, "masks")
    with pytest.raises(DataError, match=r"at 12 pixels.* most of them in b\.png"):
        check_damage({"a.png": one, "b.png": one * 2, "c.png": one}, "masks")


def test_radiologists_masks_are_accepted(real_ct):
    files = sorted((real_ct / "curvas_png" / "masks").glob("*.png"))
    assert len(files) == 108
    total, harmed = 0, {}
    for path in files:
        classes = read_mask_png(path)
        np.testing.assert_array_equal(classes, cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        total, harmed[path] = total + mask_damage(classes), mask_damage(jpeg(classes, 100))
    assert total[0] == 0 and total[1] > 10_000
    with pytest.raises(DataError):
        check_damage(harmed, "masks")


def test_segmentation_at_3_mm_is_accepted(real_ct):
    import nibabel

    volume = np.asarray(nibabel.load(real_ct / "totalseg_example" / "segmentation.nii.gz").dataobj)
    classes = label_map("rsna").to_classes(volume, "segmentation.nii.gz")
    for axis in range(3):
        damage = sum(map(mask_damage, np.moveaxis(classes, axis, 0)))
        check_damage({"segmentation": damage}, "segmentation")
        assert damage[0] < 0.001 * damage.sum()
