"Many scans: each in a folder of its own, none twice, and what failed is told while the others go on."

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from test_several import end, two

from rsna_seg.app import many
from rsna_seg.app.cli import main
from rsna_seg.files import ConfigError, DataError
from rsna_seg.app.many import Job, predict_many
from rsna_seg.model import Card, build_model, save_checkpoint
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_mask, write_series
from rsna_seg.anatomy.repair import PostprocessConfig
from rsna_seg.predict import PredictConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["ann", "bob", "cyd"]
FILES = ["done.json", "organs.nii.gz", "volumes.csv", "volumes.json"]
WORK = """
import os, sys
from rsna_seg.app.many import Job, predict_many
from rsna_seg.predict import PredictConfig
predict_many(Job((sys.argv[1],), sys.argv[3], PredictConfig("torch"), ("nifti", "volumes")), sys.argv[2])
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.pth"
    save_checkpoint(build_model(encoder_weights="none").eval(), path, Card(size=64))
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    "Two NIfTI and a series, and a NIfTI that was cut short."
    folder = tmp_path_factory.mktemp("many") / "scans"
    for number, name in enumerate(NAMES):
        hu, _, affine = render(draw_patient(number), size=48, slices=6)
        write_series(folder / name, hu, affine) if name == "bob" else write_mask(folder / f"{name}.nii", hu, affine)
    (folder / "broken.nii").write_bytes((folder / "ann.nii").read_bytes()[:5000])
    return folder


@pytest.fixture
def job(net, tmp_path):
    return Job((str(net),), str(tmp_path / "out"), PredictConfig("torch"), ("nifti", "volumes"))


@pytest.fixture
def read(monkeypatch):
    "The names of the scans that are read from now on."
    names, opened = [], many.opened
    monkeypatch.setattr(many, "opened", lambda path, *more: names.append(Path(path).stem) or opened(path, *more))
    return names


def contents(folder):
    "What lies in the folder of each scan, and when it was written."
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in Path(folder).glob("[!.]*/*")}


def check_tables(out):
    "All three scans with all organs once, and the broken one with a sentence."
    volumes, failed = pd.read_csv(out / "volumes.csv"), pd.read_csv(out / "failed.csv")
    assert sorted(zip(volumes.scan, volumes.organ)) == sorted((name, o.key) for name in NAMES for o in ORGANS)
    assert failed.scan.tolist() == ["broken"]
    assert "broken.nii cannot be read as NIfTI" in failed.reason[0] and failed.reason[0].endswith(".")
    for name in NAMES:
        alone = pd.read_csv(out / name / "volumes.csv")
        pd.testing.assert_frame_equal(alone, volumes[volumes.scan == name].drop(columns="scan").reset_index(drop=True), atol=1e-3)
    return volumes, failed


def test_one_broken_scan_does_not_stop_the_others(job, scans, capsys):
    volumes, findings, failed = predict_many(job, scans)
    assert "left out: broken: " in capsys.readouterr().err
    told, also = check_tables(Path(job.out))
    assert len(told) == len(volumes) and also.equals(failed.reset_index(drop=True))
    assert volumes.ml.sum() > 0
    assert findings.equals(pd.read_csv(Path(job.out) / "findings.csv", keep_default_na=False)) and set(findings.scan) == set(NAMES)
    for name in NAMES:
        assert sorted(p.name for p in (Path(job.out) / name).iterdir()) == FILES
    assert not (Path(job.out) / "broken").exists()


def test_what_is_done_is_not_read_again(job, scans, read):
    "Only the scan that failed is tried again, and the tables are whole; a folder without its end mark is done anew."
    predict_many(job, scans)
    before, wanted = contents(job.out), check_tables(Path(job.out))[0]
    assert sorted(read) == sorted([*NAMES, "broken"])
    read.clear()
    (Path(job.out) / "volumes.csv").unlink()
    predict_many(job, scans)
    assert read == ["broken"] and contents(job.out) == before
    pd.testing.assert_frame_equal(check_tables(Path(job.out))[0], wanted)
    read.clear()
    (Path(job.out) / "cyd" / "done.json").write_text("{")
    predict_many(job, scans)
    assert sorted(read) == ["broken", "cyd"]


CHANGES = {
    "engine": {"config": PredictConfig("torch-bf16")},
    "post-processing": {"config": PredictConfig("torch", postprocess=PostprocessConfig(largest=True))},
    "crop": {"config": PredictConfig("torch", crop=False)},
    "outputs": {"outputs": ("nifti", "volumes", "png")},
    "probabilities": {"probabilities": True},
    "anonymous": {"config": PredictConfig("torch", anonymous=True)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_settings_are_done_anew(what, job, scans, read):
    if what == "probabilities":
        pytest.importorskip("h5py")
    predict_many(job, scans / "ann.nii")
    predict_many(replace(job, **CHANGES[what]), scans / "ann.nii")
    assert read == ["ann", "ann"]


def test_other_weights_are_done_anew(job, scans, read, net, tmp_path):
    "Told by what is in the file, not by its name."
    path, masks = tmp_path / "net.pth", []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_checkpoint(build_model(encoder_weights="none").eval(), path, Card(size=64))
        predict_many(replace(job, checkpoints=(str(path),)), scans / "ann.nii")
        masks.append((Path(job.out) / "ann" / "organs.nii.gz").read_bytes())
    assert read == ["ann", "ann"] and masks[0] == masks[1] != masks[2]


def test_a_scan_that_is_being_made_anew_is_not_done(job, scans, read, monkeypatch):
    "Stopped while its files are written for other settings, it is none of the first settings' either."
    predict_many(job, scans / "ann.nii")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(many, "save_segmentation", stop)
        with pytest.raises(KeyboardInterrupt):
            predict_many(replace(job, config=PredictConfig("torch", crop=False)), scans / "ann.nii")
    predict_many(job, scans / "ann.nii")
    assert read == ["ann"] * 3


@pytest.mark.parametrize("rank, asked, given", [("0", None, "cuda:0"), ("3", None, "cuda:1"), ("1", "cpu", "cpu"), (None, None, None)])
def test_each_process_has_its_own_gpu(monkeypatch, rank, asked, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert many.own_device(PredictConfig(device=asked)).device == given


def test_the_jobs_of_a_machine_share_out_its_gpus(monkeypatch, job, scans, capsys):
    "joblib's processes have numbers; an engine for processors stays where it is, and too few GPUs are mentioned."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    names = joblib.Parallel(3)(joblib.delayed(_name_of_process)() for _ in range(6))
    numbers = {name.rpartition("-")[2] for name in names}
    assert numbers and all(map(str.isdigit, numbers))  # one process may have been quick enough for all
    for number in ("1", "2", "3"):
        monkeypatch.setattr(many.current_process(), "name", f"LokyProcess-{number}")
        assert many.own_device(PredictConfig()).device == f"cuda:{int(number) % 2}"
        assert many.own_device(PredictConfig(engine="onnxruntime")).device is None
    monkeypatch.setattr(many, "Parallel", lambda *_, **__: lambda tasks: [])
    predict_many(job, scans, jobs=3)
    assert "3 jobs share 2 GPUs; --jobs 2 gives each its own." in capsys.readouterr().err


def _name_of_process():
    time.sleep(0.3)
    return many.current_process().name


def test_a_table_of_scans(job, scans, tmp_path, read, capsys):
    "Names, paths from the table's folder, spacing of pictures; another spacing or path of a name is another scan."
    from rsna_seg.ct.inputs import read_input
    from rsna_seg.ct.outputs import save_png_masks
    from rsna_seg.ct.scan import window

    scan = read_input(scans / "ann.nii")
    save_png_masks(window(scan.hu), scan, tmp_path / "pngs")
    table = tmp_path / "scans.csv"

    def run(spacing="5 0.8 0.7", path=scans / "cyd.nii"):
        table.write_text(f"name,path,spacing\nfirst one,{path},\npictures,pngs,{spacing}\n")
        read.clear()
        return predict_many(job, table)[0].set_index(["scan", "organ"])

    volumes = run()
    assert set(volumes.index.get_level_values(0)) == {"first-one", "pictures"}
    pictures = volumes.loc["pictures"]
    np.testing.assert_allclose(pictures.ml.astype(float), pictures.voxels.astype(float) * 5 * 0.8 * 0.7 / 1000, atol=2e-3)
    run()
    assert read == []
    thicker = run("10 0.8 0.7").loc["pictures"]
    np.testing.assert_allclose(thicker.ml.astype(float), 2 * pictures.ml.astype(float), atol=5e-3)
    assert read == ["pngs"]
    run("10 0.8 0.7", scans / "ann.nii")
    assert read == ["ann"]


@pytest.mark.parametrize("change, error, says", [({"outputs": ("dicom",)}, ConfigError, "no output dicom; choose from nifti"),
                                                 ({"checkpoints": ("absent.pth",)}, (ConfigError, OSError), "absent.pth")])  # fmt: skip
def test_what_fits_no_scan_is_told_at_once(job, scans, change, error, says):
    with pytest.raises(error, match=says):
        predict_many(replace(job, **change), scans)
    assert not Path(job.out).exists()


def test_a_folder_without_scans(job, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no scan"):
        predict_many(job, tmp_path / "empty")


def test_the_command(net, scans, tmp_path, capsys):
    "Exit code 1 when one scan was left out; 0 when all were done."
    for source, code, says in ((scans, 1, "3 scans segmented, 1 left out"), (tmp_path / "list.csv", 0, "2 scans segmented, 0 left out")):
        (tmp_path / "list.csv").write_text(f"path\n{scans / 'ann.nii'}\n{scans / 'bob'}\n")
        with pytest.raises(SystemExit) as done:
            main(["predict", str(net), str(source), str(tmp_path / "out"), "--engine", "torch", "--outputs", "volumes"])
        printed = capsys.readouterr().out
        assert done.value.code == code and says in printed and printed.startswith("loading the network; the first time, the fastest engine is found out")


def test_a_killed_process_goes_on(job, net, scans, read):
    "Killed as soon as a scan was done: what was done stays untouched, the rest is made, and no part of a file is left."
    out = Path(job.out)
    process = subprocess.Popen([sys.executable, "-c", WORK, net, scans, out], stderr=subprocess.DEVNULL)
    while not list(out.glob("*/done.json")):
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.parent for path in out.glob("*/done.json")}
    assert 1 <= len(done) < 3 and not (out / "volumes.csv").exists()
    before = {path: time for path, time in contents(out).items() if out / path.parent in done}
    predict_many(job, scans)
    assert sorted(read) == sorted({*NAMES, "broken"} - {folder.name for folder in done})
    assert before.items() <= contents(out).items()
    check_tables(out)


@pytest.mark.slow
def test_a_dask_cluster_does_the_same(job, scans, tmp_path):
    "Two processes of a cluster give the masks that one process gives."
    distributed = pytest.importorskip("distributed")
    predict_many(job, scans)
    there = replace(job, out=str(tmp_path / "there"))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client, joblib.parallel_config("dask"):
            predict_many(there, scans, jobs=None)
            ran = client.run(lambda: "rsna_seg.app.many" in sys.modules)
    assert list(ran.values()) == [True, True]
    pd.testing.assert_frame_equal(check_tables(Path(there.out))[0], check_tables(Path(job.out))[0])
    for name in NAMES:
        files = [(Path(folder) / name / "volumes.csv").read_text() for folder in (job.out, there.out)]
        assert files[0] == files[1]


@pytest.mark.slow
def test_two_processes_share_the_scans(job, net, scans, tmp_path):
    "As `torchrun` starts them: each scan is read by one of them, and the tables hold them all."
    (tmp_path / "work.py").write_text(WORK.replace("predict_many(", """from rsna_seg.app import many
opened = many.opened
def told(path, *more):
    print("read", os.environ["RANK"], path, flush=True)
    return opened(path, *more)
many.opened = told
predict_many(""", 1))
    out = Path(job.out)
    process = two(tmp_path / "work.py", net, scans, out)
    said, complaints = end(process, 200)
    assert process.returncode == 0, complaints
    seen = [line.split() for line in said.splitlines() if line.startswith("read")]
    assert sorted(Path(path).stem for _, _, path in seen) == sorted([*NAMES, "broken"])
    assert {rank for _, rank, _ in seen} == {"0", "1"}
    several = check_tables(out)[0]
    predict_many(job, scans)
    pd.testing.assert_frame_equal(check_tables(out)[0], several)
