"Data that labels only some organs: what it leaves out is neither learnt, nor unlearnt, nor judged."

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from sklearn.metrics import roc_auc_score

from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.organs import ALL_ORGANS, CLASSES, only
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, SliceDataset, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.files import DataError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import SegLoss, as_input, load_checkpoint, marginal_logits
from rsna_seg.predict import PredictConfig, Predictor, save_segmentation
from rsna_seg.report.evaluation import write_evaluation
from rsna_seg.scoring.judge import states
from rsna_seg.scoring.metrics import dice, merge_unlabelled, pixel_accuracy
from rsna_seg.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
OUTLINED = ("liver", "left_kidney", "right_kidney")
STILL = AugmentConfig(horizontal_flip=0, vertical_flip=0, rotate=0, grid_distortion=0, coarse_dropout=0)
SHARED = dict(size=SIZE, batch_size=8, accumulation=1, augment=STILL, mixed_precision="no", workers=0)


def loss_and_gradient(loss, logits, masks):
    logits = logits.clone().requires_grad_()
    value = loss(logits, masks)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 256, 256)])
@pytest.mark.parametrize("labelled", [ALL_ORGANS, OUTLINED])
def test_the_loss_is_smps(shape, labelled):
    "Its value and gradients, as smp computes them in double precision: in single its own sums over a picture err by more."
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 6, *shape[1:]) * 4, torch.from_numpy(only(labelled))[torch.randint(0, 6, shape)]
    ours = loss_and_gradient(SegLoss(0.3, 0.7, list(labelled)), logits, masks)
    dice_loss, focal_loss = smp.losses.DiceLoss("multiclass"), smp.losses.FocalLoss("multiclass")
    kept = [c.id for c in CLASSES if c.key in ("background", *labelled)]
    number = torch.tensor([kept.index(i) if i in kept else 0 for i in range(len(CLASSES))])

    def plain(x, y):
        x, y = marginal_logits(x, labelled)[:, kept], number[y.long()]
        return 0.3 * dice_loss(x, y) + 0.7 * focal_loss(x, y)

    value, gradient = loss_and_gradient(plain, logits.double(), masks)
    assert ours[0].item() == pytest.approx(value.item(), rel=1e-6)
    assert (ours[1] - gradient).norm() < 1e-6 * gradient.norm()


def test_two_pixels_by_hand():
    "Only the liver is labelled: a pixel of it, and a pixel of background or anything else."
    belief = torch.tensor([[0.1, 0.6, 0.1, 0.05, 0.05, 0.1], [0.2, 0.1, 0.5, 0.05, 0.05, 0.1]])  # background 0.4 and 0.9 in sum
    logits, masks = belief.log().T.reshape(1, 6, 1, 2), torch.tensor([[[1, 0]]])
    background, liver = 2 * 0.9 / (0.4 + 0.9 + 1), 2 * 0.6 / (0.6 + 0.1 + 1)
    dice_loss = (1 - background + 1 - liver) / 2
    right = [[1 / 1.4, 0.9 / 1.9], [0.6 / 1.6, 1 / 1.1]]  # sigmoid(log p) = p / (1 + p); classes, then pixels
    focal_loss = np.mean([(1 - p) ** 2 * -math.log(p) for p in sum(right, [])])
    assert SegLoss(1, 0, ["liver"])(logits, masks).item() == pytest.approx(dice_loss, abs=1e-5)
    assert SegLoss(0, 1, ["liver"])(logits, masks).item() == pytest.approx(focal_loss, abs=1e-5)
    assert SegLoss(1, 2, ["liver"])(logits, masks).item() == pytest.approx(dice_loss + 2 * focal_loss, abs=1e-5)


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    logits, masks = (torch.randn(2, 6, 8, 8) * 20).bfloat16(), torch.randint(0, 2, (2, 8, 8))
    value = SegLoss(labelled=["liver"])(logits, masks)
    assert value.dtype == torch.float32 and value.isfinite()


def test_nothing_is_said_about_unlabelled_organs():
    "On a pixel with mask 0 their logits are raised with the background's; how the three divide it does not matter."
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 6, 8, 8) * 3, torch.zeros(2, 8, 8, dtype=torch.long)
    loss = SegLoss(labelled=list(OUTLINED))
    value, gradient = loss_and_gradient(loss, logits, masks)
    merged, plain = [0, 2, 5], loss_and_gradient(SegLoss(), logits, masks)[1]
    assert (gradient[:, merged] <= 0).all() and (plain[:, [2, 5]] > 0).all()
    shares = logits[:, merged].softmax(1)
    torch.testing.assert_close(gradient[:, merged], gradient[:, merged].sum(1, keepdim=True) * shares, rtol=1e-4, atol=1e-8)
    swapped = logits[:, [5, 1, 0, 3, 4, 2]]
    torch.testing.assert_close(loss(swapped, masks), value)


def test_confusions_count_unlabelled_predictions_as_background():
    matrix = np.zeros((6, 6), int)
    matrix[0], matrix[1] = [90, 1, 5, 0, 0, 4], [2, 6, 1, 0, 0, 1]
    merged = merge_unlabelled(matrix, OUTLINED)
    assert merged[0].tolist() == [99, 1, 0, 0, 0, 0] and merged[1].tolist() == [4, 6, 0, 0, 0, 0]
    assert pixel_accuracy(merged) == 105 / 110 and dice(merged)[1] == 12 / 17
    matrix[5, 5] = 1
    with pytest.raises(ValueError, match="none of the labelled"):
        merge_unlabelled(matrix, OUTLINED)


@pytest.fixture(scope="module")
def world(real_ct, tmp_path_factory):
    "Real slices with three organs outlined: declared so, and with all else called background. A network that knows all five."
    folder, torso = tmp_path_factory.mktemp("partial"), real_ct / "totalseg_example"
    for kind in ("images", "masks"):
        (folder / "slices" / kind).mkdir(parents=True)
        for path in sorted((real_ct / "curvas_png" / kind).iterdir())[::5]:
            (folder / "slices" / kind / path.name).symlink_to(path)
    settings = PrepareConfig(size=SIZE, valid=0.3, jobs=1)
    prepare(folder / "slices", folder / "three", config=replace(settings, labelled=OUTLINED))
    prepare(folder / "slices", folder / "five", config=settings)
    prepare(torso / "ct.nii.gz", folder / "torso", torso / "segmentation.nii.gz", replace(settings, valid=0))
    first = TrainConfig(**SHARED, epochs=6, lr=3e-3, encoder_weights="none", validate_on="train")
    train(folder / "torso", folder / "first", first)
    return folder


def share_of_bowel(checkpoint, data):
    "The share of the body, in the slices of both splits, that the network takes for bowel."
    model, _ = load_checkpoint(checkpoint)
    images = torch.stack([s[i][0] for s in (SliceDataset(data, "train"), SliceDataset(data, "valid")) for i in range(len(s))])
    with torch.inference_mode():
        found = model(as_input(images)).argmax(1)
    return ((found == 5) & (images > 0)).sum().item() / (images > 0).sum().item()


@pytest.mark.slow
def test_finetuning_on_three_organs_keeps_the_bowel(world):
    "From one network that finds bowel in these slices: called background, it is unlearnt; left out, it stays."
    start, share, bowel = world / "first" / "best_model_512.pth", {}, {}
    settings = FinetuneConfig(**SHARED, epochs=8, lr=1e-3)
    data = prepare(world / "slices", world / "three", config=PrepareConfig(size=SIZE, valid=0.3, jobs=1, labelled=OUTLINED))
    share["start"] = share_of_bowel(start, data)
    for name in ("three", "five"):
        run = finetune(start, world / name, world / f"run {name}", settings)
        assert load_checkpoint(run.checkpoint)[1].labelled == list(ALL_ORGANS)
        share[name] = share_of_bowel(run.checkpoint, data)
        bowel[name] = evaluate(run.checkpoint, world / "torso", "train", workers=0).table.Dice["Bowel"]
        assert run.history.valid_dice_bowel.isna().all() and run.best.valid_dice > 0.1
    judged = evaluate(world / "run three" / "best_mobilenet_rsna_refined.pth", world / "three", workers=0)
    best = pd.read_csv(world / "run three" / "history.csv").valid_dice.max()
    assert judged.table.Dice["Mean of organs"] == pytest.approx(best, abs=1e-6)  # in training as afterwards
    assert share["three"] > share["start"] / 10
    assert share["three"] > 3 * share["five"]
    assert bowel["three"] > 1.5 * bowel["five"]


@pytest.mark.slow
def test_evaluation_judges_three_organs(world, tmp_path):
    result = evaluate(world / "first" / "best_model_512.pth", world / "three", workers=0)
    counted = states(result)
    assert list(counted.index[counted["not labelled"] > 0]) == ["spleen", "bowel"]
    table = result.table
    assert table.loc[["Spleen", "Bowel"]].isna().all(axis=None)
    for score in ("Dice", "IoU", "AUC-ROC"):
        assert table[score]["Mean of organs"] == pytest.approx(table[score][["Liver", "Left kidney", "Right kidney"]].mean())
    data = SliceDataset(open_data(world / "three"), "valid")
    images, masks = (torch.stack(planes) for planes in zip(*(data[i] for i in range(len(data)))))
    with torch.inference_mode():
        beliefs = load_checkpoint(world / "first" / "best_model_512.pth")[0](as_input(images)).softmax(1)
    background = roc_auc_score((masks == 0).flatten(), beliefs[:, [0, 2, 5]].sum(1).flatten())
    assert table["AUC-ROC"]["Background"] == pytest.approx(background, abs=1e-4)
    assert result.matrix[:, [2, 5]].sum() == 0 and result.matrix.sum() == len(result.slices) * SIZE**2
    page = write_evaluation(result, tmp_path).read_text()
    assert "Not labelled in this data, and so not judged: spleen and bowel." in page
    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert scores["labelled"] == list(OUTLINED) and scores["mean_over_patients"]["dice"]["bowel"]["mean"] is None


@pytest.mark.slow
def test_a_network_that_was_taught_three_organs(real_ct, world, tmp_path):
    "It gives out no other, and says so; where others are labelled, it has missed them."
    settings = TrainConfig(**SHARED, epochs=2, lr=3e-3, encoder_weights="none", fold=0)
    run = train(world / "three", tmp_path / "run", settings)
    assert load_checkpoint(run.checkpoint)[1].labelled == list(OUTLINED)
    judged = evaluate(run.checkpoint, world / "three", workers=0, fold=0)
    manifest = open_data(world / "three").manifest
    assert set(judged.volumes.patient) == set(manifest.patient[manifest.fold == 0]) and judged.about["part"] == "fold 0"
    everything = evaluate(run.checkpoint, world / "torso", "train", workers=0).table.Dice
    assert everything["Spleen"] == everything["Bowel"] == 0
    segmented = Predictor(run.checkpoint, PredictConfig("torch"))(read_scan(real_ct / "totalseg_example" / "ct.nii.gz"))
    assert not np.isin(segmented.mask, (2, 5)).any()
    assert segmented.organs.ml.isna().to_dict() == {key: key not in OUTLINED for key in ALL_ORGANS}
    save_segmentation(segmented, tmp_path / "organs")
    volumes = json.loads((tmp_path / "organs" / "volumes.json").read_text())
    assert "never taught them: spleen, bowel" in volumes["notes"][-1] and volumes["organs"]["bowel"]["ml"] is None


@pytest.mark.slow
def test_nothing_to_choose_an_epoch_by(world, tmp_path):
    "Masks whose only labelled organ is in no slice end in a sentence before the first epoch."
    data = prepare(world / "slices", tmp_path / "bowel", config=PrepareConfig(size=SIZE, valid=0.3, jobs=1, labelled=("bowel",)))
    assert data.info["labelled"] == ["bowel"]
    with pytest.raises(DataError, match="shows no labelled organ in its valid slices"):
        train(tmp_path / "bowel", tmp_path / "run", TrainConfig(**SHARED, encoder_weights="none"))
    assert not (tmp_path / "run").exists()
