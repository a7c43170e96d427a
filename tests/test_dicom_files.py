"Masks written as DICOM SEG and RTSTRUCT: read again by others, every voxel lies where it lay in the patient."

from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.path import Path as Polygon
from scipy import ndimage
from skimage.draw import polygon2mask

from rsna_seg.ct.dicom import read_scan, read_seg
from rsna_seg.ct.organs import ORGANS, palette
from rsna_seg.ct.outputs import outlines, save_dicom_seg, save_rtstruct, source_headers
from rsna_seg.ct.phantom import write_mask, write_series
from rsna_seg.ct.scan import in_source_order
from rsna_seg.files import ConfigError, OutputError, RsnaSegError, ScanError

hd = pytest.importorskip("highdicom")

SHAPE = (8, 36, 44)
WRITERS = {"seg": save_dicom_seg, "rt": save_rtstruct}
CASES = {  # directions of rows down and columns across in LPS, and what else is unusual
    "HFS": ((0, 1, 0), (1, 0, 0), {}),
    "FFS": ((0, 1, 0), (-1, 0, 0), {}),
    "HFP": ((0, -1, 0), (-1, 0, 0), {}),
    "FFP": ((0, -1, 0), (1, 0, 0), {}),
    "falling": ((0, 1, 0), (1, 0, 0), {"falling": True}),
    "tilt": ((0, 1, 0), (1, 0, 0), {"lean": 0.3}),
    "tilt, prone and falling": ((0, -1, 0), (-1, 0, 0), {"lean": -0.3, "falling": True}),
    "oblique": ((0, 0.96, -0.28), (1, 0, 0), {}),
    "uneven": ((0, 1, 0), (1, 0, 0), {"gaps": (3, 3, 1, 1, 5, 12, 3)}),
    "uneven and falling": ((0, -1, 0), (-1, 0, 0), {"gaps": (3, 3, 1, 1, 5, 12, 3), "falling": True}),
    "tilt and uneven": ((0, 1, 0), (1, 0, 0), {"lean": 0.3, "gaps": (3, 3, 1, 1, 5, 12, 3)}),
    "single": ((0, 1, 0), (1, 0, 0), {"gaps": ()}),
    "coronal": ((0, 0, -1), (1, 0, 0), {}),
}


def shapes():
    "A mask with holes, islands in holes, walls and organs of one pixel, organs at the border and at corners; no right kidney."
    mask = np.zeros(SHAPE, np.uint8)
    row, col = np.mgrid[: SHAPE[1], : SHAPE[2]]
    for z, plane in enumerate(mask):
        plane[(row - 16) ** 2 + (col - 14) ** 2 < (11 - z / 2) ** 2] = 1
        plane[14:19, 10:16] = 0  # a hole
        plane[16, 12] = 2  # with an island in it
        plane[10, 14 + z % 3] = plane[10, 16 + z % 3] = 0  # holes beside each other
        plane[24:, 36:] = 5  # at two borders
        plane[26:29, 38 : 40 + z % 2] = 3
        plane[2:5, 30 + z % 4] = 3
    mask[3:5] *= mask[3:5] != 3
    mask[6, :, :] = np.where(mask[6] == 5, 0, mask[6])
    return mask


def place_of(k, case, spacing):
    "4x4 from (slice, row, col) to LPS mm, beginning at the k-th slice."
    down, across, how = CASES[case]
    down, across = np.array(down, float), np.array(across, float)
    normal = np.cross(across, down)
    step = normal + how.get("lean", 0) * down
    along = np.r_[0, np.cumsum(how.get("gaps", [3] * (SHAPE[0] - 1)))][k]
    affine = np.eye(4)
    affine[:3] = np.column_stack([step * 3, down * spacing[0], across * spacing[1], np.array([-12.5, 40, 300]) + step * along])
    return affine


def write_case(folder, case, spacing=(0.7, 0.9), mask=None):
    "A series whose HU tell the mask; the mask, and the true place of each organ's voxels in LPS mm."
    mask = shapes() if mask is None else mask
    mask = mask[: len(CASES[case][2].get("gaps", range(SHAPE[0] - 1))) + 1]
    truth = {o.id: [] for o in ORGANS}
    for k, plane in enumerate(mask):
        affine = place_of(k, case, spacing)
        number = 20 - k if CASES[case][2].get("falling") else 1 + k
        write_series(folder, 100 * plane[None].astype(np.int16), affine, first=number, compress=False)
        for organ, points in truth.items():
            where = np.argwhere(plane == organ)
            points.append(np.c_[np.zeros(len(where)), where] @ affine[:3, :3].T + affine[:3, 3])
    return mask, {organ: in_order(np.concatenate(points)) for organ, points in truth.items()}


def in_order(points):
    "Rounded to a thousandth of a mm and sorted, so that sets of places can be compared."
    points = np.asarray(points, float).reshape(-1, 3)
    coarse = points.round(1) + 0.0
    return points[np.lexsort(coarse.T)]


def assert_same_places(found, truth):
    for organ in ORGANS:
        assert len(found[organ.id]) == len(truth[organ.id]), organ.key
        if len(truth[organ.id]):
            np.testing.assert_allclose(found[organ.id], truth[organ.id], atol=2e-3, err_msg=organ.key)


def scan_and_mask(folder):
    "The scan, and the mask on its grid that its HU tell."
    scan = read_scan(folder)
    return scan, (scan.hu // 100).astype(np.uint8)


def pixel_places(header, rows_cols):
    "LPS mm of pixels (row, col) of a slice or a plane; the standard's equation C.7.6.2.1-1."
    across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    row_mm, col_mm = (float(mm) for mm in header.PixelSpacing)
    rows_cols = np.asarray(rows_cols, float).reshape(-1, 2)
    start = np.array(header.ImagePositionPatient, float)
    return start + rows_cols[:, :1] * row_mm * down + rows_cols[:, 1:] * col_mm * across


def class_of(item):
    "The organ that a code item means."
    meaning = item.CodeMeaning.lower()
    if meaning == "kidney":
        meaning = f"{item.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning.lower()} kidney"
    return next(o for o in ORGANS if o.name.lower() == meaning)


def seg_places(path):
    "The places of each organ's voxels as pydicom alone reads them."
    seg, found = pydicom.dcmread(path), {o.id: [np.empty((0, 3))] for o in ORGANS}
    shared = seg.SharedFunctionalGroupsSequence[0]
    organs = {s.SegmentNumber: class_of(s.SegmentedPropertyTypeCodeSequence[0]) for s in seg.SegmentSequence}
    only = shared.get("SegmentIdentificationSequence")
    for plane, frame in zip(seg.pixel_array.reshape(-1, seg.Rows, seg.Columns), seg.PerFrameFunctionalGroupsSequence):
        header = SimpleNamespace(
            ImagePositionPatient=frame.PlanePositionSequence[0].ImagePositionPatient,
            ImageOrientationPatient=shared.PlaneOrientationSequence[0].ImageOrientationPatient,
            PixelSpacing=shared.PixelMeasuresSequence[0].PixelSpacing,
        )
        number = (only or frame.SegmentIdentificationSequence)[0].ReferencedSegmentNumber
        found[organs[number].id].append(pixel_places(header, np.argwhere(plane)))
    return {organ: in_order(np.concatenate(points)) for organ, points in found.items()}


def rt_places(path, files):
    "The places of the pixels whose centres lie in the contours, each on the slice that its contour names."
    rt, found = pydicom.dcmread(path), {o.id: [np.empty((0, 3))] for o in ORGANS}
    slices = {h.SOPInstanceUID: h for h in (pydicom.dcmread(f, stop_before_pixels=True) for f in files)}
    organs = {o.ReferencedROINumber: class_of(o.RTROIIdentificationCodeSequence[0]) for o in rt.RTROIObservationsSequence}
    for roi in rt.ROIContourSequence:
        for contour in roi.ContourSequence:
            header = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert contour.NumberOfContourPoints == len(points) and contour.ContourGeometricType == "CLOSED_PLANAR"
            across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            away = points - np.array(header.ImagePositionPatient, float)
            assert np.abs(away @ np.cross(across, down)).max() < 1e-3  # in the slice's plane
            ring = np.c_[away @ down / header.PixelSpacing[0], away @ across / header.PixelSpacing[1]]
            pixels = np.argwhere(np.ones((header.Rows, header.Columns)))
            inside = pixels[Polygon(ring).contains_points(pixels)]
            found[organs[roi.ReferencedROINumber].id].append(pixel_places(header, inside))
    return {organ: in_order(np.concatenate(points)) for organ, points in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_voxel_lies_where_it_lay(tmp_path, case):
    "As pydicom alone, highdicom, a polygon library and we ourselves read it; volumes and centres follow."
    _, truth = write_case(tmp_path / "ct", case)
    scan, mask = scan_and_mask(tmp_path / "ct")
    seg, rt = save_dicom_seg(mask, scan, tmp_path / "seg.dcm"), save_rtstruct(mask, scan, tmp_path / "rt.dcm")
    assert_same_places(seg_places(seg), truth)
    assert_same_places(rt_places(rt, scan.source.files), truth)
    if case != "coronal":
        np.testing.assert_array_equal(read_seg([seg], scan), mask)
    theirs = hd.seg.segread(seg)
    organs = [class_of(theirs.get_segment_description(n).SegmentedPropertyTypeCodeSequence[0]).id for n in theirs.segment_numbers]
    uids = [pydicom.dcmread(f).SOPInstanceUID for f in scan.source.files]
    planes = theirs.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(np.array([0, *organs])[planes], in_source_order(mask, scan).T)
    if not {"gaps", "lean"} & set(CASES[case][2]):
        volume = theirs.get_volume(combine_segments=True, allow_missing_positions=True)
        found = {o.id: in_order(np.empty((0, 3))) for o in ORGANS}
        for number, organ in enumerate(organs, 1):
            where = np.argwhere(volume.array == number)
            found[organ] = in_order(where @ volume.affine[:3, :3].T + volume.affine[:3, 3])
        assert_same_places(found, truth)


def test_simpleitk_reads_the_same_planes(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    write_case(tmp_path / "ct", "HFP")
    scan, mask = scan_and_mask(tmp_path / "ct")
    seg = save_dicom_seg(mask, scan, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(seg)) > 0, pydicom.dcmread(seg).pixel_array)  # ITK makes bits 0 and 255


@pytest.mark.parametrize("case", ["HFS", "FFS", "HFP", "falling"])
def test_rt_utils_finds_the_organs(tmp_path, case):
    "It fills the boundary too and rounds halves: a pixel more or less all around, and the centre stays."
    rt_utils = pytest.importorskip("rt_utils")
    square = np.pad(shapes(), ((0, 0), (0, SHAPE[2] - SHAPE[1]), (0, 0)))  # its readers take rows for columns
    write_case(tmp_path / "ct", case, (0.8, 0.8), square)
    for path in (tmp_path / "ct").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.StudyDate = dataset.StudyTime = dataset.StudyID = ""
        dataset.save_as(path)
    scan, mask = scan_and_mask(tmp_path / "ct")
    rt = save_rtstruct(mask, scan, tmp_path / "rt.dcm")
    theirs = rt_utils.RTStructBuilder.create_from(str(tmp_path / "ct"), str(rt))
    assert theirs.get_roi_names() == ["Liver", "Spleen", "Left kidney", "Bowel"]
    height = [float(np.cross(h.ImageOrientationPatient[:3], h.ImageOrientationPatient[3:]) @ h.ImagePositionPatient) for h in theirs.series_data]
    assert height == sorted(height)
    planes = in_source_order(mask, scan).T  # in order of the same normal
    for name, organ in (("Liver", 1), ("Left kidney", 3), ("Bowel", 5)):
        filled = theirs.get_roi_mask_by_name(name).transpose(2, 0, 1)
        inside = planes == organ
        flat = np.ones((1, 3, 3), bool)
        assert not (filled & ~ndimage.binary_dilation(inside, flat)).any()
        assert not (ndimage.binary_erosion(inside, flat) & ~filled).any()
        if organ == 1:  # the others are of a few pixels, which a pixel more makes much larger
            assert np.abs(np.argwhere(filled).mean(axis=0) - np.argwhere(inside).mean(axis=0)).max() < 0.5


@pytest.mark.parametrize("series", ["ct3slice/series", "dicom_geometry/gantrytilting_001", "dicom_geometry/sliceincrement_001",
                                    "dicom_geometry/sliceincrement_002"])  # fmt: skip
def test_real_series(real_ct, tmp_path, series):
    "Feet first, tilted, uneven, both; without FrameOfReferenceUID or PatientSex."
    scan = read_scan(real_ct / series)
    z, row, col = np.ogrid[tuple(slice(n) for n in scan.hu.shape)]
    mask = np.zeros(scan.hu.shape, np.uint8)
    mask[(row - 200) ** 2 + (col - 150) ** 2 + 0 * z < 900] = 1
    mask[(row - 300) ** 2 / 2 + (col - 390 + 3 * z) ** 2 < 100] = 4
    mask[-1:, 100:110, 300:340] = 3
    before = {f: f.read_bytes() for f in scan.source.files}
    headers = [pydicom.dcmread(f) for f in scan.source.files]
    truth = {o.id: [np.empty((0, 3))] for o in ORGANS}
    for k, header in enumerate(headers):
        plane, hu = (in_source_order(voxels, scan)[:, :, k].T for voxels in (mask, scan.hu))
        stored = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
        np.testing.assert_array_equal(hu[plane > 0], stored[plane > 0])
        for organ, points in truth.items():
            points.append(pixel_places(header, np.argwhere(plane == organ)))
    truth = {organ: in_order(np.concatenate(points)) for organ, points in truth.items()}
    seg, rt = save_dicom_seg(mask, scan, tmp_path / "seg.dcm"), save_rtstruct(mask, scan, tmp_path / "rt.dcm")
    assert_same_places(seg_places(seg), truth)
    assert_same_places(rt_places(rt, scan.source.files), truth)
    np.testing.assert_array_equal(read_seg([seg], scan), mask)
    for path in (seg, rt):
        written = pydicom.dcmread(path)
        assert written.PatientID == headers[0].PatientID and written.StudyInstanceUID == headers[0].StudyInstanceUID
    assert before == {f: f.read_bytes() for f in scan.source.files}


POOR = ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "SliceThickness", "PatientPosition")


@pytest.mark.parametrize("also", [(), ("SOPInstanceUID", "SeriesInstanceUID")])
def test_a_series_that_lacks_nearly_everything(tmp_path, also):
    "As Kaggle's anonymised files and worse; and both kinds of object agree on the stand-ins."
    _, truth = write_case(tmp_path / "ct", "HFP")
    for path in (tmp_path / "ct").iterdir():
        dataset = pydicom.dcmread(path)
        for tag in (*POOR, *also):
            del dataset[tag]
        with pytest.warns(UserWarning):
            dataset.SOPClassUID, dataset.PatientSex, dataset.PatientName = "", "000Y", "Müller"
            dataset.StudyDate, dataset.StudyTime, dataset.PatientBirthDate = "ANON", "noon", "00000000"
            dataset.SpecificCharacterSet, dataset.SpacingBetweenSlices = "ISO_IR 100", 99
            dataset.save_as(path)
    scan, mask = scan_and_mask(tmp_path / "ct")
    paths = [save(mask, scan, tmp_path / f"{kind}{i}.dcm") for i in (0, 1) for kind, save in WRITERS.items()]
    seg, rt, seg_again, rt_again = (pydicom.dcmread(path) for path in paths)
    for tag in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[tag].value == rt[tag].value == seg_again[tag].value == rt_again[tag].value != ""
    assert len({d.SOPInstanceUID for d in (seg, rt, seg_again, rt_again)}) == 4
    assert seg.PatientName == rt.PatientName == "Müller" and seg.StudyDate == rt.StudyDate == ""
    refers = [sorted(i.ReferencedSOPInstanceUID for i in s) for s in (
        seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence,
        rt.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0].ContourImageSequence)]  # fmt: skip
    assert refers[0] == refers[1] and len(set(refers[0])) == len(mask)
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == pytest.approx(3)
    assert_same_places(seg_places(paths[0]), truth)
    np.testing.assert_array_equal(read_seg([paths[0]], scan), mask)
    if not also:
        assert_same_places(rt_places(paths[1], scan.source.files), truth)


def test_slices_of_one_name_get_names_of_their_own(tmp_path):
    write_case(tmp_path / "ct", "HFS")
    for path in (tmp_path / "ct").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = "1.2.3"
        dataset.save_as(path)
    headers = source_headers(read_scan(tmp_path / "ct"))
    assert len({h.SOPInstanceUID for h in headers}) == SHAPE[0]


def test_copies_of_slices_and_gaps(tmp_path):
    "A slice that lies there twice, and one that is missing."
    _, truth = write_case(tmp_path / "ct", "HFS")
    (tmp_path / "ct" / "twice.dcm").write_bytes((tmp_path / "ct" / "3.dcm").read_bytes())
    (tmp_path / "ct" / "5.dcm").unlink()
    scan, mask = scan_and_mask(tmp_path / "ct")
    assert len(mask) == SHAPE[0] - 1
    gone = place_of(4, "HFS", (0.7, 0.9))[2, 3]
    truth = {organ: points[np.abs(points[:, 2] - gone) > 0.1] for organ, points in truth.items()}
    assert_same_places(seg_places(save_dicom_seg(mask, scan, tmp_path / "seg.dcm")), truth)
    assert_same_places(rt_places(save_rtstruct(mask, scan, tmp_path / "rt.dcm"), scan.source.files), truth)


def test_what_is_said_about_the_organs(tmp_path):
    write_case(tmp_path / "ct", "HFS")
    scan, mask = scan_and_mask(tmp_path / "ct")
    wanted = ("liver", "left_kidney", "right_kidney")
    seg = pydicom.dcmread(save_dicom_seg(mask, scan, tmp_path / "new" / "seg.dcm", wanted, {"network": "net 7"}))
    rt = pydicom.dcmread(save_rtstruct(mask, scan, tmp_path / "new" / "rt.dcm", wanted))
    assert [s.SegmentLabel for s in seg.SegmentSequence] == [r.ROIName for r in rt.StructureSetROISequence] == ["Liver", "Left kidney"]
    assert seg.ContentDescription == rt.StructureSetDescription == "Not found: right kidney"
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {r.ROIGenerationAlgorithm for r in rt.StructureSetROISequence} == {"AUTOMATIC"}
    assert {s.SegmentAlgorithmName for s in seg.SegmentSequence} == {"rsna_seg"} and "net 7" in str(seg.SegmentSequence[0])
    assert rt.ApprovalStatus == "UNAPPROVED"
    assert [tuple(r.ROIDisplayColor) for r in rt.ROIContourSequence] == [palette()[1], palette()[3]]
    for segment, organ in zip(seg.SegmentSequence, (ORGANS[0], ORGANS[2])):
        lab = hd.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue)
        np.testing.assert_allclose(lab.to_rgb(), palette()[organ.id], atol=1)
    assert seg.SegmentSequence[0].SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    for written in (seg, rt):
        for tag in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
            assert written[tag].value == pydicom.dcmread(scan.source.files[0])[tag].value


@pytest.mark.parametrize("save", WRITERS.values())
def test_errors_leave_nothing_behind(tmp_path, save, monkeypatch):
    write_case(tmp_path / "ct", "HFS")
    scan, mask = scan_and_mask(tmp_path / "ct")
    out = tmp_path / "out"
    nifti = read_scan(write_mask(tmp_path / "ct.nii", scan.hu, scan.affine))
    for wrong, error, text in (
        ((mask, nifti), OutputError, "ct.nii has no DICOM series to refer to; use NIfTI"),
        ((mask[:, :-1], scan), ScanError, r"\(8, 35, 44\) voxels .* \(8, 36, 44\)"),
        ((mask + 1, scan), ScanError, "other values"),
        ((mask.astype(float), scan), ScanError, "other values"),
        ((0 * mask, scan), OutputError, "Nothing was found"),
    ):
        with pytest.raises(error, match=text):
            save(*wrong, out / "x.dcm")
    with pytest.raises(ConfigError, match="no organ heart"):
        save(mask, scan, out / "x.dcm", ("heart",))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save(mask, scan, tmp_path / "file" / "x.dcm")

    def full(self, path, **how):
        Path(path).write_bytes(b"half")
        raise OSError(ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pydicom.Dataset, "save_as", full)
        with pytest.raises(OutputError, match="No space left on device"):
            save(mask, scan, out / "x.dcm")
    assert not out.exists() or not list(out.iterdir())
    (tmp_path / "ct" / "1.dcm").unlink()
    with pytest.raises(RsnaSegError, match="1.dcm cannot be read again"):
        save(mask, scan, out / "x.dcm")
    assert not out.exists() or not list(out.iterdir())


@settings(max_examples=150, deadline=None)
@given(inside=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 11))), mm=st.floats(0.2, 3), start=st.floats(-500, 500))
def test_filling_an_outline_gives_the_mask(inside, mm, start):
    "Any mask: holes, corners that touch, the border; after rounding as in a file too, by two libraries."
    rings = outlines(inside)
    pixels, filled, also = np.argwhere(np.ones(inside.shape)), np.zeros(inside.shape, int), np.zeros(inside.shape, int)
    for ring in rings:
        rounded = ((ring * mm + start).round(4) - start) / mm
        filled += Polygon(rounded).contains_points(pixels).reshape(inside.shape)
        also += polygon2mask(inside.shape, rounded)
    np.testing.assert_array_equal(filled, inside)
    np.testing.assert_array_equal(also, inside)
