"What `inspect_data` finds in data sets with and without mistakes."

import shutil

import cv2
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from rsna_seg.anatomy.checks import odd_volumes
from rsna_seg.anatomy.inspect import inspect_data
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.files import OutputError
from rsna_seg.report.dataset import write_quality

SMALL = PrepareConfig(size=96, jobs=1)


def mask_file(kaggle, patient):
    series = sorted(p.name for p in (kaggle / "train_images" / patient).iterdir())[0]
    return next((kaggle / "segmentations").glob(f"{series}*"))


def read_ras(path):
    return nib.as_closest_canonical(nib.Nifti1Image.from_bytes(path.read_bytes()))


def plant(kaggle, patient, change):
    path = mask_file(kaggle, patient)
    mask = read_ras(path)
    path.write_bytes(nib.Nifti1Image(change(np.asarray(mask.dataobj)).astype(np.uint8), mask.affine).to_bytes())


def checks(quality, patient):
    return sorted(quality.suspects.kind[quality.suspects.patient == patient])


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "kaggle"
    write_kaggle(folder, patients=24, size=96, slices=24, seed=11)
    return folder


@pytest.fixture
def few(kaggle, tmp_path):
    "Five of the patients, two of them scanned twice."
    folder, kept = tmp_path / "kaggle", ("10000", "10001", "10005", "10006", "10007")
    others = [p.name for p in (kaggle / "train_images").iterdir() if p.name not in kept]
    return shutil.copytree(kaggle, folder, ignore=shutil.ignore_patterns(*others))


@pytest.fixture(scope="module")
def good(kaggle):
    return prepare(kaggle, kaggle.with_name("good"), config=SMALL)


@pytest.fixture
def copied(good, tmp_path):
    return shutil.copytree(good.folder, tmp_path / "data")


def rewrite(folder, change):
    "The manifest with a change applied, as another source would have made it."
    manifest = pd.read_csv(folder / "manifest.csv", dtype={"patient": str, "series": str})
    change(manifest).to_csv(folder / "manifest.csv", index=False)


def test_good_patients_are_not_suspected(good):
    quality = inspect_data(good.folder, jobs=1)
    assert quality.suspects.empty, str(quality)
    assert set(quality.findings.kind) <= {"missing", "cut_off", "incomplete"}
    assert "Nothing suspicious" in str(quality) and quality.copies.empty


def test_planted_mistakes_are_found(kaggle, tmp_path):
    source = shutil.copytree(kaggle, tmp_path / "kaggle")
    plant(source, "10000", lambda m: np.array([0, 1, 2, 4, 3, 5])[m])
    plant(source, "10005", lambda m: m[:, :, ::-1])
    plant(source, "10007", lambda m: np.asarray(read_ras(mask_file(kaggle, "10008")).dataobj))
    plant(source, "10013", lambda m: m[::-1])
    plant(source, "10015", lambda m: m[:, ::-1])
    plant(source, "10016", lambda m: m * 0)
    plant(source, "10021", lambda m: np.where((m == 1) & (np.arange(m.shape[2]) > 13), 0, m))
    quality = inspect_data(prepare(source, tmp_path / "data", config=SMALL).folder, jobs=1)
    found = {patient: checks(quality, patient) for patient in quality.suspects.patient.unique()}
    assert found == {
        "10000": ["sides"], "10005": ["fit", "order"], "10007": ["fit"], "10013": ["fit", "sides"],
        "10015": ["fit", "order"], "10016": ["no_organs"], "10021": ["odd_volume"],
    }  # fmt: skip
    page = write_quality(quality).read_text()
    assert write_quality(quality, tmp_path / "page") == tmp_path / "page" / "quality.html"
    (tmp_path / "page" / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_quality(quality, tmp_path / "page" / "file")
    assert all(f"{patient} / " in page or f">{patient}<" in page for patient in found)
    assert page.count("Where each organ is largest: ") == len(quality.series)
    assert pd.read_csv(tmp_path / "data" / "quality.csv", dtype=str).shape == quality.findings.shape


def test_damaged_files_are_found(copied):
    images, masks = (sorted((copied / kind).glob("10002_*.png")) for kind in ("images", "masks"))
    images[3].write_bytes(images[3].read_bytes()[:200])
    masks[8].write_bytes(b"")
    cv2.imwrite(str(images[12]), 255 - cv2.imread(str(images[12]), cv2.IMREAD_UNCHANGED))
    cv2.imwrite(str(masks[14]), cv2.imread(str(masks[14]), cv2.IMREAD_UNCHANGED) * 51)
    quality = inspect_data(copied, jobs=1)
    assert set(quality.suspects.patient) == {"10002"} and set(quality.suspects.kind) == {"damage"}
    assert len(quality.series.damage[quality.series.patient == "10002"].iloc[0]) == 4
    assert images[3].name in str(quality)


def test_a_patient_under_two_names_is_found(copied):
    "By four slices that are the same, three saved as JPEG and two in a narrower window; the page shows the pair."
    ones, others = (sorted((copied / "images").glob(f"{patient}_*.png"))[8:17] for patient in ("10002", "10003"))
    for k, (one, other) in enumerate(zip(ones, others)):
        grey = cv2.imread(str(one), cv2.IMREAD_UNCHANGED)
        worse = cv2.imdecode(cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], 0)
        narrow = np.clip(2 * grey.astype(int) - 100, 0, 255).astype(np.uint8)
        cv2.imwrite(str(other), grey if k < 4 else worse if k < 7 else narrow)
    quality = inspect_data(copied, jobs=1)
    (pair,) = quality.copies.itertuples(index=False, name=None)
    assert pair[0].startswith("10002 / ") and pair[1].startswith("10003 / ") and pair[2:4] == (4, 9)
    assert "1 pair of series of different patients share pictures" in str(quality) and "Nothing suspicious" not in str(quality)
    page = write_quality(quality, copied.parent / "page").read_text()
    assert page.index(">Copies</h2>") < page.index(">Contact sheet</h2>")
    assert page.count("Where each organ is largest: liver z ") == len(quality.series)


def test_slices_without_positions(copied):
    unknown = ["position_mm", "slice_mm", "row_mm", "col_mm", "tilt_deg", "orientation"]
    rewrite(copied, lambda m: m.assign(**dict.fromkeys(unknown, np.nan)))
    quality = inspect_data(copied, jobs=1)
    assert quality.suspects.empty
    assert quality.organs.ml.isna().all() and quality.organs.voxels.gt(0).all()
    assert "without positions" in str(quality)
    one = quality.series.series[quality.series.patient == "10000"].iloc[0]
    rewrite(copied, lambda m: m.assign(z=np.where(m.series == one, -m.z, m.z)))
    assert list(inspect_data(copied, jobs=1).suspects.itertuples(index=False, name=None))[0][:3] == ("10000", one, "order")
    rewrite(copied, lambda m: m.assign(z=-m.z))
    assert set(inspect_data(copied, jobs=1).suspects.series) == {one}
    write_quality(quality)


def test_unlabelled_organs_are_left_out(few, tmp_path):
    labelled = ("liver", "left_kidney", "right_kidney")
    plant(few, "10000", lambda m: np.array([0, 1, 2, 4, 3, 5])[m])
    config = PrepareConfig(size=96, jobs=1, labelled=labelled)
    quality = inspect_data(prepare(few, tmp_path / "data", config=config).folder, jobs=1)
    assert list(quality.suspects[["patient", "kind"]].itertuples(index=False, name=None)) == [("10000", "sides")]
    assert set(quality.organs.organ) == set(labelled)
    assert not any("spleen" in sentence for sentence in quality.findings.text)
    assert "Spleen and bowel are not labelled" in str(quality)


def test_series_without_masks(few, tmp_path):
    mask_file(few, "10000").unlink()
    quality = inspect_data(prepare(few, tmp_path / "data", config=PrepareConfig(size=96, jobs=1, all_series=True)).folder, jobs=2)
    assert quality.suspects.empty
    assert list(quality.series.patient[quality.series.masked == 0]) == ["10000"]
    assert "1 series without a mask" in str(quality)
    assert "none" in write_quality(quality).read_text()


def test_two_series_of_a_patient_must_agree(few, tmp_path):
    twice = "10001"
    plant(few, twice, lambda m: np.where((m == 3) & (np.arange(m.shape[2]) % 2 == 0), 0, m))
    quality = inspect_data(prepare(few, tmp_path / "data", config=SMALL).folder, jobs=1)
    assert {(f.patient, f.kind) for f in quality.suspects.itertuples()} == {(twice, "odd_volume")}
    assert "factor" in quality.suspects.text.iloc[0]


def test_notes_on_gaps_tilt_and_black_slices(copied):
    one = pd.read_csv(copied / "manifest.csv", dtype=str).series.iloc[0]
    gap = lambda m: np.where((m.series == one) & (m.z > 9), m.position_mm + 7, m.position_mm)
    rewrite(copied, lambda m: m.assign(position_mm=gap(m), tilt_deg=np.where(m.series == one, 12.0, 0.0)))
    name = sorted((copied / "images").glob("10000_*.png"))[0]
    cv2.imwrite(str(name), np.zeros((96, 96), np.uint8))
    found = inspect_data(copied, jobs=1).findings
    assert {"gaps", "tilt", "black", "damage"} <= set(found.kind[found.series == one])
    assert set(found.patient[found.kind.isin(["gaps", "tilt", "black"])]) == {"10000"}


def test_real_scan_is_not_suspected(real_ct, tmp_path):
    scan = real_ct / "totalseg_example"
    config = PrepareConfig(size=128, valid=0, jobs=1)
    quality = inspect_data(prepare(scan / "ct.nii.gz", tmp_path / "ct", scan / "segmentation.nii.gz", config).folder, jobs=1)
    assert quality.suspects.empty, str(quality)


def test_real_slices_are_not_suspected(real_ct, tmp_path):
    config = PrepareConfig(size=256, labelled=("liver", "left_kidney", "right_kidney"), jobs=1)
    quality = inspect_data(prepare(real_ct / "curvas_png", tmp_path / "png", config=config).folder, jobs=1)
    assert quality.suspects.empty and quality.copies.empty, str(quality)


def test_odd_volumes_need_neighbours_and_a_factor_of_two():
    rng = np.random.default_rng(0)
    spleens = np.exp(rng.normal(np.log(210), 0.35, 128))
    assert not odd_volumes(spleens).any()
    assert list(np.flatnonzero(odd_volumes(np.append(spleens, 12)))) == [128]
    assert not odd_volumes(np.full(9, 150.0)).any()
    assert odd_volumes(np.array([150.0] * 9 + [400])).sum() == 1
