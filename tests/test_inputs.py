"What users bring: folders with many series, zip files, PNGs, arrays, tables; and what is none of it."

import itertools
import os
import shutil
import stat
import zipfile

import cv2
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import SecondaryCaptureImageStorage

from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.find import is_one_scan
from rsna_seg.ct.inputs import from_array, hu_of_grey, opened, read_input, scan_table
from rsna_seg.ct.nifti import save_nifti
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle, write_series
from rsna_seg.ct.scan import in_source_order, window
from rsna_seg.ct.series import list_series
from rsna_seg.files import ConfigError, DataError, RsnaSegError, ScanError


@pytest.fixture(scope="module")
def patient():
    return render(draw_patient(1), size=48, slices=8)


@pytest.fixture(scope="module")
def study(patient, tmp_path_factory):
    "Three CT series in subfolders, the third without a number, and in the first a localizer, a report and a screenshot."
    folder = tmp_path_factory.mktemp("inputs") / "study"
    hu, _, affine = patient
    for number, name, slices in ((2, "native", hu[:4]), (12, "portal", hu), (None, "late", hu[:6])):
        write_series(folder / name, slices, affine)
        for path in (folder / name).iterdir():
            change(path, SeriesNumber=number, SeriesDescription=f"Abdomen {name}", ConvolutionKernel=["B30f", "2"], StudyDate="20230715")
    for name, changes in {
        "90": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "91": {"Modality": "SR"},
        "92": {"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "CT", "ImagePositionPatient": None},
    }.items():
        shutil.copy(folder / "native" / "1.dcm", folder / "native" / f"{name}.dcm")
        change(folder / "native" / f"{name}.dcm", SeriesInstanceUID=f"1.2.{name}", SeriesNumber=99, **changes)
    return folder


def change(path, **tags):
    dataset = pydicom.dcmread(path)
    for tag, value in tags.items():
        if value is None:
            dataset.pop(tag, None)
        else:
            setattr(dataset, tag, value)
    dataset.save_as(path)


def pngs(folder, volume):
    folder.mkdir(parents=True, exist_ok=True)
    for k, plane in enumerate(volume, start=1):
        cv2.imwrite(str(folder / f"slice{k}.png"), plane)
    return folder


def refused(path, *words, error=ScanError, **how):
    with pytest.raises(error) as told:
        read_input(path, **how)
    for word in words:
        assert word in str(told.value)
    return str(told.value)


ORDERS = [(order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


@pytest.mark.parametrize("order,flips", ORDERS)
def test_an_array_in_any_order_and_back(order, flips):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, (3, 4, 5)).astype(np.int16)  # (z, row, col) of the scan to be found
    turn = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.diag(turn))  # nearly along the body's axes
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = turn[:, [2, 1, 0]] * [5, 0.7, 0.8], [10, -20, 30]
    there = hu.transpose(order)[tuple(slice(None, None, f) for f in flips)]
    affine = np.eye(4)
    for axis, (n, f) in enumerate(zip(order, flips)):
        affine[:3, axis] = f * lps[:3, n]
    affine[:3, 3] = lps[:3, 3] + sum((hu.shape[n] - 1) * lps[:3, n] for n, f in zip(order, flips) if f < 0)
    for space, given_affine in (("LPS", affine), ("RAS", np.diag([-1.0, -1, 1, 1]) @ affine)):
        scan = from_array(there, given_affine, space)
        np.testing.assert_array_equal(scan.hu, hu)
        np.testing.assert_allclose(scan.affine, lps, atol=1e-9)
        back = in_source_order(scan.hu, scan)
        assert back.shape == there.shape
        np.testing.assert_array_equal(back, there)


def test_an_array_says_the_same_as_the_file(patient, tmp_path):
    hu, mask, affine = patient
    scan = from_array(hu, affine, "LPS", name="ann")
    save_nifti(scan.hu.astype(np.uint8), scan, tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.shape == hu.shape
    np.testing.assert_allclose(image.affine, np.diag([-1.0, -1, 1, 1]) @ affine, atol=1e-4)
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.float32) + 0.2, image.affine[:, [2, 1, 0, 3]]), tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_input(tmp_path / "b.nii.gz").hu, hu)
    assert scan.source.measured and scan.name == "ann" and scan.notes == ()


@pytest.mark.parametrize("values,affine,why", [
    (np.zeros((2, 3)), np.eye(4), "shape (2, 3)"), (np.zeros((2, 3, 0)), np.eye(4), "shape (2, 3, 0)"),
    (np.full((2, 2, 2), np.nan), np.eye(4), "NaN"), (np.full((2, 2, 2), np.inf), np.eye(4), "infinite"),
    (np.zeros((2, 2, 2), bool), np.eye(4), "bool"), (np.zeros((2, 2, 2), complex), np.eye(4), "complex"),
    (np.zeros((2, 2, 2)), np.eye(3), "4x4"), (np.zeros((2, 2, 2)), None, "4x4"), (np.zeros((2, 2, 2)), "here", "4x4"),
    (np.zeros((2, 2, 2)), np.full((4, 4), np.nan), "4x4"), (np.zeros((2, 2, 2)), np.diag([1, 1, 0, 1.0]), "singular"),
    (np.zeros((2, 2, 2)), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
])  # fmt: skip
def test_arrays_that_are_no_scan(values, affine, why):
    with pytest.raises(ScanError) as told:
        from_array(values, affine, name="mine")
    assert why in str(told.value) and "mine" in str(told.value)
    with pytest.raises(ScanError, match="RAS or LPS"):
        from_array(np.zeros((2, 2, 2)), np.eye(4), "ras")


@settings(max_examples=200, deadline=None)
@given(st.floats(-1000, 1000), st.floats(255.5, 4000))
def test_grey_values_are_the_same_in_the_same_window(level, width):
    shades = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(window(hu_of_grey(shades, level, width), level, width), shades)


def test_windows_that_cannot_be():
    for level, width in ((50, 0), (50, -400), (40000, 400), (50, 1e9), (np.nan, 400)):
        with pytest.raises(ConfigError, match="window"):
            hu_of_grey(np.zeros(1, np.uint8), level, width)


def test_pngs_in_the_order_of_their_numbers(patient, tmp_path):
    grey = np.repeat(window(patient[0]), 2, axis=0)[:12]
    grey[:, 0, 0] = np.arange(12)
    scan = read_input(pngs(tmp_path / "p", grey))
    np.testing.assert_array_equal(window(scan.hu), grey)
    assert scan.spacing == (1, 1, 1) and not scan.source.measured and "no spacing" in scan.notes[0]
    assert "slice1.png to slice12.png" in scan.notes[1]
    assert [p.name for p in scan.source.pictures][:3] == ["slice1.png", "slice2.png", "slice3.png"] and scan.source.files == ()
    scan = read_input(tmp_path / "p", spacing_mm=(5, 0.8, 0.7), level=-600, width=1500)
    np.testing.assert_array_equal(window(scan.hu, -600, 1500), grey)
    assert scan.spacing == (5, 0.8, 0.7) and scan.source.measured
    assert len(scan.notes) == 2 and "cannot be level -600, width 1500" in scan.notes[1]
    assert in_source_order(scan.hu, scan).shape == (48, 48, 12)
    one = read_input(tmp_path / "p" / "slice3.png")
    np.testing.assert_array_equal(window(one.hu), grey[2:3])


def test_pngs_of_every_grey_kind(patient, tmp_path):
    grey = window(patient[0])[3]
    kinds = {"grey": grey, "rgb": cv2.merge([grey] * 3), "rgba": cv2.merge([grey] * 3 + [np.full_like(grey, 255)]),
             "deep": grey.astype(np.uint16) * 257, "deep rgb": cv2.merge([grey.astype(np.uint16) * 257] * 3)}  # fmt: skip
    for name, pixels in kinds.items():
        assert cv2.imwrite(str(tmp_path / f"{name}.png"), pixels)
        np.testing.assert_array_equal(window(read_input(tmp_path / f"{name}.png").hu)[0], grey)


def test_pngs_that_are_no_scan(patient, tmp_path):
    grey = window(patient[0])
    colour = cv2.merge([grey[0], grey[1], grey[0]])
    cv2.imwrite(str(tmp_path / "colour.png"), colour)
    refused(tmp_path / "colour.png", "colour.png is in colour")
    cv2.imwrite(str(tmp_path / "stored.png"), (patient[0][0].astype(int) + 1024).clip(0).astype(np.uint16))
    refused(tmp_path / "stored.png", "16 bits", "from_array")
    folder = pngs(tmp_path / "sizes", grey)
    cv2.imwrite(str(folder / "slice5.png"), grey[0][:40])
    refused(folder, "slice5.png is uint8 (40, 48)")
    data = (folder / "slice4.png").read_bytes()
    for name, broken in {"cut": data[: len(data) // 2], "wrong": data[:200] + b"x" + data[201:], "text": b"a text"}.items():
        (tmp_path / f"{name}.png").write_bytes(broken)
        refused(tmp_path / f"{name}.png", f"{name}.png cannot be read: it is no PNG or is damaged")
    pngs(tmp_path / "two" / "images", grey), pngs(tmp_path / "two" / "masks", grey)
    refused(tmp_path / "two", "PNGs in images", "give the folder of one scan")
    assert list(scan_table(tmp_path / "two").path) == [tmp_path / "two" / "images"]  # masks are no scan
    shutil.copytree(tmp_path / "two" / "images", tmp_path / "more" / "native")
    shutil.copytree(tmp_path / "two" / "images", tmp_path / "more" / "portal")
    refused(tmp_path / "more", "PNGs in native, portal")
    assert read_input(tmp_path / "two" / "images").hu.shape == grey.shape
    cv2.imwrite(str(tmp_path / "photo.jpg"), grey[0])
    refused(tmp_path / "photo.jpg", "JPEG")
    shutil.copy(tmp_path / "photo.jpg", tmp_path / "renamed.png")
    refused(tmp_path / "renamed.png", "no PNG")
    for spacing in ((1, 1), (1, 0, 1), (1, np.nan, 1), "abc", (1, "x", 1)):
        refused(tmp_path / "two" / "images", "spacing", error=ConfigError, spacing_mm=spacing)


def test_the_series_of_a_study(study):
    table = list_series(study)
    assert list(table.number) == ["", "2", "12"] and list(table.slices) == [6, 4, 8]
    assert list(table.folder) == ["late", "native", "portal"] and set(table.date) == {"2023-07-15"}
    assert set(table.kernel) == {"B30f 2"} and set(table["rows"]) == set(table["columns"]) == {48}
    np.testing.assert_allclose(table.spacing_mm, table.thickness_mm, atol=0.01)
    told = refused(study, "3 CT series", "--series", "Abdomen portal", "thickness_mm", "B30f 2", "2023-07-15")
    assert all(uid in told for uid in table.series)


def test_a_series_is_chosen(study, patient):
    table, hu = list_series(study), patient[0]
    portal = table.series[2]
    for wanted in (portal, portal[-9:], portal[26:], 12, "12", " 12 "):
        np.testing.assert_array_equal(read_input(study, wanted).hu, hu)
    scan = read_input(study, series="2")
    assert len(scan.hu) == 4 and len(scan.notes) == 3
    assert {note.rpartition("it is ")[2] for note in scan.notes} == {"localizer.", "SR.", "screenshot."}
    refused(study, "no CT series 7777777", "Abdomen portal", series=7777777)
    refused(study, "3 CT series that 1.2 fits", series="1.2")
    refused(study, "3 CT series;", series="")
    refused(study / "portal", "no CT series 3", series=3)
    np.testing.assert_array_equal(read_input(study / "portal", series=12).hu, hu)


def test_headers_are_read_once(study, monkeypatch):
    read, dcmread = [], pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda file, **how: read.append(file.name) or dcmread(file, **how))
    list_series(study)
    assert len(read) == len(set(read)) == 21
    read.clear()
    read_input(study, series=12)
    assert len(read) == len(set(read)) == 21


def test_series_without_uid_number_or_place(patient, tmp_path):
    write_series(tmp_path / "s", *patient[::2])
    for path in (tmp_path / "s").iterdir():
        change(path, SeriesInstanceUID=None)
    assert list_series(tmp_path / "s").series[0] == ""
    np.testing.assert_array_equal(read_input(tmp_path / "s").hu, patient[0])
    write_series(tmp_path / "t", *patient[::2])
    refused(tmp_path, "(no UID)")
    for path in (tmp_path / "t").iterdir():
        change(path, ImagePositionPatient=None, SeriesNumber=5)
    assert list_series(tmp_path / "t").spacing_mm.isna().all()
    refused(tmp_path / "t", "lacks ImagePositionPatient")


def test_one_file_of_a_series(study, patient):
    scan = read_input(study / "portal" / "3.dcm")
    np.testing.assert_array_equal(scan.hu, patient[0][2:3])
    assert "one slice" in scan.notes[0] and "folder" in scan.notes[0]
    refused(study / "native" / "90.dcm", "localizer")
    refused(study / "portal" / "3.dcm", "no series to choose", series=12)


def test_a_slice_without_thickness_has_no_millilitres(study, tmp_path):
    shutil.copy(study / "portal" / "3.dcm", tmp_path / "3.dcm")
    assert read_input(tmp_path / "3.dcm").source.measured
    change(tmp_path / "3.dcm", SliceThickness=None)
    assert not read_input(tmp_path / "3.dcm").source.measured


def test_many_frames_in_one_file(study, tmp_path):
    shutil.copy(study / "portal" / "3.dcm", tmp_path / "3.dcm")
    change(tmp_path / "3.dcm", NumberOfFrames=2, PixelSpacing=None, ImagePositionPatient=None)  # these stand in sequences there
    refused(tmp_path / "3.dcm", "several frames")


def archive(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def test_a_zip_of_each_kind(study, patient, tmp_path):
    hu, _, affine = patient
    entries = [(f"export/{p.name}", p.read_bytes()) for p in (study / "portal").iterdir()]
    dicom = archive(tmp_path / "My Export.ZIP", [*entries, ("__MACOSX/export/._3.dcm", b"x"), ("export/.DS_Store", b"x"), ("DICOMDIR", b"x")])
    with opened(dicom) as scan:
        np.testing.assert_array_equal(scan.hu, hu)
        assert scan.name == "My Export" and scan.source.path == dicom and len(scan.source.files) == 8
        files = scan.source.files
        assert all(pydicom.dcmread(file, stop_before_pixels=True).Rows == 48 for file in files)
    assert not files[0].exists() and not files[0].parent.exists()
    assert read_input(dicom).source.files == ()
    assert list(list_series(dicom).slices) == [8]
    grey = pngs(tmp_path / "p", window(hu))
    scan = read_input(archive(tmp_path / "p.zip", [(p.name, p.read_bytes()) for p in grey.iterdir()]), spacing_mm=(5, 1, 1))
    np.testing.assert_array_equal(window(scan.hu), window(hu))
    assert scan.source.pictures == () and scan.spacing == (5, 1, 1)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ affine[:, [2, 1, 0, 3]])
    nib.save(image, tmp_path / "a.nii.gz")
    data = (tmp_path / "a.nii.gz").read_bytes()
    np.testing.assert_array_equal(read_input(archive(tmp_path / "a.zip", [("x/a.nii.gz", data)])).hu, hu)
    told = refused(archive(tmp_path / "two.zip", [("x/a.nii.gz", data), ("x/b.nii.gz", data)]), "2 NIfTI files", "two.zip")
    assert "/tmp/rsna_seg-" not in told


def test_a_zip_is_cleaned_up_after_an_error(study, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    path = archive(tmp_path / "a.zip", [(f"{p.name}", p.read_bytes()) for p in (study / "portal").iterdir()])
    with pytest.raises(KeyError), opened(path):
        assert list((tmp_path / "t").iterdir())
        raise KeyError("in the block")
    refused(archive(tmp_path / "b.zip", [("a.txt", b"x")]), "holds no scan", "b.zip")
    assert not list((tmp_path / "t").iterdir())


def test_zips_that_are_refused(study, tmp_path):
    dicom = (study / "portal" / "3.dcm").read_bytes()
    for name in ("../out.dcm", "/out.dcm", "a/../../out.dcm", "C:/out.dcm", "..\\out.dcm"):
        refused(archive(tmp_path / "out.zip", [(name, dicom)]), "leads out of the folder")
    assert not list(tmp_path.parent.rglob("out.dcm"))
    link = zipfile.ZipInfo("secret.dcm")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    refused(archive(tmp_path / "link.zip", [(link, str(study / "portal" / "3.dcm"))]), "secret.dcm is not whole")
    bomb = archive(tmp_path / "bomb.zip", [("a.dcm", bytes(1 << 20))])
    data = bytearray(bomb.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (3 << 30).to_bytes(4, "little")  # what it would unpack to
    bomb.write_bytes(data)
    refused(bomb, "would unpack to 3 GB")
    whole = archive(tmp_path / "whole.zip", [("3.dcm", dicom)]).read_bytes()
    for name, broken in {"cut": whole[:-40], "empty": b"", "text": b"a text", "crc": whole[:90] + bytes(8) + whole[98:]}.items():
        (tmp_path / f"{name}.zip").write_bytes(broken)
        refused(tmp_path / f"{name}.zip", "cannot be unpacked", f"{name}.zip")
    refused(archive(tmp_path / "none.zip", []), "holds no scan")
    locked = bytearray(whole)
    locked[locked.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    refused(tmp_path / "locked.zip", "encrypted")


def test_nifti_that_does_not_say_enough(patient, tmp_path):
    hu, mask, affine = patient
    ras = np.diag([-1.0, -1, 1, 1]) @ affine[:, [2, 1, 0, 3]]

    def saved(name, values, affine, zooms=None):
        image = nib.Nifti1Image(values, affine)
        if zooms:
            image.header.set_zooms(zooms)
        nib.save(image, tmp_path / name)
        return read_input(tmp_path / name)

    assert saved("ct.nii.gz", hu.transpose(2, 1, 0), ras).notes == ()
    assert "a mask of labels" in saved("mask.nii.gz", mask.transpose(2, 1, 0), ras).notes[0]
    assert "rescale intercept" in saved("stored.nii.gz", hu.transpose(2, 1, 0).clip(-1024) + 1024, ras).notes[0]
    eye = saved("eye.nii.gz", hu, np.eye(4))
    assert not eye.source.measured and "left and right may be exchanged" in eye.notes[0]
    bare = saved("bare.nii.gz", hu, None, (2, 1, 1))
    assert bare.source.measured and "left and right" in bare.notes[0]
    for name, shape in (("4d", (4, 4, 4, 3)), ("2d", (4, 4))):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
        refused(tmp_path / f"{name}.nii.gz", f"{name}.nii.gz holds an array of shape {shape}")
    refused(tmp_path, "NIfTI files", "2d.nii.gz")
    refused(tmp_path / "ct.nii.gz", "spacing of its own", spacing_mm=(1, 1, 1))
    refused(tmp_path / "ct.nii.gz", "no series to choose", series=1)
    data = (tmp_path / "ct.nii.gz").read_bytes()
    for cut in (0, 20, len(data) // 2, len(data) - 4):
        (tmp_path / "cut.nii.gz").write_bytes(data[:cut])
        refused(tmp_path / "cut.nii.gz", "cut.nii.gz")


def test_what_is_no_scan(study, tmp_path, monkeypatch):
    refused(tmp_path / "missing", "missing does not exist")
    refused(tmp_path, "holds no scan")
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "a.dcm").write_text("a text")
    refused(tmp_path / "a.txt", "a.txt is no scan")
    refused(tmp_path / "a.dcm", "a.dcm is not whole")
    (tmp_path / "a.dcm").unlink()
    archive(tmp_path / "a.zip", [])
    refused(tmp_path, "holds zip files")
    for none in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ScanError, match="no DICOM file"):
            list_series(none)
    data = (study / "portal" / "3.dcm").read_bytes()
    for cut in (0, 100, 140, 400, len(data) // 2, len(data) - 20):
        (tmp_path / "cut.dcm").write_bytes(data[:cut])
        refused(tmp_path / "cut.dcm", "cut.dcm")

    def forbidden(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(getattr(path, "name", path)))

    with monkeypatch.context() as patch:
        patch.setattr(pydicom, "dcmread", forbidden)
        refused(study / "portal" / "3.dcm", "3.dcm cannot be read: Permission denied")
        refused(study, "cannot be read: Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", forbidden)
        refused(study, "study cannot be read: Permission denied")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_told(study, tmp_path, seed):
    rng = np.random.default_rng(seed)
    data = (study / "portal" / "3.dcm").read_bytes()
    for k in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, 1500 if k % 2 else len(data), 3):
            damaged[at] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(damaged)
        try:
            read_input(tmp_path / "a.dcm")
        except RsnaSegError as error:
            assert "a.dcm" in str(error)


def test_one_scan_or_many(study, patient, tmp_path):
    assert not is_one_scan(study) and is_one_scan(study / "native") and is_one_scan(study / "native" / "90.dcm")
    shutil.copytree(study / "portal", tmp_path / "cd" / "DICOM" / "A")
    (tmp_path / "cd" / "README.txt").write_text("how to view")
    assert is_one_scan(tmp_path / "cd") and len(read_input(tmp_path / "cd").hu) == 8
    nib.save(nib.Nifti1Image(patient[0], np.eye(4)), tmp_path / "cd" / "DICOM" / "A" / "converted.nii.gz")
    assert is_one_scan(tmp_path / "cd")  # a conversion beside the slices is the same scan
    pngs(tmp_path / "cd" / "pictures", window(patient[0]))
    assert not is_one_scan(tmp_path / "cd")
    (tmp_path / "empty").mkdir()
    assert not is_one_scan(tmp_path / "empty")
    with pytest.raises(ScanError, match="does not exist"):
        is_one_scan(tmp_path / "missing")


def test_a_table_of_a_folder(study, patient, tmp_path):
    hu, _, affine = patient
    root = tmp_path / "many"
    shutil.copytree(study, root / "p2")  # three series in folders
    (root / "p10").mkdir()  # two series in one folder
    for name in ("portal", "late"):
        for path in (study / name).iterdir():
            shutil.copy(path, root / "p10" / f"{name}{path.name}")
            change(root / "p10" / f"{name}{path.name}", SeriesInstanceUID=f"1.2.{name == 'late':d}7")
    shutil.copytree(study / "portal", root / "p1" / "DICOM" / "x")  # one, deep down
    for path in (root / "p1" / "DICOM" / "x").iterdir():
        change(path, SeriesInstanceUID="1.2.3")
    (root / "p1" / "DICOM" / "y").mkdir()  # the same series goes on in another folder
    (root / "p1" / "DICOM" / "x" / "8.dcm").rename(root / "p1" / "DICOM" / "y" / "8.dcm")
    nib.save(nib.Nifti1Image(hu, np.eye(4)), root / "P1.nii.gz")
    pngs(root / "pictures of a scan", window(hu))
    archive(root / "z.zip", [("a.txt", b"")])
    (root / "broken").mkdir()
    (root / "broken" / "1.dcm").write_text("a text")
    (root / "notes.txt").write_text("a text")
    (root / "empty").mkdir()
    table = scan_table(root)
    assert sorted(table.name) == ["P1", "broken", "p10_12", "p10_17", "p1_2", "p2_late", "p2_native", "p2_portal", "pictures-of-a-scan", "z"]
    rows = table.set_index("name")
    for name in ("p1_2", "p10_12", "p2_portal"):
        np.testing.assert_array_equal(read_input(rows.path[name], rows.series[name]).hu, hu)
    refused(rows.path["broken"], "1.dcm is not whole")
    alone = scan_table(study / "portal")
    assert list(alone.name) == ["portal"] and alone.path[0] == study / "portal"
    assert list(scan_table(root / "P1.nii.gz").name) == ["P1"]
    with pytest.raises(DataError, match="holds no scan"):
        scan_table(root / "empty")
    with pytest.raises(ScanError, match="does not exist"):
        scan_table(root / "missing")


def test_links_are_followed_but_not_in_a_circle(study, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "ann").symlink_to(study / "portal", target_is_directory=True)
    (tmp_path / "all" / "again").symlink_to(tmp_path / "all", target_is_directory=True)
    table = scan_table(tmp_path / "all")
    assert list(table.name) == ["ann"] and len(read_input(table.path[0]).hu) == 8


def test_kaggle_is_not_opened(tmp_path, monkeypatch):
    write_kaggle(tmp_path / "k", patients=2, size=16, slices=4)
    series = sorted(p.relative_to(tmp_path / "k" / "train_images").parts for p in (tmp_path / "k").glob("train_images/*/*"))
    monkeypatch.setattr(pydicom, "dcmread", None)
    for root in (tmp_path / "k", tmp_path / "k" / "train_images"):
        assert not is_one_scan(root)
        table = scan_table(root)
        assert list(table.name) == ["_".join(s) for s in series] and set(table.series) == {""}


def test_a_table_in_a_file(study, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(study / "portal", tmp_path / folder / "ct")

    def table(text, encoding="utf-8"):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        return scan_table(tmp_path / "t.csv")

    full = table("Name,PATH,series,spacing,age\nann,a/ct,12,,50\n\nörn/2,b/ct,,5 0.8 0.8,\n", "utf-8-sig")
    assert list(full.name) == ["ann", "örn-2"] and list(full.series) == ["12", ""] and list(full.spacing) == [None, (5, 0.8, 0.8)]
    assert full.path[0] == tmp_path / "a" / "ct" and not is_one_scan(tmp_path / "t.csv")
    assert table(f"path;spacing\n{tmp_path / 'a' / 'ct'};5x0.8x0.8\n").spacing[0] == (5, 0.8, 0.8)
    assert table('path,spacing\na/ct,"5, 0.8, 0.8"\n').spacing[0] == (5, 0.8, 0.8)
    for text, why in {
        "path\na/ct\nb/ct\n": "lines 2 and 3: both scans are named ct",
        "path,name\na/ct,Ann\n\nb/ct,ann\n": "lines 2 and 4: both scans are named ann",
        "path\na/ct\nc/ct\n": "line 3: ",
        "name,file\nx,a/ct\n": "no column path, but name, file",
        "": "no column path, but is empty",
        "path,name\n,ann\n": "line 2: the path is empty",
        "path\n": "lists no scan",
        "path,name\na/ct,b,c\n": "Expected 2 fields in line 2, saw 3",
        "path,spacing\na/ct,5 0.8\n": "line 2: The spacing 5 0.8 is not three",
        "path,spacing\na/ct,5 0.8 -1\n": "line 2: The spacing",
    }.items():
        with pytest.raises(DataError) as told:
            table(text)
        assert why in str(told.value) and "t.csv" in str(told.value)
    with pytest.raises(DataError, match="UTF-8"):
        table("path,name\na/ct,örn\n", "utf-16")
    assert list(table("path,name\na/ct,../../x\nb/ct,..\n").name) == ["x", "scan"]


def test_real_series(real_ct, tmp_path):
    series = real_ct / "ct3slice" / "series"
    scan = read_input(series)
    np.testing.assert_array_equal(scan.hu, read_scan(series).hu)
    np.testing.assert_array_equal(read_input(real_ct / "ct3slice").hu, scan.hu)  # the SEG beside it is left out
    assert "SEG" in read_input(real_ct / "ct3slice").notes[0]
    with opened(shutil.make_archive(tmp_path / "portal", "zip", real_ct / "ct3slice")) as same:
        np.testing.assert_array_equal(same.hu, scan.hu)
        assert len(same.source.files) == 3 and "rsna_seg-" not in " ".join(same.notes)
    one = read_input(series / "02.dcm")
    np.testing.assert_array_equal(one.hu, scan.hu[1:2])


def test_real_folders_that_are_no_series(real_ct):
    told = refused(real_ct / "dicom_syntaxes", "lie at the same position")
    assert "\n" not in told
    table = list_series(real_ct / "dicom_geometry")
    told = refused(real_ct / "dicom_geometry", f"{len(table)} CT series")
    assert len(told.splitlines()) == len(table) + 2
    for row in table.itertuples():
        if "notavolume" not in row.folder:
            assert len(read_input(real_ct / "dicom_geometry", row.series).hu) == row.slices
    refused(real_ct / "curvas_png", "PNGs in images", "give the folder of one scan")


def test_real_pngs_and_nifti(real_ct):
    folder = real_ct / "curvas_png" / "images"
    one = sorted(folder.iterdir())[3]
    np.testing.assert_array_equal(window(read_input(one).hu)[0], cv2.imread(str(one), cv2.IMREAD_GRAYSCALE))
    scan = read_input(folder)
    assert scan.hu.shape == (108, 512, 512) and scan.source.pictures[3] == one
    case = real_ct / "totalseg_example"
    assert read_input(case / "ct.nii.gz").notes == ()
    assert "mask of labels" in read_input(case / "segmentation.nii.gz").notes[0]
    assert list(scan_table(case).name) == ["ct"]  # the mask beside it is no scan
