"Headers as people have them: mended, doubted in a note, or refused by name. SimpleITK is the independent reader."

import base64
import shutil
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.encaps import encapsulate
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    ExplicitVRBigEndian, ExplicitVRLittleEndian, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL, ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage, generate_uid,
)  # fmt: skip

from rsna_seg.anatomy.checks import check_segmentation
from rsna_seg.anatomy.inspect import inspect_data, summarise
from rsna_seg.app.commands import Predict
from rsna_seg.ct.dicom import read_scan, read_seg
from rsna_seg.ct.find import file_kind
from rsna_seg.ct.inputs import read_input, scan_table
from rsna_seg.ct.nifti import read_mask, read_organ_masks, save_nifti
from rsna_seg.ct.outputs import save_dicom_seg
from rsna_seg.ct.phantom import ENCODINGS, write_kaggle, write_mask, write_series
from rsna_seg.ct.scan import in_source_order
from rsna_seg.ct.series import list_series
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.files import RsnaSegError

SHAPE = (6, 20, 24)  # slices, rows, columns


@pytest.fixture
def volume():
    "Air around a body of 10 HU with an organ of 120."
    z, row, col = np.indices(SHAPE)
    hu = np.where((row - 10) ** 2 + (col - 12) ** 2 < 60, 10, -1000).astype(np.int16)
    hu[2:5, 6:12, 6:11] = 120
    return hu


@pytest.fixture
def affine():
    return np.array([[0, 0, 1.25, -15], [0, 1.5, 0, -14], [4.0, 0, 0, 100], [0, 0, 0, 1]])


@pytest.fixture
def series(volume, affine, tmp_path):
    return write_series(tmp_path / "s", volume, affine, ENCODINGS[0], compress=False)


def edit(folder, change, *names):
    "Changes the datasets of a series, or those of these names, in place."
    for path in sorted(folder.glob("*.dcm")):
        if not names or path.stem in names:
            dataset = pydicom.dcmread(path)
            change(dataset)
            dataset.save_as(path)
    return folder


def told(path, read=read_input):
    "The sentence with which a path is refused."
    with pytest.raises(RsnaSegError) as error:
        read(path)
    return str(error.value)


def with_header(path, new, **fields):
    "A NIfTI file with some fields of its header replaced, byte for byte."
    data = path.read_bytes()
    header = np.frombuffer(data[:348], nib.nifti1.header_dtype).copy()
    for field, value in fields.items():
        header[field] = value
    new.write_bytes(header.tobytes() + data[348:])
    return new


def in_units(affine, times, code):
    "The fields of a header whose lengths are given in another unit."
    ras = np.diag([-1, -1, 1, 1]) @ affine[:, [2, 1, 0, 3]]
    rows = {f"srow_{axis}": row * times for axis, row in zip("xyz", ras)}
    return rows | {"xyzt_units": code, "pixdim": [1, 1.25 * times, 1.5 * times, 4 * times, 0, 0, 0, 0]}


HALF = np.float32(np.sqrt(0.5 * 1.000001))  # a rotation rounded past what can be
MENDED = {
    "micrometres": lambda affine: in_units(affine, 1000, 3),
    "metres": lambda affine: in_units(affine, 0.001, 1),
    "metres and seconds": lambda affine: in_units(affine, 0.001, 1 + 8),
    "first voxel at 0": lambda affine: {"vox_offset": 0},
    "first voxel at 100": lambda affine: {"vox_offset": 100},
    "rotation past 1": lambda affine: {"sform_code": 0, "qform_code": 1, "quatern_b": HALF, "quatern_c": HALF, "quatern_d": 0},
    "sform of zeros": lambda affine: {"qform_code": 1, "srow_x": 0, "srow_y": 0, "srow_z": 0, "qoffset_x": 7},
    "negative distances": lambda affine: {"pixdim": [1, -1.25, -1.5, -4, 0, 0, 0, 0]},
}


@pytest.mark.parametrize("kind", MENDED)
def test_nifti_headers_are_mended_as_simpleitk_reads_them(volume, affine, tmp_path, kind):
    sitk = pytest.importorskip("SimpleITK")
    path = write_mask(tmp_path / "plain.nii", volume, affine, "LPS")
    path = with_header(path, tmp_path / "ct.nii", **MENDED[kind](affine))
    scan, image = read_input(path), sitk.ReadImage(path)
    stored = in_source_order(scan.hu, scan).T
    assert scan.notes == () and scan.source.measured and set(np.unique(stored)) == {-1000, 10, 120}
    if "voxel" not in kind:  # SimpleITK takes the header's last four bytes for voxels there
        np.testing.assert_array_equal(stored, sitk.GetArrayFromImage(image))
    if "negative" in kind:  # SimpleITK turns the axes; the sform does not
        return np.testing.assert_array_equal(scan.hu, volume)
    directions = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    ours = np.diag([-1, -1, 1, 1]) @ scan.source.affine
    np.testing.assert_allclose(ours[:3, :3], directions, atol=1e-4)
    np.testing.assert_allclose(ours[:3, 3], image.GetOrigin(), atol=1e-3)
    mask = (scan.hu > 100).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(save_nifti(mask, scan, tmp_path / "mask.nii"), scan), mask)
    written = sitk.ReadImage(tmp_path / "mask.nii")
    np.testing.assert_allclose(written.GetSpacing(), image.GetSpacing(), rtol=1e-4)


def test_a_mask_in_metres_lies_where_it_lies(volume, affine, tmp_path):
    scan, mask = read_scan(write_mask(tmp_path / "ct.nii", volume, affine)), (volume > 100).astype(np.uint8)
    here = with_header(write_mask(tmp_path / "m.nii", mask, affine, "LPS"), tmp_path / "here.nii", **in_units(affine, 0.001, 1))
    np.testing.assert_array_equal(read_mask(here, scan), mask)
    affine[2, 3] += 100
    there = with_header(tmp_path / "m.nii", tmp_path / "there.nii", **in_units(affine, 0.001, 1))
    assert "lies 100.0 mm away" in told(there, lambda path: read_mask(path, scan))


DOUBTED = {
    "volumes are voxels, not ml": {"sform_code": 0, "qform_code": 1, "pixdim": [1, 1.25, 1.5, 0, 0, 0, 0, 0]},
    "another size of voxels in its sform": {"pixdim": [1, 1.25, 1.5, 0, 0, 0, 0, 0]},
    "mirror images; the sform is taken, and left and right": {"qform_code": 1, "pixdim": [-1, 1.25, 1.5, 4, 0, 0, 0, 0]},
    "does not say how it lies; LAS is taken": {"sform_code": 0, "qform_code": 0},
}


@pytest.mark.parametrize("says", DOUBTED)
def test_what_a_nifti_leaves_open_is_said(volume, affine, tmp_path, says):
    path = with_header(write_mask(tmp_path / "plain.nii", volume, affine, "RAS"), tmp_path / "ct.nii", **DOUBTED[says])
    scan = read_scan(path)
    assert len(scan.notes) == 1 and says in scan.notes[0] and "ct.nii" in scan.notes[0]
    assert scan.source.measured == ("voxels, not ml" not in says)


def test_nifti_of_no_grey_values(tmp_path):
    for values in (np.zeros((4, 4, 4), np.complex64), np.zeros((4, 4, 4, 3), np.int16)):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
        assert "one grey volume is needed" in told(tmp_path / "a.nii")
    path = tmp_path / "a.nii"
    assert "one grey volume is needed" in told(with_header(path, path, datatype=7))


def test_masks_with_a_scale_factor(volume, affine, tmp_path):
    scan, mask = read_scan(write_mask(tmp_path / "ct.nii", volume, affine)), (volume > 100).astype(np.uint8)
    path = write_mask(tmp_path / "liver.nii", mask, affine)
    read = lambda path: (read_mask(path, scan), read_organ_masks([path], scan))
    for slope in (1.0000004, 0.9995, 1.0):
        for classes in read(with_header(path, path, scl_slope=slope, scl_inter=0)):
            np.testing.assert_array_equal(classes, mask)
    assert "no whole numbers" in told(with_header(path, path, scl_slope=0.5), lambda path: read_mask(path, scan))
    assert "no whole numbers" in told(path, lambda path: read_organ_masks([path], scan))
    write_mask(path, np.where(mask > 0, 1, np.nan).astype(np.float32), affine)
    for reader in (lambda path: read_mask(path, scan), lambda path: read_organ_masks([path], scan)):
        assert "write 0 for NaN" in told(path, reader)


LOST = {
    "absent": lambda d: (d.pop("RescaleSlope", None), d.pop("RescaleIntercept", None)),
    "empty": lambda d: d.update({"RescaleSlope": None, "RescaleIntercept": None}),
    "slope 0": lambda d: setattr(d, "RescaleSlope", 0),
    "no intercept": lambda d: d.pop("RescaleIntercept", None),
}


@pytest.mark.parametrize("kind", LOST)
def test_slices_that_lost_their_rescale(volume, series, kind):
    edit(series, LOST[kind], "2", "5")
    for scan in (read_scan(series), read_input(series)):
        np.testing.assert_array_equal(scan.hu, volume)
        assert len(scan.notes) == 1 and "nor have 1 more slices; the other slices' are taken, 1 and -1024" in scan.notes[0]
    edit(series, lambda d: setattr(d, "RescaleIntercept", -1000), "1")  # now the others disagree
    assert "2.dcm has no RescaleSlope and RescaleIntercept" in told(series)
    edit(series, LOST[kind])
    assert "its values are no HU" in told(series) and "its values are no HU" in told(series / "1.dcm")


def test_a_table_in_place_of_the_rescale_is_refused(series):
    def table(dataset):
        LOST["absent"](dataset)
        item = pydicom.Dataset()
        item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [4096, 0, 16], "HU", np.arange(4096, dtype="<u2").tobytes()
        dataset.ModalityLUTSequence = [item]

    assert "3.dcm has no RescaleSlope" in told(edit(series, table, "3"))


def test_prepare_and_inspect_say_what_is_no_hu(tmp_path):
    write_kaggle(tmp_path / "k", patients=3, size=48, slices=8)
    first, second, *_ = sorted((tmp_path / "k").glob("train_images/*/*"))
    config = PrepareConfig(size=48, valid=0, jobs=1)
    edit(first, LOST["absent"])
    edit(second, LOST["absent"], sorted(second.glob("*.dcm"))[3].stem)
    data = prepare(tmp_path / "k", tmp_path / "d", config=config)
    assert "its values are no HU" in data.skipped.reason.iloc[0] and len(data.skipped) == 1
    assert any("other slices' are taken" in note for note in data.info["notes"])
    for kind in ("images", "masks"):
        (tmp_path / "n" / kind).mkdir(parents=True)
    scan, mask = read_scan(second), read_scan(second).hu * 0
    save_nifti(scan.hu + 1024, scan, tmp_path / "n" / "images" / "a.nii", np.int16)
    save_nifti(mask, scan, tmp_path / "n" / "masks" / "a.nii")
    data = prepare(tmp_path / "n", tmp_path / "e", config=config)
    assert "without the rescale intercept" in data.info["notes"][0]
    assert "without the rescale intercept" in " ".join(summarise(inspect_data(tmp_path / "e")))


def test_values_that_cannot_be_hu_are_doubted_whatever_the_file(volume, affine, tmp_path):
    for name, values in {"raw": volume.astype(int) * 16 + 16000, "up": volume + 1000}.items():
        folder = write_series(tmp_path / name, values.astype(np.int32), affine, (0, 16, 0), compress=False)
        assert "no air" in read_scan(folder).notes[0] and "no air" in read_scan(folder / "1.dcm").notes[0]
        path = write_mask(tmp_path / f"{name}.nii", values.astype(np.int32), affine)
        assert "no air" in read_scan(path).notes[0]
    dense = np.where(volume > 0, 30000, volume).astype(np.int16)
    assert "denser than bone" in read_scan(write_mask(tmp_path / "mr.nii", dense, affine)).notes[0]
    assert read_scan(write_mask(tmp_path / "ct.nii", volume, affine)).notes == ()


@pytest.mark.parametrize("cosines", [(2, 0, 0, 0, 2, 0), (1, 0, 0, 0, 0.5, 0), (1, 0, 0, 0, 0, 0), (1, 0, 0, 0.1, 1, 0), (1, 0, 0, 1, 0, 0)])
def test_directions_that_cannot_be_are_refused(series, cosines):
    edit(series, lambda d: setattr(d, "ImageOrientationPatient", list(cosines)))
    assert "ImageOrientationPatient that cannot be" in told(series)


@pytest.fixture
def study(volume, affine, tmp_path):
    "Two series, each in a folder of its own, with an item of a sequence before what a slice needs."
    for name in ("native", "portal"):
        write_series(tmp_path / "study" / name, volume, affine, ENCODINGS[0], compress=False)

        def add(dataset):
            item = pydicom.Dataset()
            item.CodeMeaning = "x" * 60
            item.is_undefined_length_sequence_item = True
            dataset.ProcedureCodeSequence = [item]  # group 8: comes early
            dataset["ProcedureCodeSequence"].is_undefined_length = True
            dataset.SeriesDescription = name

        edit(tmp_path / "study" / name, add)
    return tmp_path / "study"


CUT = {
    "within a sequence": lambda data: data[: data.index(b"x" * 60) + 30],
    "after the item": lambda data: data[: data.index(b"x" * 60) + 60],
    "after the file's meta": lambda data: data[: 144 + int.from_bytes(data[140:144], "little")],
    "before the series": lambda data: data[: data.index(b"\x18\x00\x50\x00")],
    "no DICOM": lambda data: b"<html>" + bytes(200),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_file_is_named_and_the_others_go_on(volume, study, tmp_path, capsys, kind):
    cut = study / "native" / "3.dcm"
    cut.write_bytes(CUT[kind](cut.read_bytes()))
    assert "native/3.dcm is not whole" in told(study / "native") and "native/3.dcm is not whole" in told(study / "native", read_scan)
    table = list_series(study)
    assert sorted(table.slices) == [5, 6] and "native/3.dcm is not whole" in table.attrs["notes"][0]
    Predict((study,), list_series=True).run()  # alone, or where the other words are given too
    assert Predict(("c.pth", study, "out"), list_series=True).scan == study
    assert "native/3.dcm is not whole" in capsys.readouterr().out
    whole = table.series[table.slices == 6].iloc[0]
    np.testing.assert_array_equal(read_input(study, whole).hu, volume)
    assert "native/3.dcm is not whole" in read_input(study, whole).notes[0]
    rows = scan_table(study).set_index("name")
    assert sorted(rows.index) == ["native", "portal"]
    np.testing.assert_array_equal(read_input(rows.path["portal"], rows.series["portal"]).hu, volume)
    assert "native/3.dcm is not whole" in told(rows.path["native"], lambda path: read_input(path, rows.series["native"]))


def test_a_cut_file_among_many_series_in_one_folder(volume, study, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in study.rglob("*.dcm"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    (flat / "native3.dcm").write_bytes((flat / "native3.dcm").read_bytes()[:500])
    for uid in list_series(flat).series:
        assert "native3.dcm is not whole" in read_input(flat, uid).notes[0]


def test_prepare_of_a_tree_with_seg_leaves_out_the_cut_series_only(study, volume, tmp_path):
    for folder in study.iterdir():
        edit(folder, lambda d: setattr(d, "PatientID", folder.name))
        save_dicom_seg((volume > 100).astype(np.uint8), read_scan(folder), tmp_path / f"{folder.name}.dcm")
    for name in ("native", "portal"):
        shutil.move(tmp_path / f"{name}.dcm", study / f"{name}_seg.dcm")
    cut = study / "native" / "3.dcm"
    cut.write_bytes(cut.read_bytes()[:500])
    data = prepare(study, tmp_path / "data", config=PrepareConfig(size=48, valid=0, jobs=1))
    assert set(data.manifest.patient) == {"portal"} and len(data.manifest) == 6
    assert "native/3.dcm is not whole" in data.skipped.reason.iloc[0] and len(data.skipped) == 1


def test_maps_of_spectral_ct_are_named(volume, series):
    edit(series, lambda d: setattr(d, "RescaleType", "MGML"))
    assert "holds MGML, not HU" in read_scan(series).notes[0]
    edit(series, lambda d: setattr(d, "RescaleType", "US"))  # unspecified
    assert read_scan(series).notes == ()


@pytest.mark.parametrize("seed", range(2))
def test_nifti_with_damaged_headers_are_told(volume, affine, tmp_path, seed):
    rng, data = np.random.default_rng(seed), write_mask(tmp_path / "ct.nii", volume, affine).read_bytes()
    for _ in range(100):
        damaged = bytearray(data)
        for at in rng.integers(0, 348, rng.integers(1, 5)):
            damaged[at] = rng.integers(256)
        (tmp_path / "a.nii").write_bytes(damaged)
        try:
            read_input(tmp_path / "a.nii")
        except RsnaSegError as error:
            assert "a.nii" in str(error)


def test_two_axes_that_run_the_same_way_are_no_affine(volume, affine, tmp_path):
    path = write_mask(tmp_path / "ct.nii", volume, affine, "LPS")
    rows = {"srow_x": [-1, -1, 0, 5], "srow_y": [1, 1.0001, 0, 5], "srow_z": [0, 0, 4, 5]}
    assert "no usable affine" in told(with_header(path, path, **rows))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("name", ["{}.dcm", "IM{:04d}"])
def test_files_without_the_mark_of_dicom(volume, affine, series, tmp_path, syntax, name):
    (tmp_path / "bare").mkdir()
    for k, path in enumerate(sorted(series.iterdir())):
        dataset, file = pydicom.dcmread(path), pydicom.filebase.DicomBytesIO()
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype("<u2" if syntax.is_little_endian else ">u2").tobytes()
        file.is_little_endian, file.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
        write_dataset(file, pydicom.Dataset(dataset))
        (tmp_path / "bare" / name.format(k)).write_bytes(file.getvalue())
        assert file_kind(tmp_path / "bare" / name.format(k)) == "DICOM"
    for read in (read_scan, read_input):
        scan = read(tmp_path / "bare")
        np.testing.assert_array_equal(scan.hu, volume)
        np.testing.assert_allclose(scan.affine, affine, atol=1e-3)
    mask = (scan.hu > 100).astype(np.uint8)
    np.testing.assert_array_equal(read_seg([save_dicom_seg(mask, scan, tmp_path / "seg.dcm")], scan), mask)


def test_uids_and_numbers_that_are_lists(volume, series):
    edit(series, lambda d: d.update({"SeriesInstanceUID": ["1.2", "3.4"], "AcquisitionNumber": [1, 2], "SliceThickness": ""}))
    np.testing.assert_array_equal(read_input(series).hu, volume)
    assert list(list_series(series).slices) == [6] and list_series(series).thickness_mm.isna().all()


def test_two_acquisitions_in_one_series(volume, affine, series):
    edit(series, lambda d: setattr(d, "AcquisitionNumber", 1))
    for path in list(series.iterdir()):
        dataset = pydicom.dcmread(path)
        dataset.AcquisitionNumber, dataset.SOPInstanceUID = 2, generate_uid()
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") + 5).tobytes()
        dataset.save_as(series / f"b{path.name}")
    table = list_series(series)
    assert list(table.slices) == [6, 6] and [uid.partition("/")[2] for uid in table.series] == ["1", "2"]
    for uid, shift in zip(table.series, (0, 5)):
        np.testing.assert_array_equal(read_input(series, uid).hu, volume + shift)
        np.testing.assert_array_equal(read_input(series, uid[-2:]).hu, volume + shift)
    for read in (read_scan, read_input):
        assert "acquisition 2" in told(series, read) or f"{uid} " in told(series, read).replace(")", " ")
    assert len(scan_table(series)) == 2
    edit(series, lambda d: setattr(d, "AcquisitionNumber", d.InstanceNumber % 2))  # numbers that tell nothing
    assert "lie at the same position" in told(series)


def test_acquisitions_one_after_the_other_are_one_scan(volume, series):
    edit(series, lambda d: setattr(d, "AcquisitionNumber", d.InstanceNumber // 3))
    np.testing.assert_array_equal(read_input(series).hu, volume)


def test_a_screenshot_among_the_slices_is_left_out(volume, series):
    shots = {
        "90": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
        "91": {"SOPClassUID": SecondaryCaptureImageStorage, "ImagePositionPatient": None},
    }
    for name, changes in shots.items():
        shutil.copy(series / "3.dcm", series / f"{name}.dcm")
        edit(series, lambda d: d.update({"SOPInstanceUID": generate_uid(), **changes}), name)
    pydicom.dcmread(series / "91.dcm").save_as(series / "91.dcm")
    edit(series, lambda d: d.pop("ImagePositionPatient"), "91")
    scan = read_input(series)
    np.testing.assert_array_equal(scan.hu, volume)
    assert "90.dcm is left out: it is screenshot, as are 1 more files" in scan.notes[0]


def test_pixels_that_are_not_square_are_called_so(volume, affine, tmp_path):
    scan = read_scan(write_series(tmp_path / "s", volume, affine))
    mask = (volume > 100).astype(np.uint8)
    texts = " ".join(finding.text for finding in check_segmentation(mask, scan))
    assert "1.50 x 1.25 mm, not square" in texts and "cut" not in texts.partition("not square")[0]


HT = (  # a ramp of 8 x 12 pixels of 12 bits as a codestream of High-Throughput JPEG 2000, by imagecodecs
    "/0//UQApQAAAAAAMAAAACAAAAAAAAAAAAAAADAAAAAgAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJ"
    "CQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAGMAAf+TwAAmzf0FB3QAAMAAEoD2AId0AMAAEcAAE4AXcwCOO/4AgjQA"
    "wAASwAAVIN6Ay3QAwIGBAAhAd1YAwAAngABXACT52KdCdQDGRqPRaPzgEPYhAey4AP/Z"
)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K])
def test_high_throughput_jpeg_2000(affine, tmp_path, syntax):
    ramp = np.add.outer(np.arange(8) * 100, np.arange(12) * 7) - 1000
    folder = write_series(tmp_path / "s", ramp[None].astype(np.int16), affine, ENCODINGS[0], compress=False)

    def pack(dataset):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([base64.b64decode(HT)])
        dataset["PixelData"].VR = "OB"

    np.testing.assert_array_equal(read_scan(edit(folder, pack)).hu[0], ramp)


WHEELS = [Path(package.__file__).parent for package in (pydicom.data, nib, highdicom)]


def test_every_file_in_the_wheels_is_read_as_simpleitk_does_or_refused():
    "No traceback on any of them, no other place, no other values."
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject.GlobalWarningDisplayOff()
    files = [path for root in WHEELS for path in sorted(root.rglob("*")) if path.is_file() and not path.suffix.startswith(".py")]
    read = 0
    for path in files:
        try:
            scan = read_scan(path)
        except RsnaSegError as error:
            assert path.name in str(error) and len(str(error)) < 500
            continue
        image, read = sitk.ReadImage(path), read + 1
        stored = sitk.GetArrayFromImage(image)
        np.testing.assert_allclose(in_source_order(scan.hu, scan).T, stored, atol=0.51)
        ours = np.diag([-1, -1, 1, 1]) @ scan.source.affine
        np.testing.assert_allclose(ours[:3, 3], image.GetOrigin(), atol=1e-2)
        directions = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        axes = slice(3 if path.suffix != ".dcm" and scan.source.header else 2)  # of one slice, ITK has no thickness
        np.testing.assert_allclose(ours[:3, axes], directions[:, axes], atol=1e-3)
    assert read >= 13 and len(files) > 130
