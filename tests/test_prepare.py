"Preparing: killed, on a full disk, damaged, with broken series, on a cluster, from a zip file."

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import replace

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from command import rsna_seg

from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, add_split, balanced_draw, prepare
from rsna_seg.files import DataError, OutputError, ScanError

SMALL = PrepareConfig(size=64, jobs=1)


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "kaggle"
    write_kaggle(folder, patients=8, size=96, slices=16)
    return folder


@pytest.fixture
def own_kaggle(kaggle, tmp_path):
    "A copy to spoil."
    return shutil.copytree(kaggle, tmp_path / "kaggle")


def tree(folder):
    "The checksum of every file below a folder."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_killed_at_ten_random_moments(kaggle, tmp_path):
    "SIGKILL, then the same call again: the same bytes as an undisturbed run."
    big, fork, rng = PrepareConfig(size=512, jobs=1), multiprocessing.get_context("fork"), random.Random(0)
    start = time.perf_counter()
    whole = tree(prepare(kaggle, tmp_path / "whole", config=big).folder)
    seconds, found_unfinished = time.perf_counter() - start, 0
    for round in range(10):
        dest = tmp_path / f"killed{round}"
        process = fork.Process(target=prepare, args=(kaggle, dest), kwargs={"config": big})
        process.start()
        time.sleep(rng.uniform(0, seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found_unfinished += dest.with_name(f"{dest.name}.unfinished").exists()
        assert tree(prepare(kaggle, dest, config=big).folder) == whole
        assert not dest.with_name(f"{dest.name}.unfinished").exists()
        shutil.rmtree(dest)
    assert found_unfinished >= 3, "the moments missed the work; make it longer"


@pytest.mark.parametrize("at", ["os.replace", "shutil.rmtree", "rsna_seg.data.add_split"])
def test_killed_while_finishing(kaggle, tmp_path, monkeypatch, at):
    "The last steps one by one: manifest, final name, tidying up."
    whole = tree(prepare(kaggle, tmp_path / "whole", config=SMALL).folder)
    prepare(kaggle, tmp_path / "data", config=SMALL)
    image = next((tmp_path / "data" / "images").iterdir())
    image.unlink()  # the repair goes through the last steps again

    def die(*_, **__):
        raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(at, die)
        prepare(kaggle, tmp_path / "data", config=SMALL)
    assert tree(prepare(kaggle, tmp_path / "data", config=SMALL).folder) == whole


def test_full_disk_is_one_sentence(kaggle, tmp_path):
    "The disk fills up at one slice; with room again, the same command finishes."
    whole = tree(prepare(kaggle, tmp_path / "whole", config=SMALL).folder)
    images = tmp_path / "data.unfinished" / "images"
    images.mkdir(parents=True)
    name = sorted(os.listdir(tmp_path / "whole" / "images"))[40]
    full = images / name
    full.symlink_to("/dev/full")
    done = rsna_seg("prepare", kaggle, tmp_path / "data", "--size", 64)
    said = [line for line in done.stderr.splitlines() if line.startswith("rsna_seg ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(said) == 1 and "No space left" in said[0] and "unfinished" in said[0], done.stderr
    with pytest.raises(DataError, match="not a complete dataset folder"):
        open_data(tmp_path / "data.unfinished")
    assert not (tmp_path / "data").exists()
    full.unlink(missing_ok=True)
    assert rsna_seg("prepare", kaggle, tmp_path / "data", "--size", 64).returncode == 0
    assert tree(tmp_path / "data") == whole


def test_broken_series_do_not_stop_the_others(own_kaggle, tmp_path):
    masks = sorted((own_kaggle / "segmentations").iterdir())
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "other.nii")
    shutil.copy(tmp_path / "other.nii", masks[0])
    folder = next((own_kaggle / "train_images").glob(f"*/{masks[1].name.split('.')[0]}"))
    cut = sorted(folder.iterdir())[3]
    cut.write_bytes(cut.read_bytes()[:400])
    done = rsna_seg("prepare", own_kaggle, tmp_path / "data", "--size", 64)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("left out: series")]
    assert len(said) == 2 and any(cut.name in line for line in said) and any(masks[0].name in line for line in said), said
    data = open_data(tmp_path / "data")
    assert list(data.skipped.columns) == ["patient", "series", "source", "reason"] and len(data.skipped) == 2
    assert data.manifest.series.nunique() == len(masks) - 2
    assert len(os.listdir(data.folder / "images")) == len(data.manifest)
    assert data.damaged(jobs=1) == []


def test_nothing_readable_is_an_error(own_kaggle, tmp_path):
    for mask in (own_kaggle / "segmentations").iterdir():
        mask.write_bytes(b"no mask")
    with pytest.raises(DataError, match="No series of the source can be read"):
        prepare(own_kaggle, tmp_path / "data", config=SMALL)
    assert not (tmp_path / "data").exists()


def test_damage_is_found_and_repaired(kaggle, tmp_path):
    whole = tree(prepare(kaggle, tmp_path / "data", config=SMALL).folder)
    data = open_data(tmp_path / "data")
    mask = data.folder / data.manifest["mask"][30]
    mask.write_bytes(mask.read_bytes()[:-20])
    assert data.damaged(jobs=1) == [data.manifest["image"][30]]
    assert prepare(kaggle, data.folder, config=SMALL, verify=True).damaged(jobs=1) == []
    (data.folder / data.manifest["image"][7]).unlink()
    with pytest.raises(DataError, match="is missing, one of 1"):
        open_data(data.folder)
    prepare(kaggle, data.folder, config=SMALL)  # a missing file is seen without reading the others
    assert tree(data.folder) == whole
    table = data.folder / "manifest.csv"
    for spoil in (lambda: table.write_text(table.read_text().replace("valid", "train")), lambda: table.write_bytes(b"\xff,\n"), table.unlink):
        spoil()
        prepare(kaggle, data.folder, config=SMALL)
        assert tree(data.folder) == whole
    (data.folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="dataset.json is damaged"):
        prepare(kaggle, data.folder, config=SMALL)


def test_a_dask_cluster_gives_the_same_bytes(kaggle, tmp_path):
    distributed = pytest.importorskip("distributed")
    whole = tree(prepare(kaggle, tmp_path / "whole", config=SMALL).folder)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client, joblib.parallel_config("dask"):
            prepare(kaggle, tmp_path / "data", config=PrepareConfig(size=64))
            ran = client.run(lambda: "rsna_seg.ct.store" in sys.modules)
    assert list(ran.values()) == [True, True]
    assert tree(tmp_path / "data") == whole


@pytest.mark.parametrize("around", ["", "download/"])
def test_zip_files(kaggle, tmp_path, around):
    "The same dataset as from the folder, and nothing is unpacked elsewhere."
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(kaggle.rglob("*")):
            archive.write(path, around + str(path.relative_to(kaggle)))
        archive.writestr(around + "train_images/1/2/3.dcm", b"a series without a mask")
    prepare(tmp_path / "kaggle.zip", tmp_path / "out" / "data", config=SMALL)
    prepare(kaggle, tmp_path / "whole", config=SMALL)
    ours, theirs = tree(tmp_path / "out" / "data"), tree(tmp_path / "whole")
    assert {k: v for k, v in ours.items() if k != "dataset.json"} == {k: v for k, v in theirs.items() if k != "dataset.json"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kaggle.zip", "out", "whole"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_zip_entries_that_lead_out_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("images/1_1_1.png", b"")
        archive.writestr(zipfile.ZipInfo(name), b"gotcha")
    done = rsna_seg("prepare", tmp_path / "evil.zip", tmp_path / "in" / "data")
    assert done.returncode == 2 and "leads out of the folder" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("evil.png")) and list((tmp_path / "in").rglob("*")) == []


def test_damaged_zip(tmp_path, kaggle):
    path = tmp_path / "half.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(kaggle.rglob("*.dcm")):
            archive.write(file, file.relative_to(kaggle))
    data = bytearray(path.read_bytes())
    data[3000:3100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(ScanError, match="half.zip cannot be unpacked"):
        prepare(path, tmp_path / "data", config=SMALL)


def test_splits_are_balanced_and_by_patient():
    "128 patients as in RSNA: 13 for validation, with their share of slices and of rare organs, better than a blind draw."
    rng = np.random.default_rng(1)
    rows = []
    for patient in range(128):
        has = {o.key: int(rng.random() > (0.06 if o.key == "spleen" else 0.02)) * 100 for o in ORGANS}
        for series in range(1 + (patient < 78)):
            for z in range(int(rng.integers(40, 240))):
                rows.append({"patient": str(patient), "series": f"{patient}-{series}", "z": z, "mask": "m", **has})
    manifest = add_split(pd.DataFrame(rows))
    assert manifest.groupby("patient")[["split", "fold"]].nunique().max().max() == 1
    assert manifest[manifest.split == "valid"].patient.nunique() == 13
    assert abs((manifest.split == "valid").mean() - 0.1) < 0.01
    shares = manifest.groupby("fold").size() / len(manifest)
    assert len(shares) == 5 and shares.max() - shares.min() < 0.03
    without = manifest[manifest.spleen == 0].groupby("fold").patient.nunique()
    assert without.max() - without.min() <= 2
    same = add_split(pd.DataFrame(rows))
    pd.testing.assert_frame_equal(manifest, same)
    other = add_split(pd.DataFrame(rows), seed=1)
    assert (other.split != manifest.split).any()
    features = rng.normal(size=(128, 3))
    apart = {n: np.mean([np.abs(features[balanced_draw(features, [115, 13], s, n) == 1].mean(axis=0)).max() for s in range(20)]) for n in (1, 1000)}
    assert apart[1000] < apart[1] / 2, apart


def test_folds_are_opened(kaggle, tmp_path):
    prepare(kaggle, tmp_path / "data", config=PrepareConfig(size=64, jobs=1, folds=3))
    seen = []
    for fold in range(3):
        data = open_data(tmp_path / "data", fold=fold)
        seen += list(data.part("valid").patient.unique())
        assert not set(data.part("valid").patient) & set(data.part("train").patient)
    assert sorted(seen) == sorted(data.manifest.patient.unique())
    alike = replace(data, manifest=data.manifest.assign(series="1")).splits  # as many sets name them
    assert (alike.series == alike.patients).all() and alike.series.sum() > 2
    with pytest.raises(DataError, match="its folds are 0, 1, 2"):
        open_data(tmp_path / "data", fold=3)


def test_series_without_masks_on_request(own_kaggle, tmp_path):
    mask = sorted((own_kaggle / "segmentations").iterdir())[0]
    series = mask.name.split(".")[0]
    mask.unlink()
    assert series not in set(prepare(own_kaggle, tmp_path / "masked", config=SMALL).manifest.series)
    data = prepare(own_kaggle, tmp_path / "all", config=PrepareConfig(size=64, jobs=1, all_series=True))
    rows = data.manifest[data.manifest.series == series]
    assert len(rows) and rows["mask"].isna().all() and set(rows.split) == {"none"}
    assert json.loads((data.folder / "dataset.json").read_text())["all_series"] is True
    assert open_data(data.folder).damaged(jobs=1) == []


def test_output_errors_are_of_their_own_kind(kaggle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        prepare(kaggle, tmp_path / "file" / "data", config=SMALL)
