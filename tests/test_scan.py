"Geometry and pixel formats of DICOM: what is written at a place in the patient is read at that place, or refused by name."

import gzip
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless, RLELossless
from scipy.spatial.transform import Rotation

from rsna_seg.ct.dicom import read_scan, read_seg
from rsna_seg.ct.nifti import read_mask, save_nifti
from rsna_seg.ct.phantom import ENCODINGS, write_mask, write_series
from rsna_seg.ct.scan import Grid, mid_planes, on_grid
from rsna_seg.files import ScanError

SHAPE = (6, 5, 7)  # slices, rows, columns
PLAIN = {"flip": False, "falling": False, "first": 1, "encoding": ENCODINGS[0], "nifti": False}


@pytest.fixture
def volume():
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


@pytest.fixture
def affine():
    "Axial slices of 3 mm, pixels of 0.8 by 0.7 mm, as most scanners write them."
    return np.array([[0, 0, 0.7, -120], [0, 0.8, 0, -90], [3, 0, 0, 40], [0, 0, 0, 1.0]])


def edit(folder, change, number=None):
    "Changes the datasets of a series, or one of them, in place."
    for path in sorted(folder.glob("*.dcm")) if number is None else [folder / f"{number}.dcm"]:
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path)
    return folder


def values_at(scan, places):
    "HU at places in the patient, (n, 3) in LPS mm, which must be voxel centres."
    index = np.column_stack([places, np.ones(len(places))]) @ np.linalg.inv(scan.affine).T
    assert np.abs(index - index.round()).max() < 0.02
    return scan.hu[tuple(index[:, :3].round().astype(int).T)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turn=st.tuples(*[st.floats(-180, 180)] * 3), spacing=st.tuples(*[st.floats(0.4, 6)] * 3), lean=st.floats(-0.4, 0.4),
    flip=st.booleans(), falling=st.booleans(), first=st.integers(1, 400), encoding=st.sampled_from(ENCODINGS), nifti=st.booleans(),
)  # fmt: skip
@example(turn=(45.0, 0.0, 0.0), spacing=(2.0, 3.0, 4.0), lean=0.375, **PLAIN)  # a sheared plane
@example(turn=(0.0, 45.0, 0.0), spacing=(1.0, 1.0, 1.0), lean=0.0, **PLAIN)  # which axis is nearest is a toss
def test_every_voxel_stays_at_its_place_in_the_patient(
    tmp_path_factory, volume, turn, spacing, lean, flip, falling, first, encoding, nifti
):
    "Any orientation, spacing, tilt and order of instances."
    down, across, normal = Rotation.from_euler("xyz", turn, degrees=True).as_matrix().T
    step = (normal * (-1 if flip else 1) + lean * down) * spacing[0]
    affine = np.eye(4)
    affine[:3] = np.column_stack([step, down * spacing[1], across * spacing[2], [12.5, -80, 300]])
    folder = tmp_path_factory.mktemp("series")
    if nifti:
        source = write_mask(folder / "ct.nii", volume, affine, "PIR")
    else:
        source = write_series(folder / "s", volume, affine, encoding, first, falling)
    scan = read_scan(source)
    index = np.array(list(np.ndindex(SHAPE)))
    places = np.column_stack([index, np.ones(len(index))]) @ affine.T
    written = volume if nifti else np.clip(volume, *_range(encoding))
    np.testing.assert_array_equal(values_at(scan, places[:, :3]), written.ravel())
    assert abs(scan.slice_ml.sum() - SHAPE[0] * abs(np.linalg.det(affine[:3, :3])) / 1000 * len(scan.hu) / SHAPE[0]) < 1e-2
    axes = np.abs(scan.affine[[2, 1, 0], [0, 1, 2]])
    assert (scan.affine[[2, 1, 0], [0, 1, 2]] > 0).all() or axes.min() < 1e-2 * axes.max()
    mask = (scan.hu > 0).astype(np.uint8)
    again = read_mask(save_nifti(mask, scan, folder / "mask.nii.gz"), scan)
    np.testing.assert_array_equal(again, mask)


def _range(encoding):
    "The lowest and highest HU that fit into a stored word."
    signed, bits, intercept = encoding
    return (-(2 ** (bits - 1)) + intercept, 2 ** (bits - 1) - 1 + intercept) if signed else (intercept, 2**bits - 1 + intercept)


def test_tilt_is_kept_and_reported(volume, affine, tmp_path):
    affine[1, 0] = 0.25 * affine[2, 0]
    scan = read_scan(write_series(tmp_path / "s", volume, affine))
    np.testing.assert_allclose(scan.affine, affine, atol=1e-3)
    assert scan.tilt_deg == pytest.approx(np.degrees(np.arctan(0.25)), abs=0.01)
    assert "tilted by 14.0 degrees" in " ".join(scan.notes)
    assert scan.slice_mm == pytest.approx(3.0)  # between the planes, not along the lean


def test_uneven_slices_keep_their_true_positions(volume, affine, tmp_path):
    for k, z in enumerate((0, 3, 6, 7, 8, 20)):
        place = affine.copy()
        place[2, 3] += z
        write_series(tmp_path / "s", volume[k : k + 1], place, first=k + 1)
    scan = read_scan(tmp_path / "s")
    np.testing.assert_allclose(scan.positions, np.array((0, 3, 6, 7, 8, 20)) + 40, atol=1e-3)
    np.testing.assert_allclose(scan.slice_mm, (3, 3, 2, 1, 6.5, 12), atol=1e-3)
    np.testing.assert_array_equal(scan.hu, volume)
    assert "slices may be missing" in " ".join(scan.notes)
    for step in (3.0, 4.0, 12.0):  # a NIfTI has one step: the first, the mean or the last
        single = affine.copy()
        single[2, 0] = step
        if step == 12.0:
            single[2, 3] += 20 - 5 * step
        mask = (volume > 0).astype(np.uint8)
        np.testing.assert_array_equal(read_mask(write_mask(tmp_path / "m.nii", mask, single), scan), mask)


def test_real_geometry(real_ct):
    tilted = read_scan(real_ct / "dicom_geometry" / "gantrytilting_001")
    assert tilted.tilt_deg == pytest.approx(14.0, abs=0.01) and tilted.slice_mm == pytest.approx(5 * np.cos(np.radians(14)), abs=1e-3)
    gap = read_scan(real_ct / "dicom_geometry" / "sliceincrement_001")
    np.testing.assert_allclose(np.diff(gap.positions), (5, 5, 10), atol=1e-3)
    both = read_scan(real_ct / "dicom_geometry" / "sliceincrement_002")
    assert both.tilt_deg > 15 and len(both.notes) == 2
    with pytest.raises(ScanError, match="001.dcm and .*002.dcm lie at the same position"):
        read_scan(real_ct / "dicom_geometry" / "notavolume_001")


def test_real_seg_equals_its_nrrd(real_ct):
    scan = read_scan(real_ct / "ct3slice" / "series")
    mask = read_seg([real_ct / "ct3slice" / "ct3slice_liver_seg.dcm"], scan)
    header, data = (real_ct / "ct3slice" / "ct3slice_liver_seg.nrrd").read_bytes().split(b"\n\n", 1)
    assert b"sizes: 512 512 3" in header and b"encoding: gzip" in header
    np.testing.assert_array_equal(mask == 1, np.frombuffer(gzip.decompress(data), "<i2").reshape(3, 512, 512) != 0)


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless])
def test_transfer_syntaxes(volume, affine, tmp_path, syntax):
    volume = np.kron(volume, np.ones((1, 16, 16), np.int16))
    folder = write_series(tmp_path / "s", volume, affine, ENCODINGS[0], compress=False)
    for path in folder.glob("*.dcm"):
        stored = pydicom.dcmread(path)
        dataset = pydicom.Dataset(stored)  # forgets how it was stored
        dataset.file_meta = stored.file_meta
        if syntax in (RLELossless, JPEG2000Lossless):
            dataset.compress(syntax, encoding_plugin="pylibjpeg")
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
        dataset.save_as(path, implicit_vr=False, little_endian=syntax != ExplicitVRBigEndian, enforce_file_format=True)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_scan(folder).hu, volume)


def test_padding_becomes_air(volume, affine, tmp_path):
    folder = write_series(tmp_path / "s", volume, affine, (1, 16, 0), compress=False)

    def pad(dataset):
        words = np.frombuffer(dataset.PixelData, "<i2").copy()
        words[:4] = (3000, 3001, 2999, -2000)
        dataset.PixelData = words.tobytes()
        dataset.add_new("PixelPaddingValue", "SS", 3000)
        dataset.add_new("PixelPaddingRangeLimit", "SS", 3001)

    scan = read_scan(edit(folder, pad))
    np.testing.assert_array_equal(scan.hu.reshape(6, -1)[:, :4], [(-1024, -1024, 2999, -2000)] * 6)


def test_anonymised_headers_are_read(volume, affine, tmp_path):
    def strip(dataset):
        dataset.SOPClassUID = ""
        dataset.pop("Modality", None)
        dataset.pop("InstanceNumber", None)

    np.testing.assert_array_equal(read_scan(edit(write_series(tmp_path / "s", volume, affine), strip)).hu, volume)


def test_localizers_and_reports_are_left_out(volume, affine, tmp_path):
    folder = write_series(tmp_path / "s", volume, affine)
    for name, tag, value in (("90.dcm", "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), ("91.dcm", "Modality", "SR")):
        dataset = pydicom.dcmread(folder / "3.dcm")
        dataset.SeriesInstanceUID += ".9"
        setattr(dataset, tag, value)
        dataset.save_as(folder / name)
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.hu, volume)
    assert len(scan.notes) == 2 and "90.dcm is left out: it is localizer" in scan.notes[0]
    with pytest.raises(ScanError, match="90.dcm holds no CT slice.*localizer"):
        read_scan(folder / "90.dcm")


REFUSED = {
    "lacks PixelSpacing": lambda d: d.pop("PixelSpacing"),
    "lacks ImageOrientationPatient": lambda d: setattr(d, "ImageOrientationPatient", None),
    "holds several frames": lambda d: setattr(d, "NumberOfFrames", 2),
    "stored as MONOCHROME1, not as MONOCHROME2": lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1"),
    "no RescaleSlope and RescaleIntercept": lambda d: d.update({"RescaleSlope": None, "ModalityLUTSequence": [pydicom.Dataset()]}),
    "differ in PixelSpacing": lambda d: setattr(d, "PixelSpacing", [2, 2]),
    "differ in Rows": lambda d: setattr(d, "Rows", 4),
    "cannot be": lambda d: setattr(d, "PixelSpacing", [0, 0.7]),
    "has no pixels": lambda d: d.pop("PixelData"),
    "lie at the same position": lambda d: d.update({"ImagePositionPatient": [-120, -90, 40], "SOPInstanceUID": "1.2.3"}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_refused_by_name(volume, affine, tmp_path, says):
    folder = write_series(tmp_path / "s", volume, affine, compress=False)
    with pytest.raises(ScanError, match=says) as error:
        read_scan(edit(folder, REFUSED[says], number=4))
    assert str(folder / "4.dcm") in str(error.value)


def test_cut_files_are_named(volume, affine, tmp_path):
    for size in (0, 100, 400, 700, 1000):
        folder = write_series(tmp_path / f"s{size}", np.repeat(volume, 40, axis=2), affine, compress=False)
        path = folder / "2.dcm"
        assert path.stat().st_size > 2000
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ScanError) as error:
            read_scan(folder)
        assert str(path) in str(error.value)


def test_a_scan_says_what_it_is(volume, affine, tmp_path):
    affine[1, 0] = 0.25 * affine[2, 0]
    scan = replace(read_scan(write_series(tmp_path / "s", volume, affine)), name="<b>")
    html = scan._repr_html_()
    assert "&lt;b&gt;" in html and "6 slices of 5 × 7 pixels, 3.09 × 0.80 × 0.70 mm, LPS" in html
    assert "<li>The gantry was tilted by 14.0 degrees" in html
    unmeasured = replace(scan, source=replace(scan.source, measured=False))
    assert "without a known spacing" in unmeasured._repr_html_()


def test_the_planes_stand_upright():
    "A bright block at the head, the back and the patient's left is at the right edges, and at the top."
    hu = np.full((40, 40, 40), -1000, np.int16)
    hu[20:, 20:, 20:] = 500
    grid = Grid("memory", hu.shape, np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]))
    axial, coronal, sagittal = np.split(mid_planes(on_grid(hu, grid), height=120)[..., 0], 3, axis=1)
    assert axial[110, 110] == 255 and axial[10, 110] == axial[110, 10] == 0  # the letters are half way down
    for upright in (coronal, sagittal):
        assert upright[10, 110] == 255 and upright[110, 110] == upright[10, 10] == 0
    assert axial[50:70, 2:20].max() > 200  # R
