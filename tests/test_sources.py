"Every layout that people have is recognised, and gives the same slices; what is none of them is refused with a way out."

import json
import re
import shutil
import unicodedata
import zipfile

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
from rsna_seg.ct.outputs import save_dicom_seg
from rsna_seg.ct.phantom import draw_patient, render, write_mask, write_series
from rsna_seg.ct.scan import window
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.evaluate import score_masks
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
    assert "Left out of the images, without a partner: scanp9-1." in find_source(source, None, SourceConfig(pattern=pattern)).notes


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
    assert data.info["notes"] == ["No organs of ours, and so background here: stomach."]
    with pytest.raises(DataError, match="not a complete dataset folder"):  # though it has a dataset.json
        open_data(source)


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


def pairs(folder, patients, image, label, masks="labels"):
    "NIfTI pairs with names of their own for images and masks, of three patients numbered from 1."
    for number, (hu, mask, affine) in enumerate(patients.values(), 1):
        write_mask(folder / "images" / f"{image.format(number)}.nii.gz", hu, affine)
        write_mask(folder / masks / f"{label.format(number)}.nii.gz", mask, affine)
    return folder


@pytest.mark.parametrize("name", ["amos_{:04d}", "word_{:04d}", "case_000{}"])
def test_a_number_is_no_channel(patients, tmp_path, name):
    "AMOS and WORD number their patients as nnU-Net its channels."
    source = find_source(pairs(tmp_path / "s", patients, name, name))
    assert [case.patient for case in source.cases] == [name.format(n) for n in (1, 2, 3)] and source.notes == ()
    (tmp_path / "s" / "labels" / f"{name.format(3)}.nii.gz").unlink()
    rest = find_source(tmp_path / "s")
    assert len(rest.cases) == 2 and f"without a partner: {name.format(3)}." in rest.notes[0]


def test_a_channel_is_beside_the_first_one(patients, tmp_path):
    source = pairs(tmp_path / "s", patients, "pet_{}_0000", "pet_{}")
    for path in sorted((source / "images").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))
    found = find_source(source)
    assert [case.series for case in found.cases] == ["pet_1", "pet_2", "pet_3"] and all("_0000" in case.scan.name for case in found.cases)
    assert "3 further channels left out, such as pet_1_0001.nii.gz" in found.notes[0]
    assert set(scan_table(source).path) == {case.scan for case in found.cases}
    for number in range(2):  # but with masks of these names they are patients
        shutil.copy(source / "labels" / "pet_1.nii.gz", source / "labels" / f"pet_1_000{number}.nii.gz")
    assert {"pet_1_0000", "pet_1_0001", "pet_2", "pet_3"} == {case.series for case in find_source(source).cases}


@pytest.mark.parametrize("image, label", [
    ("img{:04d}", "label{:04d}"), ("volume-{}", "segmentation-{}"), ("p{}", "p{}_mask"), ("CASE{}", "case{}"), ("p{}_ct", "p{}_liver-gt"),
    ("images/p{}", "p{}"), (unicodedata.normalize("NFC", "Jörg {}"), unicodedata.normalize("NFD", "Jörg {}")),
])  # fmt: skip
def test_names_that_differ_by_a_fixed_part(patients, tmp_path, image, label):
    source = find_source(pairs(tmp_path / "s", patients, image, label))
    for case, number in zip(source.cases, (1, 2, 3), strict=True):
        names = [f"{name.format(number)}.nii.gz".rpartition("/")[2] for name in (image, label)]
        assert [case.scan.name, case.masks[0].name] == names
    assert f"{label.format(1)} is taken for the partner of {image.format(1)}" in source.notes[0]


@pytest.mark.parametrize("image, label", [("anna_{}", "bob_{}"), ("p{}_1", "p{}_2"), ("x{}", "y{}_mask")])
def test_names_of_strangers_are_no_pairs(patients, tmp_path, image, label):
    with pytest.raises(DataError, match=f"3 images and 3 masks, but none of the same name, such as {image.format(1)} and {label.format(1)}"):
        find_source(pairs(tmp_path / "s", patients, image, label))


def test_a_guess_is_no_pair(patients, tmp_path):
    source = pairs(tmp_path / "s", patients, "a-{}", "a_{}_mask")
    shutil.copy(source / "labels" / "a_1_mask.nii.gz", source / "labels" / "a.1.mask.nii.gz")
    with pytest.raises(DataError, match="none of the same name"):
        find_source(source)


@pytest.mark.parametrize("suffix", [".PNG", ".png"])
def test_png_masks_named_after_the_image(patients, tmp_path, suffix):
    for patient, (hu, mask, _) in patients.items():
        for z in range(SLICES):
            name = f"{patient}_1_{z:04d}"
            for path, plane in ((f"Images/{name}{suffix}", window(hu[z])), (f"Masks/{name}_Mask{suffix}", mask[z])):
                (tmp_path / "s" / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "s" / path).write_bytes(cv2.imencode(".png", plane)[1].tobytes())
    data = check(tmp_path / "s", patients, PrepareConfig(**SMALL), z=False)
    assert "_0000_Mask is taken for the partner of p0_1_0000" in data.info["notes"][0]


def test_what_a_mac_adds_and_what_lies_beside(patients, tmp_path):
    "Hidden files, a second copy of a case, empty folders and further pairs: nothing is taken twice, everything is named."
    source = pairs(tmp_path / "s", patients, "p{}", "p{}", masks="labelsTr")
    for path in list(source.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(b"of a Mac")
        (tmp_path / "__MACOSX" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "__MACOSX" / path.parent.name / path.name).write_bytes(b"of a Mac")
    (source / ".DS_Store").write_bytes(b"of a Mac")
    (source / ".cache").mkdir()
    shutil.copy(source / "images" / "p2.nii.gz", source / "images" / "p2.nii")
    (source / "imagesTs").mkdir()
    found = find_source(tmp_path)
    assert [case.series for case in found.cases] == ["p1", "p2", "p3"] and {case.scan.parent for case in found.cases} == {source / "images"}
    assert found.notes == ("imagesTs beside images left out; give such a pair with --mask.", "p2.nii.gz is left out: it has the name of p2.nii.")
    case, (hu, mask, affine) = tmp_path / "case", patients["p0"]
    write_mask(case / "ct.nii.gz", hu, affine)
    write_mask(case / "segmentations" / "liver.nii.gz", (mask == 1).astype(np.uint8), affine)
    (case / "ct.nii.gz").rename(case / "CT.NII.GZ")
    (case / "segmentations" / "liver.nii.gz").rename(case / "segmentations" / "Liver.NII.GZ")
    (case / "segmentations" / "._spleen.nii.gz").write_bytes(b"of a Mac")
    assert find_source(case).labelled == ("liver",)


@pytest.fixture(scope="module")
def segmented(patients, tmp_path_factory):
    "Two patients' series with a SEG each."
    folder = tmp_path_factory.mktemp("segmented") / "s"
    for patient in ("p0", "p1"):
        hu, mask, affine = patients[patient]
        write_series(folder / patient / "ct", hu, affine, patient_id=patient)
        save_dicom_seg(mask, read_scan(folder / patient / "ct"), folder / patient / "seg.dcm")
    return folder


def without(*keywords):
    "Takes elements out of each segment of a SEG."
    return lambda seg: [segment.pop(keyword, None) for segment in seg.SegmentSequence for keyword in keywords]


def sides_in_labels(left, right):
    "Moves the sides of the kidneys from their codes into their labels."

    def change(seg):
        kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in seg.SegmentSequence]
        for segment, kind in zip(seg.SegmentSequence, kinds):
            if kind.pop("SegmentedPropertyTypeModifierCodeSequence", None):
                segment.SegmentLabel = right if "Right" in segment.SegmentLabel else left

    return change


def labels_alone(seg):
    sides_in_labels("kidney_L", "Kidney R")(seg)
    without("SegmentedPropertyTypeCodeSequence", "SegmentedPropertyCategoryCodeSequence")(seg)


READABLE = {
    "side in the label": sides_in_labels("Left kidney", "Right kidney"), "side as a letter": sides_in_labels("KidneyL", "r"),
    "no code": labels_alone, "no category": without("SegmentedPropertyCategoryCodeSequence"), "no label": without("SegmentLabel"),
}  # fmt: skip
LACKING = {
    "on which side": sides_in_labels("kidney", "kidney"), "what it shows": without("SegmentLabel", "SegmentedPropertyTypeCodeSequence"),
    **{keyword: lambda seg, keyword=keyword: seg.pop(keyword) for keyword in (
        "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SegmentSequence", "PixelData", "ReferencedSeriesSequence")},
    "some of its frames": lambda seg: seg.PerFrameFunctionalGroupsSequence.pop(),
}  # fmt: skip


def changed(segmented, folder, change, patients=("p0",)):
    "A copy of the patients, the SEG of the first one changed; that SEG."
    for patient in patients:
        shutil.copytree(segmented / patient, folder / patient)
    seg = pydicom.dcmread(folder / "p0" / "seg.dcm")
    change(seg)
    seg.save_as(folder / "p0" / "seg.dcm")
    return folder / "p0" / "seg.dcm"


@pytest.mark.parametrize("change", READABLE)
def test_labels_of_dicom_seg_decide(segmented, patients, tmp_path, change):
    changed(segmented, tmp_path, READABLE[change])
    source = find_source(tmp_path)
    assert source.labelled == tuple(o.key for o in ORGANS) and list(source.notes) == []
    np.testing.assert_array_equal(source.cases[0].mask_on(read_scan(source.cases[0].scan)), patients["p0"][1])


@pytest.mark.parametrize("lacks", LACKING)
def test_what_a_dicom_seg_lacks_is_said(segmented, tmp_path, lacks):
    "The sentence names the SEG; another patient goes on."
    path = changed(segmented, tmp_path, LACKING[lacks], ("p0", "p1"))
    found = find_source(tmp_path)
    assert [case.patient for case in found.cases] == ["p1"]
    assert any(str(path) in note and lacks in note for note in found.notes)
    shutil.rmtree(tmp_path / "p1")
    with pytest.raises(DataError) as error:
        find_source(tmp_path)
    assert str(path) in str(error.value) and lacks in str(error.value) and "\n" not in str(error.value)


def zipped(folder, path, sign="/"):
    "The folder in a zip file, whose names have this sign between the folders."
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.writestr(zipfile.ZipInfo(str(file.relative_to(folder)).replace("/", sign)), file.read_bytes())
    return path


def kaggle(folder, patients, shorten=0):
    "Kaggle's layout with two patients; the second one's mask lacks some slices."
    for number, patient in enumerate(("p0", "p1"), 10):
        hu, mask, affine = patients[patient]
        write_series(folder / "train_images" / patient / f"9{number}", hu, affine)
        write_mask(folder / "segmentations" / f"9{number}.nii", mask[shorten * (number - 10) :], affine)
    return folder


def test_a_zip_with_backslashes(patients, tmp_path):
    packed = zipped(kaggle(tmp_path / "k", patients), tmp_path / "back.zip", "\\")
    two = {patient: patients[patient] for patient in ("p0", "p1")}
    assert check(packed, two, PrepareConfig(**SMALL)).info["kind"] == "Kaggle's competition folder"
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(zipfile.ZipInfo("..\\out.png"), b"")
    with pytest.raises(RsnaSegError, match="leads out of the folder"):
        prepare(packed, tmp_path / "no", config=PrepareConfig(**SMALL))
    for name in (".", "folder\\"):  # names without a file
        with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"")
        with pytest.raises(RsnaSegError, match="odd.zip"):
            prepare(tmp_path / "odd.zip", tmp_path / "no", config=PrepareConfig(**SMALL))
    assert not list(tmp_path.glob("no*"))


def test_a_zip_is_spoken_of_by_its_own_name(patients, tmp_path):
    write_series(tmp_path / "in" / "ct", *patients["p0"][::2])
    packed = zipped(tmp_path / "in", tmp_path / "in.zip")
    with pytest.raises(DataError, match="in.zip holds no masks") as error:
        prepare(packed, tmp_path / "data", config=PrepareConfig(**SMALL))
    assert "unpacked" not in str(error.value)
    (tmp_path / "text.zip").write_text("a text")
    for work in (lambda p: prepare(p, tmp_path / "data"), lambda p: score_masks(p, packed), read_input):
        with pytest.raises(RsnaSegError, match="text.zip cannot be unpacked"):
            work(tmp_path / "text.zip")


def test_too_few_patients_because_others_cannot_be_read(patients, tmp_path):
    source = kaggle(tmp_path / "k", patients, shorten=1)
    with pytest.raises(DataError, match=r"one patient only.*--valid 0.* Left out: .*911.nii has \(9, 64, 64\) voxels"):
        prepare(source, tmp_path / "data", config=PrepareConfig(**SMALL))
    with pytest.raises(DataError, match=r"Left out: .*k.zip/segmentations/911.nii has"):
        prepare(zipped(source, tmp_path / "k.zip"), tmp_path / "zip", config=PrepareConfig(**SMALL))
    (source / "segmentations" / "911.nii").unlink()
    with pytest.raises(DataError, match="one patient only.* Left out of the images, without a partner: 911."):
        prepare(source, tmp_path / "none", config=PrepareConfig(**SMALL))


def test_scores_from_every_door(patients, tmp_path):
    "Folders, zip files, layouts with scans and without, single files: the same masks are scored."
    tool, total, predicted = tmp_path / "tool", tmp_path / "total", tmp_path / "predicted"
    true = pairs(tmp_path / "pairs", patients, "p{}_0000", "p{}")
    for number, (hu, mask, affine) in enumerate(patients.values(), 1):
        for path in (tool / f"p{number}.nii.gz", predicted / f"p{number}" / "organs.nii.gz"):
            write_mask(path, np.roll(mask, 1, axis=2), affine)
        write_mask(total / f"p{number}" / "ct.nii.gz", hu, affine)
        for organ, name in zip(ORGANS, ("liver", "spleen", "kidney_left", "kidney_right")):
            write_mask(total / f"p{number}" / "segmentations" / f"{name}.nii.gz", (mask == organ.id).astype(np.uint8), affine)
        write_series(tmp_path / "k" / "train_images" / str(number) / f"p{number}", hu, affine)
        write_mask(tmp_path / "k" / "segmentations" / f"p{number}.nii", mask, affine)

    def scores(*paths):
        result = score_masks(*paths)
        assert result.skipped.empty, result.skipped.reason[0]
        return result.volumes[result.volumes.organ != "bowel"][["dice", "truth_ml"]].astype(float).to_numpy()

    expected = scores(tool, true / "labels")
    assert expected.shape == (12, 2) and 0.3 < np.nanmin(expected[:, 0]) < 0.99
    doors = [
        (tool, true / "labels", true / "images"), (predicted, true), (tool, total), (tool, tmp_path / "k"),
        (zipped(tool, tmp_path / "tool.zip"), zipped(true, tmp_path / "pairs.zip")),
    ]  # fmt: skip
    for paths in doors:
        np.testing.assert_allclose(scores(*paths), expected, rtol=2e-3)
    np.testing.assert_allclose(scores(predicted / "p1" / "organs.nii.gz", true / "labels" / "p1.nii.gz"), expected[:4], rtol=1e-6)
    flat = shutil.copytree(total / "p1" / "segmentations", tmp_path / "flat")  # the organs of one case
    assert (scores(flat, total / "p1" / "segmentations")[:, 0] == 1).all()


def test_the_same_sentence_from_every_door(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("no acute findings")
    doors = find_source, scan_table, read_input, lambda p: prepare(p, tmp_path / "data"), lambda p: score_masks(p, p)
    for path, says in ((tmp_path / "missing", "does not exist"), (tmp_path / "letters", "holds no scan")):
        sentences = set()
        for look in doors:
            with pytest.raises(RsnaSegError, match=says) as error:
                look(path)
            sentences.add(str(error.value))
        assert len(sentences) == 1, sentences
    shutil.make_archive(tmp_path / "letters" / "a", "zip", tmp_path / "letters")
    for look in (find_source, read_input):
        with pytest.raises(RsnaSegError, match="holds zip files, such as a.zip; give one"):
            look(tmp_path / "letters")


def test_a_folder_of_images_has_its_masks_beside_it(patients, tmp_path):
    source = pairs(tmp_path / "s", patients, "p{}", "p{}", masks="labelsTr")
    alone = find_source(source / "images")
    assert [case.masks for case in alone.cases] == [case.masks for case in find_source(source).cases]
    assert alone.notes == (f"The masks are those in {source / 'labelsTr'}.",)
    assert len(scan_table(source / "images")) == 3


def test_a_seg_of_another_series_is_named(segmented, tmp_path):
    shutil.copytree(segmented / "p0" / "ct", tmp_path / "ct")
    shutil.copy(segmented / "p1" / "seg.dcm", tmp_path / "seg.dcm")
    with pytest.raises(DataError, match="1 DICOM SEG, but none of the same name, such as 1.2") as error:
        find_source(tmp_path)
    assert f"{tmp_path / 'seg.dcm'} (ReferencedSeriesSequence: 1.2" in str(error.value)
