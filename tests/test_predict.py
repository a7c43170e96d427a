"From a scan to files: every organ lies where it lay, whatever the source, the engine, the crop; mistakes are told in one sentence."

import itertools
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from functools import partial

import cv2
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from browser import opened
from test_dicom_files import rt_places, seg_places
from scipy.ndimage import binary_dilation
from torch.nn.functional import one_hot, unfold

from rsna_seg import __version__
from rsna_seg.engines import engines
from rsna_seg.engines.slices import mean_logits, squares_of
from rsna_seg.app.cli import main
from rsna_seg.files import ConfigError
from rsna_seg.ct.inputs import from_array, read_input
from rsna_seg.model import Card, as_input, build_model, file_sha256, has_bf16, keep_memory, save_checkpoint
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_mask, write_series
from rsna_seg.anatomy.measure import find_body
from rsna_seg.anatomy.repair import PostprocessConfig
from rsna_seg.predict import PredictConfig, Predictor, Segmentation, plan_work, save_segmentation
from rsna_seg.ct.scan import window

pytestmark = pytest.mark.usefixtures("one_thread")

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS and LPS, both ways
AXES = ["".join(axes[k][f] for k, f in zip(order, flips)) for axes in (("RL", "AP", "SI"),)
        for order in itertools.permutations(range(3)) for flips in itertools.product((0, 1), repeat=3)]  # fmt: skip


def patient():
    "A patient of 12 slices of 40 x 48 pixels, none of them square, off the scanner's centre: HU, mask, affine to LPS mm."
    hu, mask, affine = render(draw_patient(1), size=48, slices=12)
    affine = affine @ np.diag([1, 1.1, 0.9, 1])
    affine[:3, 3] += 37, -21, 515
    return np.ascontiguousarray(hu[:, 4:44]), np.ascontiguousarray(mask[:, 4:44]), affine


def turned_a_little(affine):
    "The affine of a patient who lies a little askew: no axis of the voxels runs along one of the body."
    angle = np.radians(8)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tip = np.array([[1, 0, 0], [0, np.cos(0.1), -np.sin(0.1)], [0, np.sin(0.1), np.cos(0.1)]])
    out = affine.copy()
    out[:3] = turn @ tip @ affine[:3]
    return out


def organs_in(mask, affine):
    "Of each organ the centre in mm and the millilitres, from the voxels and nothing else, (5, 4)."
    ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    where = [np.argwhere(mask == o.id) for o in ORGANS]
    assert all(len(w) for w in where)
    return np.array([[*(affine[:3, :3] @ w.mean(0) + affine[:3, 3]), len(w) * ml] for w in where])


def save(scan, mask, out, *outputs):
    assert save_segmentation(Segmentation(mask, scan), out, outputs) == out
    return out


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    "A checkpoint of random weights whose last layer was fitted to a phantom by least squares: organs and background, not noise."
    keep_memory()
    torch.manual_seed(0)
    model, (hu, mask, _) = build_model(encoder_weights="none").train(), render(draw_patient(1), size=96, slices=16)
    images, classes = as_input(torch.from_numpy(window(hu))), torch.from_numpy(mask).long().ravel()
    with torch.no_grad():
        for _ in range(2):
            model(images)  # so that BatchNorm has seen something
        features = model.eval().decoder(model.encoder(images))
        around = unfold(features, 3, padding=1).permute(0, 2, 1).flatten(0, 1).double()
        a, b = torch.cat([around, torch.ones(len(around), 1)], 1), 20.0 * one_hot(classes, 6)
        weighted = a * (1 / classes.bincount().sqrt()[classes])[:, None]
        weights = torch.linalg.solve(weighted.T @ a + 1e-6 * torch.eye(a.shape[1]), weighted.T @ b.double())
        model.segmentation_head[0].weight.copy_(weights[:-1].T.reshape(6, -1, 3, 3))
        model.segmentation_head[0].bias.copy_(weights[-1])
    folder = tmp_path_factory.mktemp("net")
    save_checkpoint(model, folder / "net.pth", Card(size=96))
    save_checkpoint(model, folder / "large.pth", Card(size=512))
    return folder / "net.pth"


@pytest.fixture(scope="module")
def phantom():
    hu, mask, affine = render(draw_patient(1), size=96, slices=16)
    return from_array(hu, affine, "LPS", "phantom")


@pytest.mark.parametrize("axes", AXES)
def test_nifti_in_any_order_gets_its_own_grid_back(axes, tmp_path):
    "All 48 ways to store a volume: shape and affine of the source, organs where they were in the patient, as nibabel reads it."
    hu, mask, affine = patient()
    affine = turned_a_little(affine)
    write_mask(tmp_path / "ct.nii", hu, affine, axes)
    scan = read_input(tmp_path / "ct.nii")
    np.testing.assert_array_equal(scan.hu, hu)
    source, written = nib.load(tmp_path / "ct.nii"), nib.load(save(scan, mask, tmp_path / "out", "nifti") / "organs.nii.gz")
    assert "".join(nib.aff2axcodes(source.affine)) == axes
    assert written.get_data_dtype() == np.uint8 and written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    found, truth = organs_in(np.asarray(written.dataobj), LPS @ written.affine), organs_in(mask, affine)
    np.testing.assert_allclose(found, truth, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAL", "IAR"])
def test_nifti_as_simpleitk_reads_it(axes, tmp_path):
    "Origin, spacing and directions are those of the source; the organs lie where they were."
    sitk = pytest.importorskip("SimpleITK")
    hu, mask, affine = patient()
    affine = turned_a_little(affine)
    write_mask(tmp_path / "ct.nii", hu, affine, axes)
    scan = read_input(tmp_path / "ct.nii")
    source, image = sitk.ReadImage(tmp_path / "ct.nii"), sitk.ReadImage(save(scan, mask, tmp_path, "nifti") / "organs.nii.gz")
    assert image.GetPixelID() == sitk.sitkUInt8 and image.GetSize() == source.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(image, name)() == getattr(source, name)()
    theirs, truth = sitk.GetArrayFromImage(image).T, organs_in(mask, affine)
    for o, (*centre, ml) in zip(ORGANS, truth):
        index = np.argwhere(theirs == o.id)
        np.testing.assert_allclose(image.TransformContinuousIndexToPhysicalPoint(index.mean(0).tolist()), centre, atol=2e-3)
        assert len(index) * np.prod(image.GetSpacing()) / 1000 == pytest.approx(ml, rel=1e-5)


def test_headers_that_say_it_otherwise(tmp_path):
    "Scaled values and a place in the qform alone: the mask holds 0..5 at the same place."
    hu, mask, affine = patient()
    image = nib.Nifti1Image(((hu.T.astype(int) + 1024) * 2).astype(np.int16), None)
    image.set_qform(LPS @ turned_a_little(affine)[:, [2, 1, 0, 3]], 1)
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([0.5, -1024], "<f4").tobytes()  # scl_slope and scl_inter, which nibabel does not write
    (tmp_path / "ct.nii").write_bytes(raw)
    scan = read_input(tmp_path / "ct.nii")
    np.testing.assert_array_equal(scan.hu, hu)
    source, written = nib.load(tmp_path / "ct.nii"), nib.load(save(scan, mask, tmp_path, "nifti") / "organs.nii.gz")
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    assert written.get_data_dtype() == np.uint8 and set(np.unique(written.get_fdata())) == set(range(6))
    np.testing.assert_array_equal(written.get_fdata(), mask.T)


SERIES = {  # axes of the stored volume that are flipped, the position that is stated, what else
    "HFS": ((), "HFS", {}),
    "FFS": ((0, 2), "FFS", {}),
    "HFP": ((1, 2), "HFP", {}),
    "reversed": ((), "HFS", {"falling": True}),
    "tilted": ((), "HFS", {"lean": 0.3}),
}


@pytest.mark.parametrize("case", SERIES)
def test_dicom_from_the_folder_to_three_files(case, tmp_path):
    "NIfTI by nibabel and SimpleITK, SEG and RTSTRUCT by pydicom: the same organs in the same places, and those of the patient."
    pytest.importorskip("highdicom")
    hu, mask, affine = patient()
    flipped, position, how = SERIES[case]
    affine[1, 0] += how.get("lean", 0) * affine[2, 0]
    truth, stored = organs_in(mask, affine), affine.copy()
    for axis in flipped:
        stored[:3, 3] += stored[:3, axis] * (hu.shape[axis] - 1)
        stored[:3, axis] *= -1
    write_series(tmp_path / "ct", np.flip(hu, flipped), stored, falling=how.get("falling", False))
    for path in (tmp_path / "ct").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PatientPosition = position
        dataset.save_as(path)
    scan = read_input(tmp_path / "ct")
    np.testing.assert_array_equal(scan.hu, hu)
    out = save(scan, mask, tmp_path / "out", "nifti", "seg", "rtstruct")
    image = nib.load(out / "organs.nii.gz")
    np.testing.assert_allclose(organs_in(np.asarray(image.dataobj), LPS @ image.affine), truth, atol=0.01, rtol=1e-4)
    pixel_ml = np.linalg.norm(affine[:3, 1]) * np.linalg.norm(affine[:3, 2]) * affine[2, 0] / 1000
    for places in (seg_places(out / "organs.seg.dcm"), rt_places(out / "organs.rtstruct.dcm", scan.source.files)):
        found = [[*places[o.id].mean(0), len(places[o.id]) * pixel_ml] for o in ORGANS]
        np.testing.assert_allclose(found, truth, atol=0.01, rtol=1e-4)
    if "lean" in how:
        assert scan.tilt_deg > 10 and any("tilt" in note for note in scan.notes)
    else:
        sitk = pytest.importorskip("SimpleITK")
        theirs = sitk.ReadImage(out / "organs.nii.gz")
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
        ct, array = reader.Execute(), sitk.GetArrayFromImage(theirs).T
        for o, (*centre, _) in zip(ORGANS, truth):
            index = np.argwhere(array == o.id)
            np.testing.assert_allclose(theirs.TransformContinuousIndexToPhysicalPoint(index.mean(0).tolist()), centre, atol=0.01)
            # in their own reading of the series the organ's first voxel has the HU that it has in ours
            z, row, col = np.argwhere(mask == o.id)[0]
            there = (affine @ (z, row, col, 1))[:3]
            assert ct[ct.TransformPhysicalPointToIndex(there.tolist())] == hu[z, row, col]


def equal(one, other):
    return float((one == other).mean())


def test_cropping_changes_nothing(real_ct, net):
    "On a real torso and a real series at 512: the body has the same organs, but for rounding; the air around it has none."
    torso, series = read_input(real_ct / "totalseg_example" / "ct.nii.gz"), read_input(real_ct / "ct3slice" / "series")
    air = np.pad(torso.hu[40:80:20], ((0, 0), (30, 29), (19, 19)), constant_values=-1000)  # as in a wide field of view
    some = from_array(air, torso.affine @ np.diag([20, 1, 1, 1]), "LPS")
    whole, cropped = (Predictor(net.with_name("large.pth"), PredictConfig("torch", crop=crop)) for crop in (False, True))
    for scan in (some, series):
        box, ranks = plan_work(scan, cropped.card)
        assert (box[1] - box[0]) * (box[3] - box[2]) < 0.95 * 512**2, box
        masks = whole(scan).mask, cropped(scan).mask
        assert (np.bincount(masks[0].ravel(), minlength=6) > 0).sum() >= 3  # it finds something
        top, bottom, left, right = find_body(scan.hu, cropped.card.level - cropped.card.width / 2).box
        body = np.zeros(scan.hu.shape, bool)
        body[ranks, top : bottom, left : right] = True
        assert equal(masks[0][body], masks[1][body]) >= 0.9999
        air = ~binary_dilation(body, np.ones((1, 9, 9)))  # a pixel of the network is several of the torso
        assert not masks[1][air].any()


@pytest.mark.parametrize("engine, enough", [("openvino", 0.999), ("onnxruntime", 0.999), ("torch-bf16", 0.995)])
def test_engines_agree(monkeypatch, net, phantom, engine, enough):
    "The classes of PyTorch in float32; OpenVINO in float32 too, as left to itself it takes bfloat16 where the processor has it."
    for package in {"openvino": ["openvino"], "onnxruntime": ["onnx", "onnxscript", "onnxruntime"]}.get(engine, ()):
        pytest.importorskip(package)
    monkeypatch.setattr(engines, "OpenvinoEngine", partial(engines.OpenvinoEngine, precision="f32"))
    masks = [Predictor(net, PredictConfig(name, batch_size=8))(phantom).mask for name in ("torch", engine)]
    assert len(np.unique(masks[0])) >= 4
    assert equal(*masks) >= enough


@pytest.fixture(scope="module")
def other(net):
    "Another network of the same kind."
    torch.manual_seed(1)
    save_checkpoint(build_model(encoder_weights="none").eval(), net.with_name("other.pth"), Card(size=96))
    return net.with_name("other.pth")


def shares(predictor, hu, z):
    "Probabilities of some slices."
    return mean_logits(predictor.engines, squares_of(hu, z, predictor.card), predictor.card.labelled).float().softmax(1)


def test_several_checkpoints_are_averaged(net, other, phantom):
    "Probabilities are, not classes nor logits, and in whatever order."
    config, z = PredictConfig("torch"), np.array([4, 9])
    one, two, both, turned = (shares(Predictor(paths, config), phantom.hu, z) for paths in ([net], other, [net, other], [other, net]))
    assert (one - two).abs().max() > 0.3
    torch.testing.assert_close(both, (one + two) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(both, turned, atol=1e-5, rtol=0)
    mask = Predictor([net, other], config)(phantom).mask
    assert equal(mask[z], both.argmax(1).numpy()) > 0.99


@pytest.mark.parametrize("card", [{"size": 128}, {"level": 40.0}, {"width": 350.0}, {"channels": "neighbours"}, {"labelled": ["liver"]}])
def test_unlike_checkpoints_are_not_averaged(tmp_path, net, card):
    save_checkpoint(build_model(encoder_weights="none"), tmp_path / "odd.pth", Card(**{"size": 96, **card}))
    with pytest.raises(ConfigError, match=rf"odd.pth and .*net.pth differ in {next(iter(card))} .* cannot be averaged\."):
        Predictor([net, tmp_path / "odd.pth"], PredictConfig("torch"))


def lap_times(monkeypatch, *speeds):
    "Lets the engines of a race be as fast as that, one after the other; returns the speeds that were not asked for yet."
    left = list(speeds)
    monkeypatch.setattr(engines, "measure_engine", lambda engine, size: left.pop(0))
    return left


def chosen(net):
    return Predictor(net, PredictConfig(device="cpu")).engine


def test_the_choice_of_an_engine_is_kept(net, other, tmp_path, monkeypatch):
    "For a checkpoint and the versions, until it is forgotten, though the next race would end otherwise."
    monkeypatch.setenv("RSNA_SEG_CACHE", str(tmp_path))
    monkeypatch.setitem(engines.ENGINES, "openvino", engines.Engine(engines._torch(torch.float32), tried=(True, False)))
    monkeypatch.setitem(engines.ENGINES, "onnxruntime", engines.Engine(engines._torch(torch.float32)))
    left = lap_times(monkeypatch, 1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0)
    first = chosen(net)
    assert [chosen(net), chosen(net), len(left)] == ["openvino", "openvino", 6] and first == "openvino"
    assert [chosen(other), len(left)] == ["torch-bf16" if has_bf16() else "torch", 4]
    monkeypatch.setattr(engines, "distributions", lambda name: [])
    assert chosen(net) != first and len(left) == 2
    engines.forget_engines()
    assert chosen(net) != first and left == []
    assert chosen(net) != first


@pytest.mark.parametrize("kept", ["", "{", "[]", "null", "3", '{"slices_per_second": {"torch": "fast"}}', None])
def test_a_choice_that_cannot_be_read_is_measured_again(kept, net, tmp_path, monkeypatch):
    "A broken file, a folder in its place, or no cache folder at all."
    monkeypatch.setenv("RSNA_SEG_CACHE", str(tmp_path / "cache"))
    left = lap_times(monkeypatch, *range(20, 0, -1))
    first = chosen(net)
    if kept is None:
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").touch()
    else:
        (file,) = (tmp_path / "cache" / "engines").iterdir()
        file.write_text(kept)
    before = len(left)
    assert chosen(net) == first and len(left) < before


def test_a_result_says_what_made_it(net, other, tmp_path):
    "JSON, page, SEG and RTSTRUCT name weights by their SHA-256 as they were loaded, also two of one name; the engine's name is one to ask for."
    pytest.importorskip("highdicom")
    hu, _, affine = patient()
    paths = [tmp_path / fold / "best.pth" for fold in "ab"]
    for path, source in zip(paths, (net, other)):
        path.parent.mkdir()
        for suffix in (".pth", ".json"):
            path.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())
    sums = [file_sha256(path) for path in paths]
    predictor = Predictor(paths, PredictConfig(device="cpu"))
    paths[0].write_bytes(b"another file of that name")
    out = save_segmentation(predictor(write_series(tmp_path / "ct", hu, affine)), tmp_path / "out", ("seg", "rtstruct", "report", "volumes"))
    made = json.loads((out / "volumes.json").read_text())["made_with"]
    assert (made["checkpoint"], made["sha256"], made["rsna_seg"]) == (["best.pth"] * 2, sums, __version__)
    assert made["precision"] in ("float32", "bfloat16") and made["date"][:10] == f"{datetime.now():%Y-%m-%d}"
    assert Predictor(net, PredictConfig(engine=made["engine"], device="cpu")).engine == predictor.engine
    page, seg, rtstruct = (out / "report.html").read_text(), pydicom.dcmread(out / "organs.seg.dcm"), pydicom.dcmread(out / "organs.rtstruct.dcm")
    identified = [segment.SegmentationAlgorithmIdentificationSequence for segment in seg.SegmentSequence]
    identified += [roi.ROIDerivationAlgorithmIdentificationSequence for roi in rtstruct.StructureSetROISequence]
    for (by,) in identified:
        assert (by.AlgorithmName, by.AlgorithmVersion) == ("rsna_seg", __version__)
        for text in (page, by.AlgorithmParameters):
            assert all(word in text for word in (*sums, "best.pth and best.pth", made["engine"], made["precision"], made["date"]))


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_an_engine_by_name_gives_the_same_bytes(engine, net, phantom, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    files = [save_segmentation(Predictor(net, PredictConfig(engine))(phantom), tmp_path / run, ("nifti",)) / "organs.nii.gz" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_probabilities(tmp_path, net, phantom):
    "Of the network before post-processing, a chunk a slice; they sum to 1."
    h5py = pytest.importorskip("h5py")
    plain = Predictor(net, PredictConfig("torch"))(phantom).mask
    config = PredictConfig("torch", postprocess=PostprocessConfig(min_piece_ml=1e6))
    result = Predictor(net, config)(phantom, tmp_path / "new" / "p.h5")
    assert plain.any() and not result.mask.any() and len(result.changes)
    with h5py.File(tmp_path / "new" / "p.h5") as file:
        found = file["probabilities"]
        assert found.dtype == np.float16 and found.shape == (16, 6, 96, 96) and found.chunks == (1, 6, 96, 96)
        np.testing.assert_array_equal(found.attrs["affine_lps"], phantom.affine)
        assert list(found.attrs["classes"]) == ["background", *(o.key for o in ORGANS)]
        p = found[:].astype(np.float32)
    np.testing.assert_allclose(p.sum(1), 1, atol=2e-3)
    differs = p.argmax(1) != plain
    close = p.max(1) - np.take_along_axis(p, plain[:, None].astype(int), 1)[:, 0]
    assert differs.mean() < 1e-3 and close[differs].max(initial=0) < 1e-3  # a tie in half precision
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["p.h5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A NIfTI, a series, a folder of two series, PNG slices, and files that are no scan or no checkpoint."
    folder = tmp_path_factory.mktemp("place")
    hu, _, affine = patient()
    write_mask(folder / "ct.nii", hu, affine)
    write_series(folder / "series", hu, affine)
    for number in (1, 2):
        write_series(folder / "two" / str(number), hu, affine)
        for path in (folder / "two" / str(number)).iterdir():
            dataset = pydicom.dcmread(path)
            dataset.SeriesNumber = number
            dataset.save_as(folder / "two" / f"{number}-{path.name}")
        shutil.rmtree(folder / "two" / str(number))
    (folder / "pngs").mkdir()
    for k, plane in enumerate(window(hu)):
        cv2.imwrite(str(folder / "pngs" / f"slice{k}.png"), plane)
    (folder / "empty").mkdir()
    (folder / "notes.pth").write_text("these are no weights")
    (folder / "notes.txt").write_text("no acute findings")
    (folder / "scans.csv").write_text("name\nann\n")
    return folder


def rsna_seg(capsys, *words):
    "Exit code, what was printed, what was complained of; anything but an exit is a traceback, and fails the test."
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, words), "--engine", "torch"])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


MISTAKES = {  # words after the command, and what the sentence holds
    "no checkpoint": (["absent.pth", "ct.nii", "out"], "absent.pth does not exist"),
    "not a checkpoint": (["notes.pth", "ct.nii", "out"], "notes.pth is text and no weights: it begins with 'these are no weights'"),
    "no scan": (["NET", "absent.nii", "out"], "absent.nii does not exist"),
    "not a scan": (["NET", "notes.txt", "out"], "notes.txt is no scan that is known here"),
    "nothing in it": (["NET", "empty", "out"], "empty holds no scan"),
    "two series": (["NET", "two", "out"], "two holds 2 CT series; choose one with --series and its UID"),
    "which series": (["NET", "two", "out", "--series", "7"], "two holds no CT series 7; choose one with --series"),
    "no choice": (["NET", "ct.nii", "out", "--series", "7"], "leave --series 7 away"),
    "spacing of DICOM": (["NET", "series", "out", "--spacing", 1, 1, 1], "has a spacing of its own"),
    "spacing of nothing": (["NET", "pngs", "out", "--spacing", 1, 1, 0], "is not three mm above 0"),
    "table without paths": (["NET", "scans.csv", "out"], "scans.csv has no column path"),
    "SEG of NIfTI": (["NET", "ct.nii", "out", "--outputs", "nifti", "seg"], "is no DICOM series"),
    "out is a file": (["NET", "ct.nii", "notes.txt"], "notes.txt cannot be written"),
    "unlike another": (["NET", "ct.nii", "out", "--also", "LARGE"], "differ in size"),
    "no such device": (["NET", "ct.nii", "out", "--device", "gpu"], "There is no device gpu; choose cpu, cuda"),
    "no such GPU": (["NET", "ct.nii", "out", "--device", "cuda:64"], "PyTorch finds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(mistake, place, net, capsys, monkeypatch):
    "Exit code 2, no traceback, nothing half-written; of several series the lines below the sentence tell which there are."
    monkeypatch.chdir(place)
    words, says = MISTAKES[mistake]
    code, _, complaints = rsna_seg(capsys, *({"NET": net, "LARGE": net.with_name("large.pth")}.get(w, w) for w in words))
    first, *more = complaints.splitlines()
    assert code == 2 and first.startswith("rsna_seg predict: ") and says in first, complaints
    assert len(more) == (3 if mistake in ("two series", "which series") else 0), complaints  # a table
    assert all(re.match(r"[\d.]+ +\d +12 +20.167", line) for line in more[1:]), complaints
    assert not (place / "out").exists() and (place / "notes.txt").read_text() == "no acute findings"


@pytest.mark.parametrize("words, says", [(["--outputs", "dicom"], "dicom"), (["--batch-size", 0], "batch_size is 0; it must be at least 1"),
                                         (["--spacing", 1, 1], "--spacing")])  # fmt: skip
def test_words_that_do_not_fit(words, says, place, net, capsys, tmp_path):
    code, _, complaints = rsna_seg(capsys, net, place / "ct.nii", tmp_path / "out", *words)
    assert code == 2 and says in " ".join(complaints.replace("│", " ").split()), complaints
    assert not (tmp_path / "out").exists()


def test_a_new_process_says_it_too(place, tmp_path):
    "Of the mistakes one as a user types it."
    command = [sys.executable, "-c", "from rsna_seg.app.cli import main; main()", "predict", place / "notes.pth", place / "ct.nii", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    begins, *complaints = done.stderr.splitlines()
    assert done.returncode == 2 and begins.startswith("loading") and len(complaints) == 1, done.stderr


@pytest.mark.parametrize("series", ["1", "2"])
def test_a_series_is_chosen(series, place, net, capsys, tmp_path):
    code, said, complaints = rsna_seg(capsys, net, place / "two", tmp_path, "--series", series, "--outputs", "volumes")
    assert code == 0, complaints
    assert sorted(p.name for p in tmp_path.iterdir()) == ["volumes.csv", "volumes.json"]


def test_engines_are_measured_again_where_asked_for(place, net, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RSNA_SEG_CACHE", str(tmp_path))
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "0123.json").touch()
    for words, kept in (([], 1), (["--measure-again"], 0)):
        code, _, complaints = rsna_seg(capsys, net, place / "ct.nii", tmp_path / "out", "--outputs", "volumes", *words)
        assert (code, len(list((tmp_path / "engines").iterdir()))) == (0, kept), complaints


def test_pngs_without_spacing_have_no_millilitres(place, net, capsys, tmp_path):
    "But a mask for each slice and a note; with a spacing the millilitres are there."
    code, said, complaints = rsna_seg(capsys, net, place / "pngs", tmp_path / "bare", "--outputs", "png", "volumes")
    assert code == 0 and "has no spacing: volumes are voxels, not ml; give --spacing" in said, complaints
    bare = pd.read_csv(tmp_path / "bare" / "volumes.csv").set_index("organ")
    assert bare.ml.isna().all() and bare.voxels.sum() > 0
    masks = [cv2.imread(str(tmp_path / "bare" / "masks" / f"slice{k}.png"), cv2.IMREAD_UNCHANGED) for k in range(12)]
    assert np.bincount(np.ravel(masks), minlength=6)[1:].tolist() == bare.voxels.tolist()
    code, said, _ = rsna_seg(capsys, net, place / "pngs", tmp_path / "measured", "--outputs", "volumes", "--spacing", 20, 8, 7)
    measured = pd.read_csv(tmp_path / "measured" / "volumes.csv").set_index("organ")
    assert code == 0 and "has no spacing" not in said
    np.testing.assert_allclose(measured.ml, bare.voxels * 1.12, atol=2e-3)


def test_a_browser_opens_the_report(browser, place, net, capsys, tmp_path):
    "One file, opened from the disk: no error, no request, and the warnings that `findings` gives."
    code, said, complaints = rsna_seg(capsys, net, place / "series", tmp_path / "out", "--outputs", "report")
    assert code == 0, complaints
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["report.html"]
    findings = Predictor(net, PredictConfig("torch"))(place / "series").findings
    assert len(findings) >= 2 and all(f"check: {f.text}" in said for f in findings)
    with opened(browser, tmp_path / "out" / "report.html") as (page, seen):
        page.locator(".viewer[data-ready]").wait_for()
        assert page.get_by_role("note", name="Please check").get_by_role("listitem").all_inner_texts() == [f.text for f in findings if not f.organ]
        assert page.locator(".organs .warning").all_inner_texts() == [f"⚠ {f.text}" for o in ORGANS for f in findings if f.organ == o.key]
        assert page.get_by_role("checkbox", name="Unsure").count() == 1
        assert page.get_by_role("table", name="Organs").get_by_role("rowheader").all_inner_texts() == [o.name for o in ORGANS]
        assert seen.problems == [] and seen.elsewhere == []


def test_the_page_names_patient_and_study_unless_anonymous(place, net, phantom, capsys, tmp_path):
    "What the files say of them, and instance numbers as they stand in the files; anonymous leaves out the names, and those of folders and files."
    folder = tmp_path / "Doe_Jane"
    write_series(folder, phantom.hu, phantom.affine)
    for path in folder.glob("*.dcm"):
        header = pydicom.dcmread(path)
        header.PatientName, header.PatientID, header.PatientBirthDate = "DOE^JANE", "P-77", "19610504"
        header.StudyDate, header.StudyDescription, header.AccessionNumber = "20230531", "CT ABDOMEN", "ACC-9"
        header.save_as(path)
    header.ImageType, header.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], header.SOPInstanceUID + ".1"
    header.save_as(folder / "localizer_doe.dcm")  # left out, as a note says
    names = ("DOE JANE", "P-77", "1961-05-04", "2023-05-31", "CT ABDOMEN", "ACC-9")
    pages = {}
    for flags in ([], ["--anonymous"]):
        code, said, complaints = rsna_seg(capsys, net, folder, tmp_path / f"out{len(flags)}", "--outputs", "report", *flags)
        assert code == 0, complaints
        pages[len(flags)] = (tmp_path / f"out{len(flags)}" / "report.html").read_text("utf-8")
    assert "localizer_doe.dcm is left out" in pages[0]
    assert all(name in pages[0] for name in names) and "<h1>Doe_Jane</h1>" in pages[0] and '"instances": ["' in pages[0]
    assert [name for name in (*names, "Doe", "localizer", str(tmp_path)) if name in pages[1]] == [] and "<h1>Scan</h1>" in pages[1]


HEAVY = {"accelerate", "albumentations", "cc3d", "h5py", "highdicom", "huggingface_hub", "matplotlib", "monai", "onnx", "onnxruntime", "openvino",
         "scipy.ndimage", "scipy.stats", "seaborn", "segmentation_models_pytorch", "skimage", "sklearn", "timm", "torchvision"}  # fmt: skip


@pytest.mark.parametrize("start, heavy", [("import rsna_seg.predict", HEAVY), ("from rsna_seg.app.cli import main", HEAVY | {"numpy", "pandas", "torch"})])
def test_importing_leaves_heavy_libraries_for_later(start, heavy):
    "Those that a mask, or the list of commands, does not need; benchmarks/start.py tells the seconds."
    code = f"import sys; {start}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rsna_seg" in loaded and not heavy & set(loaded)


MEMORY = """
import sys
import time
from pathlib import Path
import torch
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.predict import save_segmentation
torch.set_num_threads(1)
result = Predictor(sys.argv[1], PredictConfig("torch", batch_size=8))(sys.argv[2])
save_segmentation(result, sys.argv[3], ("nifti", "preview", "volumes"))
print(result.mask.shape, Path("/proc/self/status").read_text())
"""


@pytest.mark.slow
def test_memory_of_a_long_scan(net, tmp_path):
    "A thousand slices of 512 x 512, which are 0.5 GB as int16: the peak stays below 3 GB."
    hu, _, affine = render(draw_patient(1), size=128, slices=20)
    tall = nib.Nifti1Image(np.broadcast_to(hu[:, None, :, None, :, None], (20, 50, 128, 4, 128, 4)).reshape(1000, 512, 512).T,
                           LPS @ (affine @ np.diag([1 / 50, 1 / 4, 1 / 4, 1]))[:, [2, 1, 0, 3]])  # fmt: skip
    nib.save(tall, tmp_path / "ct.nii")
    del tall
    done = subprocess.run([sys.executable, "-c", MEMORY, net, tmp_path / "ct.nii", tmp_path / "out"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.startswith("(1000, 512, 512)"), done.stderr
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) / 2**20
    print(f"{peak:.2f} GiB")
    assert peak < 2.79  # 3 GB
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["organs.nii.gz", "preview.png", "volumes.csv", "volumes.json"]
