"What goes wrong on the command line ends in one sentence, exit code 2, and nothing half-written."

import subprocess
import sys

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from command import rsna_seg

from rsna_seg.app.cli import COMMANDS
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle, write_mask, write_series
from rsna_seg.model import Card, build_model, save_checkpoint


def in_a_process(*words):
    "The command in a Python of its own, which takes seconds to start."
    command = [sys.executable, "-m", "rsna_seg.app.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def refused(done, *parts):
    "One sentence with these parts, exit code 2, no traceback."
    sentences = [line for line in done.stderr.splitlines() if line.startswith("rsna_seg ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(sentences) == 1 and all(part in sentences[0] for part in parts), done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A small competition folder, a scan with its mask, and a checkpoint."
    folder = tmp_path_factory.mktemp("world")
    write_kaggle(folder / "kaggle", patients=3, size=64, slices=8)
    hu, mask, affine = render(draw_patient(0), size=64, slices=8)
    write_series(folder / "series", hu, affine)
    write_mask(folder / "ct.nii", hu, affine)
    write_mask(folder / "mask.nii", mask, affine)
    write_mask(folder / "short.nii", mask[:5], affine)
    write_mask(folder / "seven.nii", np.where(mask == 5, 7, mask).astype(np.uint8), affine)
    save_checkpoint(build_model(encoder_weights="none"), folder / "good.pth", Card(size=64))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    done = rsna_seg(command, "--help")
    assert done.returncode == 0 and f"rsna_seg {command}" in done.stdout and "--" in done.stdout


def test_a_process_ends_with_the_same_sentence_and_code(tmp_path):
    refused(in_a_process("prepare", tmp_path / "absent", tmp_path / "data"), "absent")


@pytest.mark.slow
def test_whole_path(world, tmp_path):
    few = ["--size", 64, "--batch-size", 8, "--epochs", 1, "--workers", 1]
    first = tmp_path / "first" / "best_model_512.pth"
    refined = tmp_path / "refined" / "best_mobilenet_rsna_refined.pth"
    steps = [
        ["prepare", world / "kaggle", tmp_path / "data", "--size", 64],
        ["train", tmp_path / "data", tmp_path / "first", "--encoder-weights", "none", *few],
        ["finetune", first, tmp_path / "data", tmp_path / "refined", *few],
        ["evaluate", refined, tmp_path / "data", tmp_path / "report"],
        ["predict", refined, world / "series", tmp_path / "organs"],
    ]
    for step in steps:
        done = rsna_seg(*step)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "organs" / "organs.nii.gz").exists()


def test_sources_that_are_no_data(world, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("no acute findings")
    for source in ("empty", "letters", "absent"):
        path = tmp_path / source
        refused(rsna_seg("prepare", path, tmp_path / "data"), source)
        refused(rsna_seg("predict", world / "good.pth", path, tmp_path / "out"), source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "letters"]


MASKS = {"short.nii": "voxels", "seven.nii": "value 7", "absent.nii": "does not exist"}


@pytest.mark.parametrize("mask, says", MASKS.items())
def test_masks_that_do_not_fit(world, tmp_path, mask, says):
    words = ["--mask", world / mask, "--valid", 0]
    done = rsna_seg("prepare", world / "ct.nii", tmp_path / "data", *words)
    refused(done, mask, says)
    assert not (tmp_path / "data").exists()


def test_one_patient_cannot_be_split(world, tmp_path):
    done = rsna_seg("prepare", world / "ct.nii", tmp_path / "data", "--mask", world / "mask.nii")
    refused(done, "one patient", "--valid 0")
    assert list(tmp_path.iterdir()) == []


class Harmful:
    "A pickle that leaves a mark when it is loaded."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_checkpoints_that_do_not_fit(world, tmp_path):
    other = smp.Unet("resnet18", encoder_weights=None, classes=6)
    torch.save(other.state_dict(), tmp_path / "resnet.pth")
    torch.save({"model": Harmful(tmp_path / "mark")}, tmp_path / "harmful.pth")
    (tmp_path / "cut.pth").write_bytes((world / "good.pth").read_bytes()[:100_000])
    trap = Card(size=64, encoder="tu-mobilenetv3_large_100")
    save_checkpoint(build_model(encoder_weights="none"), tmp_path / "trap.pth", trap)
    cases = {
        "resnet": "missing",
        "harmful": "could run code",
        "cut": "cut",
        "trap": "other padding",
        "absent": "does not exist",
    }
    for name, says in cases.items():
        checkpoint = tmp_path / f"{name}.pth"
        refused(rsna_seg("predict", checkpoint, world / "series", tmp_path / "out"), says)
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


def test_training_without_imagenet_weights_names_the_ways_out(world, tmp_path):
    assert rsna_seg("prepare", world / "kaggle", tmp_path / "data", "--size", 64).returncode == 0
    done = rsna_seg("train", tmp_path / "data", tmp_path / "run")
    refused(done, "--encoder-weights none", "--encoder-weights FILE")
    assert not (tmp_path / "run").exists()


def test_opencv_needs_no_display_library():
    import cv2

    build = [line.strip() for line in cv2.getBuildInformation().splitlines()]
    gui = next(line for line in build if line.startswith("GUI"))
    assert "NONE" in gui, "opencv-python has replaced opencv-python-headless"


def test_settings_that_cannot_be(world, tmp_path):
    cases = {
        "size 100 is not a multiple of 32": ["train", tmp_path, tmp_path / "run", "--size", 100],
        "valid is at least 0 and below 1": [
            "prepare", world / "kaggle", tmp_path / "data", "--valid", 1
        ],
    }  # fmt: skip
    for says, words in cases.items():
        refused(rsna_seg(*words), says, f"See rsna_seg {words[0]} --help.")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_slice_is_named(world, tmp_path):
    "Also when a loader process meets it, and a missing one before the first epoch."
    few = ["--size", 64, "--batch-size", 4, "--epochs", 1, "--encoder-weights", "none"]
    assert rsna_seg("prepare", world / "kaggle", tmp_path / "data", "--size", 64).returncode == 0
    image = sorted((tmp_path / "data" / "images").iterdir())[3]
    image.write_bytes(image.read_bytes()[:50])
    train = ["train", tmp_path / "data", tmp_path / "run", *few]
    refused(rsna_seg(*train), image.name, "cannot be read")
    image.unlink()
    refused(rsna_seg(*train), image.name, "missing")
