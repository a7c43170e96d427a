"The path on real CT: geometry, Hounsfield units, labels and sides, end to end."

import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform

from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.nifti import read_mask
from rsna_seg.ct.scan import to_square, window
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.files import ScanError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import as_input, load_checkpoint
from rsna_seg.predict import Predictor, save_segmentation
from rsna_seg.scoring.metrics import volume_dice
from rsna_seg.train import TrainConfig, train

SIZE, EPOCHS = 160, 34  # of the overfit
LOSSLESS = ["1.2.1.99", "1.2.1", "1.2.2", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90", "1.2.5", "1.2"]


def syntax_file(real_ct, uid):
    return next((real_ct / "dicom_syntaxes").glob(f"1.2.840.10008.{uid}_*.dcm"))


@pytest.mark.parametrize("uid", LOSSLESS)
def test_lossless_syntaxes_decode_to_the_same_hu(real_ct, uid):
    # The stored values of the little-endian file, read here byte by byte, are the reference.
    import pydicom

    plain = pydicom.dcmread(syntax_file(real_ct, "1.2.1"))
    kind = "<i2" if plain.PixelRepresentation else "<u2"
    stored = np.frombuffer(plain.PixelData, kind).reshape(plain.Rows, plain.Columns).astype(int)
    expected = stored * int(plain.RescaleSlope) + int(plain.RescaleIntercept)
    scan = read_scan(syntax_file(real_ct, uid))
    assert scan.hu.dtype == np.int16
    np.testing.assert_array_equal(scan.hu[0], expected)


@pytest.mark.parametrize("uid", ["1.2.4.53", "1.2.4.55"])
def test_retired_syntaxes_are_named(real_ct, uid):
    path = syntax_file(real_ct, uid)
    with pytest.raises(ScanError, match="transfer syntax") as error:
        read_scan(path)
    assert path.name in str(error.value)


def test_series_of_three_slices(real_ct):
    import pydicom

    folder = real_ct / "ct3slice" / "series"
    scan = read_scan(folder)
    slices = sorted((pydicom.dcmread(p) for p in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    assert scan.hu.shape == (3, 512, 512)
    assert scan.spacing == pytest.approx((1.0, 0.810547, 0.810547), abs=1e-4)
    assert scan.hu.min() == -3024
    for hu, dataset, z in zip(scan.hu, slices, range(3)):
        stored = np.frombuffer(dataset.PixelData, "<i2").reshape(512, 512).astype(int)
        np.testing.assert_array_equal(hu, stored * int(dataset.RescaleSlope) + int(dataset.RescaleIntercept))
        np.testing.assert_allclose((scan.affine @ (z, 0, 0, 1))[:3], dataset.ImagePositionPatient, atol=1e-3)


def test_thirteen_signed_bits(real_ct):
    scan = read_scan(next((real_ct / "dicom_signed").glob("*.dcm")))
    air, body = np.percentile(scan.hu[scan.hu > -1500], (2, 60))
    assert scan.hu.min() >= -2048 and scan.hu.max() < 4096
    assert air < -900 and -150 < body < 200


@pytest.fixture(scope="module")
def overfit(real_ct, tmp_path_factory):
    "A checkpoint trained, then fine-tuned, on the slices of one torso; its folder."
    folder, source = tmp_path_factory.mktemp("overfit"), real_ct / "totalseg_example"
    prepare(source / "ct.nii.gz", folder / "data", source / "segmentation.nii.gz", PrepareConfig(size=SIZE, valid=0))
    still = AugmentConfig(horizontal_flip=0, vertical_flip=0, rotate=0, grid_distortion=0, coarse_dropout=0)
    shared = dict(size=SIZE, batch_size=8, accumulation=1, validate_on="train", augment=still, workers=0)
    first = train(folder / "data", folder / "first", TrainConfig(**shared, epochs=EPOCHS, lr=2e-3, encoder_weights="none"))
    finetune(first.checkpoint, folder / "data", folder / "refined", FinetuneConfig(**shared, epochs=2, lr=2e-4))
    return folder / "refined"


@pytest.mark.slow
def test_overfit_one_torso(real_ct, overfit, tmp_path):
    "Dice of at least 0.90 for each organ, measured on the mask that was written and read again."
    source = real_ct / "totalseg_example"
    scan = read_scan(source / "ct.nii.gz")
    truth = read_mask(source / "segmentation.nii.gz", scan)
    result = Predictor(overfit / "best_mobilenet_rsna_refined.pth")(source / "ct.nii.gz")
    path = save_segmentation(result, tmp_path, ("nifti",)) / "organs.nii.gz"
    written, original = nib.load(path), nib.load(source / "ct.nii.gz")
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.shape == original.shape
    scores = volume_dice(read_mask(path, scan), truth)
    print(scores)
    assert min(scores.values()) >= 0.90, scores


@pytest.mark.slow
def test_orientation_of_the_file_does_not_matter(real_ct, overfit, tmp_path):
    "Stored as LPS, LAS, RAS or LAI, the scan gets the same mask at the same places in the patient."
    image = nib.load(real_ct / "totalseg_example" / "ct.nii.gz")
    predictor, masks = Predictor(overfit / "best_mobilenet_rsna_refined.pth"), {}
    for axes in ("RAS", "LPS", "LAS", "LAI"):
        turned = image.as_reoriented(ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(axes)))
        nib.save(turned, tmp_path / f"{axes}.nii.gz")
        path = save_segmentation(predictor(tmp_path / f"{axes}.nii.gz"), tmp_path / axes, ("nifti",)) / "organs.nii.gz"
        mask = nib.load(path)
        assert "".join(nib.aff2axcodes(mask.affine)) == axes
        np.testing.assert_array_equal(mask.affine, turned.affine)
        masks[axes] = nib.as_closest_canonical(mask)
    for mask in masks.values():
        np.testing.assert_allclose(mask.affine, masks["RAS"].affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(masks["RAS"].dataobj))


@pytest.mark.slow
def test_the_snippet_everybody_uses(real_ct, overfit, monkeypatch):
    "The checkpoint in plain segmentation-models-pytorch gives the classes that the predictor gives."
    scan = read_scan(real_ct / "totalseg_example" / "ct.nii.gz")
    planes = np.stack([to_square(grey, SIZE) for grey in window(scan.hu[60:100:8])])
    x = as_input(torch.from_numpy(planes))
    monkeypatch.chdir(overfit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import segmentation_models_pytorch as smp

        model = smp.Unet(encoder_name="timm-mobilenetv3_large_100", encoder_weights=None, in_channels=3, classes=6)
    model.load_state_dict(torch.load("best_mobilenet_rsna_refined.pth"))
    model.eval()
    with torch.no_grad():
        classes = model(x).argmax(dim=1)
        ours = load_checkpoint("best_mobilenet_rsna_refined.pth")[0](x).argmax(dim=1)
    assert classes.unique().numel() > 3
    agree = (classes == ours).float().mean().item()
    assert agree == 1.0
