"Every layout that people have is recognised, and gives the same slices; what is none of them is refused with a way out."

import json
import re
import shutil

import cv2
import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom.seg import SegmentDescription, Segmentation
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from rsna_seg.ct.cases import SourceConfig, find_source
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.find import is_one_scan, unpacked
from rsna_seg.ct.inputs import read_input, scan_table
from rsna_seg.ct.organs import ORGANS, palette
from rsna_seg.ct.phantom import draw_patient, render, write_mask, write_series
from rsna_seg.ct.scan import window
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.files import DataError, RsnaSegError

SIZE, SLICES = 64, 10
SMALL = {"size": SIZE, "jobs": 1}


@pytest.fixture(scope="module")
def patients():
    "Three patients: HU, mask, affine."
    return {f"p{seed}": render(draw_patient(seed), size=SIZE, slices=SLICES) for seed in (0, 1, 5)}


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


def check(source, patients, config, *, mask=None, labelled=None, z=True, name="data"):
    "Prepares a source and compares every slice with the patients' own; the dataset."
    data = prepare(source, source.with_name(f"{source.name}-{name}"), mask, config)
    assert data.skipped.empty, data.skipped.reason[0]
    assert sorted(data.manifest.patient.unique()) == sorted(patients)
    keys = [o.key for o in ORGANS] if labelled is None else labelled
    assert data.info["labelled"] == keys
    shown = np.array([0, *(o.id if o.key in keys else 0 for o in ORGANS)], np.uint8)
    for row in data.manifest.itertuples():
        hu, truth, affine = patients[row.patient]
        grey, classes = (cv2.imread(str(data.folder / f), cv2.IMREAD_UNCHANGED) for f in (row.image, row.mask))
        np.testing.assert_array_equal(grey, window(hu[row.z]))
        np.testing.assert_array_equal(classes, shown[truth[row.z]])
        if z:
            assert row.position_mm == pytest.approx((affine @ (row.z, 0, 0, 1))[2], abs=1e-2)
    return data


@pytest.mark.parametrize("name", ["{p}_s1_{z:04d}", "{p}/s1/{z}"])
@pytest.mark.parametrize("encoding", ["raw", "x40", "x51", "palette", "rgb", "table"])
def test_png_pairs(patients, tmp_path, name, encoding):
    from PIL import Image

    table = {"#102030": "liver", "#405060": "spleen", "#708090": "left_kidney", "#a0b0c0": "right_kidney", "#d0e0f0": "bowel", "#000000": None}
    source, given = tmp_path / "png", encoding
    if encoding == "table":
        given = str(tmp_path / "table.json")
        (tmp_path / "table.json").write_text(json.dumps(table))
    colors = [(0, 0, 0), *(tuple(bytes.fromhex(c[1:])) for c in list(table)[:5])] if encoding == "table" else palette()
    for patient, (hu, mask, _) in patients.items():
        for z in range(SLICES):
            place = name.format(p=patient, z=z) + ".png"
            write_png(source / "images" / place, window(hu[z]))
            scale = {"raw": 1, "x40": 40, "x51": 51}.get(encoding)
            if scale:
                write_png(source / "masks" / place, mask[z] * scale)
            elif encoding == "palette":
                image = Image.fromarray(mask[z], mode="P")
                image.putpalette([v for color in palette() for v in color])
                (source / "masks" / place).parent.mkdir(parents=True, exist_ok=True)
                image.save(source / "masks" / place)
            else:
                write_png(source / "masks" / place, np.array(colors, np.uint8)[mask[z]][..., ::-1])
    data = check(source, patients, PrepareConfig(**SMALL, encoding=given), z=False)
    assert data.info["kind"] == "PNG pairs"
    assert data.manifest[["position_mm", "slice_mm", "row_mm", "col_mm"]].isna().all().all()


def test_png_names_without_a_patient(patients, tmp_path):
    source = tmp_path / "png"
    for n, (patient, (hu, mask, _)) in enumerate(patients.items()):
        for z in range(SLICES):
            write_png(source / "images" / f"scan{patient}-{z}.png", window(hu[z]))
            write_png(source / "masks" / f"scan{patient}-{z}.png", mask[z])
    with pytest.raises(DataError, match=re.escape("--pattern")):
        find_source(source)
    with pytest.raises(DataError, match="has no group"):
        find_source(source, None, SourceConfig(pattern=r"scan(\w+)-(\d+)"))
    with pytest.raises(DataError, match="both slice 0 of one series"):
        find_source(source, None, SourceConfig(pattern=r"(?P<patient>scan)p\d-(?P<slice>\d+)"))
    with pytest.raises(DataError, match="which is no number"):
        find_source(source, None, SourceConfig(pattern=r"(?P<patient>scan)(?P<slice>.*)"))
    ranks = find_source(source, None, SourceConfig(pattern=r"scan(?P<patient>\w+)-\d+"))
    assert [number for number, *_ in ranks.cases[0].pairs] == list(range(SLICES))
    pattern = r"scan(?P<patient>\w+)-(?P<slice>\d+)"
    check(source, patients, PrepareConfig(**SMALL, pattern=pattern), z=False)
    write_png(source / "images" / "scanp9-1.png", np.zeros((4, 4), np.uint8))
    assert "1 images without a mask left out." in find_source(source, None, SourceConfig(pattern=pattern)).notes


def test_masks_in_another_place(patients, tmp_path):
    for patient, (hu, mask, _) in patients.items():
        for z in range(SLICES):
            write_png(tmp_path / "pictures" / f"{patient}_1_{z}.png", window(hu[z]))
            write_png(tmp_path / "truth" / f"{patient}_1_{z}.png", mask[z])
    check(tmp_path / "pictures", patients, PrepareConfig(**SMALL), mask=tmp_path / "truth", z=False)


@pytest.mark.parametrize("damage, says", [("jpeg", "JPEG"), ("linear", "interpolation"), ("value", "value 9"), ("shape", "no pair")])
def test_damaged_png_masks_are_refused(patients, tmp_path, damage, says):
    source = tmp_path / "png"
    for patient, (hu, mask, _) in patients.items():
        for z in range(SLICES):
            plane = cv2.resize(mask[z], (128, 128), interpolation=cv2.INTER_NEAREST)
            write_png(source / "images" / f"{patient}_1_{z}.png", cv2.resize(window(hu[z]), (128, 128)))
            if damage == "jpeg":
                plane = cv2.imdecode(cv2.imencode(".jpg", plane, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], cv2.IMREAD_UNCHANGED)
            elif damage == "linear":
                plane = cv2.resize(cv2.resize(plane, (90, 90), interpolation=cv2.INTER_LINEAR), (128, 128), interpolation=cv2.INTER_LINEAR)
            elif damage == "value" and z == 5:
                plane = np.where(plane == 1, 9, plane).astype(np.uint8)
            elif damage == "shape" and z == 5:
                plane = plane[:100]
            write_png(source / "masks" / f"{patient}_1_{z}.png", plane)
    with pytest.raises(DataError, match=says):
        prepare(source, tmp_path / "data", config=PrepareConfig(**SMALL))


def test_nnunet_folder_with_its_own_label_names(patients, tmp_path):
    source, ids = tmp_path / "nnunet", {"background": 0, "spleen": 1, "right kidney": 2, "left kidney": 3, "liver": 6, "stomach": 7}
    table = np.array([0, 6, 1, 3, 2, 7], np.uint8)  # the bowel's place is taken by a class that is none of ours
    for n, (patient, (hu, mask, affine)) in enumerate(patients.items()):
        write_mask(source / "imagesTr" / f"{patient}_0000.nii.gz", hu, affine, ("RAS", "LPS", "LAI")[n])
        write_mask(source / "labelsTr" / f"{patient}.nii.gz", table[mask], affine, ("LAS", "RAS", "PSR")[n])
    (source / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": ids}))
    data = check(source, patients, PrepareConfig(**SMALL), labelled=["liver", "spleen", "left_kidney", "right_kidney"])
    assert data.info["kind"] == "NIfTI pairs" and data.manifest.bowel.isna().all()


@pytest.mark.parametrize("preset, ids, labelled", [
    ("totalsegmentator", (5, 1, 3, 2, 20), 5), ("amos", (6, 1, 3, 2, 13), 4), ("btcv", (6, 1, 3, 2, 7), 4), ("flare22", (1, 3, 13, 2, 12), 4),
])  # fmt: skip
def test_label_maps_of_known_datasets(patients, tmp_path, preset, ids, labelled):
    source, table = tmp_path / "source", np.array([0, *ids], np.uint8)
    for patient, (hu, mask, affine) in patients.items():
        write_mask(source / "images" / f"{patient}.nii.gz", hu, affine)
        write_mask(source / "labels" / f"{patient}.nii.gz", table[mask], affine)
    check(source, patients, PrepareConfig(**SMALL, labels=preset), labelled=[o.key for o in ORGANS][:labelled])
    own = tmp_path / "own.json"
    own.write_text(json.dumps({str(i): o.key for i, o in zip(ids, ORGANS)} | {"0": None}))
    assert find_source(source, None, SourceConfig(labels=str(own))).labelled == tuple(o.key for o in ORGANS)


FILES = {"liver": [1], "spleen": [2], "kidney_left": [3], "kidney_right": [4], "small_bowel": [5], "duodenum": [], "colon": [], "aorta": []}


@pytest.mark.parametrize("single", [False, True])
def test_totalsegmentator_folders(patients, tmp_path, single):
    source = tmp_path / "total"
    for patient, (hu, mask, affine) in patients.items():
        write_mask(source / patient / "ct.nii.gz", hu, affine)
        for name, ids in FILES.items():
            if not single:
                write_mask(source / patient / "segmentations" / f"{name}.nii.gz", np.isin(mask, ids).astype(np.uint8), affine, "LPI")
        if single:
            write_mask(source / patient / "segmentation.nii.gz", mask, affine, "LPI")
    check(source, patients, PrepareConfig(**SMALL))
    if not single:
        (source / "p0" / "segmentations" / "liver.nii.gz").unlink()
        data = prepare(source, tmp_path / "again", config=PrepareConfig(**SMALL))
        assert data.info["labelled"] == ["spleen", "left_kidney", "right_kidney", "bowel"]
        assert "Not every case has liver" in data.info["notes"][0]
        for patient in patients:
            for path in (source / patient / "segmentations").glob("*.nii.gz"):
                if path.name != "spleen.nii.gz":
                    path.unlink()
        data = prepare(source, tmp_path / "spleens", config=PrepareConfig(**SMALL))  # 1 is not the liver here
        assert data.info["labelled"] == ["spleen"] and data.manifest.spleen.sum() > 0


def write_seg(path, folder, mask, organs):
    "The organs of a mask, which runs as the sorted files, as DICOM SEG by highdicom."
    slices = sorted((pydicom.dcmread(p) for p in folder.glob("*.dcm")), key=lambda d: d.ImagePositionPatient[2])
    about = [
        SegmentDescription(n, o.name, codes.SCT.Organ, pydicom.sr.coding.Code(o.snomed[0], "SCT", o.name), "MANUAL")
        for n, o in enumerate(organs, 1)
    ]
    pixels = np.stack([mask == o.id for o in organs], axis=-1).astype(np.uint8)
    Segmentation(
        slices, pixels, "BINARY", about, generate_uid(), 1, generate_uid(), 1, "rsna_seg", "test", "1", "1", omit_empty_frames=True,
    ).save_as(path)  # fmt: skip


@pytest.mark.parametrize("files", [1, 5])
def test_dicom_with_dicom_seg(patients, tmp_path, files):
    source = tmp_path / "archive"
    for n, (patient, (hu, mask, affine)) in enumerate(patients.items()):
        folder = write_series(source / patient / "CT", hu, affine, falling=n % 2 == 1, patient_id=patient)
        for path in folder.glob("*.dcm"):
            dataset = pydicom.dcmread(path)
            dataset.update({"Modality": "CT", "StudyDate": "", "StudyTime": "", "AccessionNumber": "", "PatientName": "", "PatientSex": "",
                            "PatientBirthDate": "", "StudyID": "", "ReferringPhysicianName": ""})  # fmt: skip
            dataset.save_as(path)
        for k, organs in enumerate([ORGANS] if files == 1 else [[o] for o in ORGANS]):
            write_seg(source / patient / f"seg{k}.dcm", folder, mask, organs)
    data = check(source, patients, PrepareConfig(**SMALL))
    assert data.info["kind"] == "DICOM with DICOM SEG"


def test_two_named_files(patients, tmp_path):
    hu, mask, affine = patients["p0"]
    write_mask(tmp_path / "p0.nii.gz", hu, affine, "LAS")
    write_mask(tmp_path / "truth.nii", mask, affine, "RAS")
    check(tmp_path / "p0.nii.gz", {"p0": patients["p0"]}, PrepareConfig(**SMALL, valid=0), mask=tmp_path / "truth.nii")
    write_series(tmp_path / "p0", hu, affine)
    check(tmp_path / "p0", {"p0": patients["p0"]}, PrepareConfig(**SMALL, valid=0), mask=tmp_path / "truth.nii")
    write_mask(tmp_path / "organs" / "kidney_left.nii.gz", (mask == 3).astype(np.uint8), affine)
    check(tmp_path / "p0.nii.gz", {"p0": patients["p0"]}, PrepareConfig(**SMALL, valid=0, seed=1), mask=tmp_path / "organs",
          labelled=["left_kidney"], name="by organ")  # fmt: skip
    with pytest.raises(DataError, match="holds no masks; give .* --mask FILE"):
        find_source(tmp_path / "p0.nii.gz")


def test_unlabelled_organs_are_declared_and_left_out(patients, tmp_path):
    for patient, (hu, mask, affine) in patients.items():
        write_mask(tmp_path / "s" / "images" / f"{patient}.nii", hu, affine)
        write_mask(tmp_path / "s" / "labels" / f"{patient}.nii", mask, affine)
    check(tmp_path / "s", patients, PrepareConfig(**SMALL, labelled=("liver", "bowel")), labelled=["liver", "bowel"])
    with pytest.raises(DataError, match="stomach is no organ of ours"):
        find_source(tmp_path / "s", None, SourceConfig(labelled=("stomach",)))


def test_curvas(real_ct, tmp_path):
    config = PrepareConfig(labelled=("liver", "left_kidney", "right_kidney"), jobs=1)
    data = prepare(real_ct / "curvas_png", tmp_path / "data", config=config)
    assert (len(data.manifest), data.info["patients"]) == (108, 14)
    row = data.manifest.iloc[17]
    for kind in ("image", "mask"):
        ours, theirs = (cv2.imread(str(f), cv2.IMREAD_UNCHANGED) for f in (data.folder / row[kind], real_ct / "curvas_png" / row[kind]))
        np.testing.assert_array_equal(ours, theirs)


def test_real_dicom_seg(real_ct, tmp_path):
    data = prepare(real_ct / "ct3slice", tmp_path / "data", config=PrepareConfig(valid=0, jobs=1))
    assert data.info["labelled"] == ["liver"] and list(data.manifest.liver) == [36233, 35645, 35220]
    assert list(data.manifest.position_mm) == [-128.69, -127.69, -126.69]


def test_a_tilted_series_keeps_its_place(patients, tmp_path):
    hu, mask, affine = patients["p0"]
    affine = affine.copy()
    affine[1, 0] = 0.2 * affine[2, 0]
    (tmp_path / "k").mkdir()
    for n in (1, 2):
        write_series(tmp_path / "k" / "train_images" / f"{n}" / f"{n}7", hu, affine, patient_id=n)
        write_mask(tmp_path / "k" / "segmentations" / f"{n}7.nii", mask, affine, "LAS")
    data = prepare(tmp_path / "k", tmp_path / "data", config=PrepareConfig(**SMALL))
    assert data.manifest.tilt_deg.unique() == pytest.approx([11.31], abs=0.01)
    assert "tilted by 11.3 degrees" in data.info["notes"][0] and "Series 17 of patient 1" in data.info["notes"][0]
    volumes = data.manifest.eval("liver * slice_mm * row_mm * col_mm").groupby(data.manifest.series).sum() / 1000
    image = nib.load(tmp_path / "k" / "segmentations" / "17.nii")
    assert volumes["17"] == pytest.approx((mask == 1).sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000, rel=1e-3)


def test_nothing_known(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("no acute findings")
    for source in (tmp_path / "letters", tmp_path):
        with pytest.raises(DataError, match="holds no scan that is known here; give a DICOM folder"):
            find_source(source)
    write_series(tmp_path / "series", np.zeros((2, 8, 8), np.int16), np.eye(4))
    with pytest.raises(DataError, match="holds no masks; give Kaggle's train_images"):
        find_source(tmp_path / "series")
    with pytest.raises(DataError, match="does not exist"):
        find_source(tmp_path / "absent")
    with pytest.raises(DataError, match="not a complete dataset folder"):
        open_data(tmp_path)


def test_same_slices_from_every_door(patients, tmp_path):
    "DICOM, NIfTI and PNG of one patient end in the same pictures."
    hu, mask, affine = patients["p1"]
    write_series(tmp_path / "dicom", hu, affine)
    write_mask(tmp_path / "ct.nii", hu, affine, "PIR")
    np.testing.assert_array_equal(read_scan(tmp_path / "dicom").hu, read_scan(tmp_path / "ct.nii").hu)


def test_training_and_prediction_see_the_same_scans(patients, tmp_path):
    "What is a mask for one is no scan for the other, and what is no scan has the same sentence."
    for patient, (hu, mask, affine) in patients.items():
        write_series(tmp_path / "kaggle" / "train_images" / patient / "7", hu, affine)
        write_mask(tmp_path / "kaggle" / "segmentations" / "7.nii", mask, affine)
        write_mask(tmp_path / "nnunet" / "imagesTr" / f"{patient}_0000.nii.gz", hu, affine)
        write_mask(tmp_path / "nnunet" / "labelsTr" / f"{patient}.nii.gz", mask, affine)
        write_mask(tmp_path / "cases" / patient / "ct.nii.gz", hu, affine)
        write_mask(tmp_path / "cases" / patient / "segmentation.nii.gz", mask, affine)
        for z in range(SLICES):
            write_png(tmp_path / "png" / "images" / patient / "7" / f"{z}.png", window(hu[z]))
            write_png(tmp_path / "png" / "masks" / patient / "7" / f"{z}.png", mask[z])
    for layout in ("nnunet", "cases", "png"):
        scans = scan_table(tmp_path / layout)
        assert set(scans.path) == {case.scan for case in find_source(tmp_path / layout).cases}, layout
        assert len(scans) == 3 and not is_one_scan(tmp_path / layout)
    assert sorted(scan_table(tmp_path / "nnunet").name) == sorted(scan_table(tmp_path / "cases").name) == sorted(patients)
    assert len(scan_table(tmp_path / "kaggle")) == 3
    (tmp_path / "letters").mkdir()
    sentences = []
    for look in (find_source, scan_table, read_input):
        with pytest.raises(RsnaSegError) as error:
            look(tmp_path / "letters")
        sentences.append(str(error.value))
    assert len(set(sentences)) == 1 and "holds no scan" in sentences[0]


def test_a_zip_file_is_opened_for_its_masks_too(patients, tmp_path):
    hu, mask, affine = patients["p0"]
    write_mask(tmp_path / "in" / "p0" / "ct.nii.gz", hu, affine)
    write_mask(tmp_path / "in" / "p0" / "segmentation.nii.gz", mask, affine)
    packed = shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "in")
    with unpacked(packed) as folder:
        case = find_source(folder).cases[0]
        np.testing.assert_array_equal(case.mask_on(read_scan(case.scan)), mask)
    assert not folder.exists()
    with pytest.raises(DataError, match="packed.zip holds no masks"), unpacked(packed) as folder:
        (folder / "p0" / "segmentation.nii.gz").unlink()
        find_source(folder)
