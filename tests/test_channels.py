"The slices below and above as channels: the same stack in training, in evaluation and in prediction."

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from rsna_seg.augment import Augment, AugmentConfig
from rsna_seg.ct.cases import find_source
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.ct.scan import window
from rsna_seg.data import PrepareConfig, SliceDataset, make_loader, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.files import ConfigError
from rsna_seg.model import Card, as_input, build_model, load_checkpoint, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.scoring.metrics import dice, mean_organs, slice_confusions
from rsna_seg.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
GENTLE = AugmentConfig(horizontal_flip=0, vertical_flip=0, grid_distortion=0, rotate_limit=10)
SMALL = TrainConfig(size=SIZE, batch_size=8, accumulation=1, epochs=6, lr=3e-3, encoder_weights="none", augment=GENTLE,
                    mixed_precision="no", workers=0, channels="neighbours")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels")
    write_kaggle(folder / "kaggle", patients=5, size=SIZE, slices=12, seed=2)
    prepare(folder / "kaggle", folder / "data", config=PrepareConfig(size=SIZE, jobs=1))
    return folder


@pytest.fixture(scope="module")
def data(world):
    return prepare(world / "kaggle", world / "data", config=PrepareConfig(size=SIZE, jobs=1))


@pytest.fixture(scope="module")
def run(world):
    return train(world / "data", world / "run", SMALL)


def stacks_by_hand(data):
    "Every slice with the next below and above in its series, by the name of its image."
    stacks = {}
    for patient, series in set(zip(data.manifest.patient, data.manifest.series)):
        rows = [row for row in data.manifest.itertuples() if (row.patient, row.series) == (patient, series)]
        rows = sorted(rows, key=lambda row: row.z)
        greys = [cv2.imread(str(data.folder / row.image), cv2.IMREAD_UNCHANGED) for row in rows]
        for i, row in enumerate(rows):
            stacks[row.image] = np.stack([greys[max(i - 1, 0)], greys[i], greys[min(i + 1, len(rows) - 1)]])
    return stacks


def check_stacks(data, split):
    slices, copies, stacks = SliceDataset(data, split, channels="neighbours"), SliceDataset(data, split), stacks_by_hand(data)
    for i, name in enumerate(slices.rows["image"]):
        image, mask = slices[i]
        assert image.dtype == torch.uint8 and image.shape == (3, SIZE, SIZE)
        assert np.array_equal(image, stacks[name])
        assert torch.equal(image[1], copies[i][0]) and torch.equal(mask, copies[i][1])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_channels_are_the_neighbours_own_images(data, split):
    check_stacks(data, split)


def test_copies_are_the_images_as_written(data):
    slices, seed = SliceDataset(data, "train", transform=Augment(), seed=3), 5 * len(SliceDataset(data, "train"))
    for i, row in enumerate(data.part("train").itertuples()):
        grey, classes = (cv2.imread(str(data.folder / name), cv2.IMREAD_UNCHANGED) for name in (row.image, row.mask))
        image, mask = SliceDataset(data, "train")[i]
        assert image.dtype == torch.uint8 and np.array_equal(image, grey) and np.array_equal(mask, classes)
        for one, other in zip(slices[seed + i], Augment()(grey, classes, seed=(3, 5, i))):
            assert np.array_equal(one, other)
    assert torch.equal(as_input(image[None]), (image.float() / 127.5 - 1).expand(1, 3, -1, -1))


def test_a_manifest_with_gaps_in_any_order(data):
    "The next slice that there is counts, and one without a mask as well."
    manifest = data.manifest.drop(index=data.manifest.index[::3]).sample(frac=1, random_state=0)
    manifest.loc[manifest.z % 4 == 1, "split"] = "none"
    check_stacks(replace(data, manifest=manifest), "train")


def test_series_of_one_name_do_not_mix(data):
    "As in PNG pairs whose names tell no series."
    first = data.manifest.groupby("patient").series.transform("first")
    single = data.manifest[data.manifest.series == first]
    check_stacks(replace(data, manifest=single.assign(series="1")), "train")


def test_lone_slices_are_augmented_as_copies(data):
    "Where each slice is a series of its own, all channels are the slice, whatever the transform drew."
    alone = replace(data, manifest=data.manifest.assign(series=data.manifest.image))
    slices, copies = (SliceDataset(alone, "train", transform=Augment(), seed=1, channels=c) for c in ("neighbours", "copies"))
    for key in range(3 * len(slices)):
        (image, mask), (grey, same_mask) = slices[key], copies[key]
        assert torch.equal(image, grey.expand(3, -1, -1)) and torch.equal(mask, same_mask)


def test_each_channel_moves_with_the_mask(data):
    still, moving = (SliceDataset(data, "train", transform=t, seed=1, channels="neighbours") for t in (None, Augment()))
    for i in range(len(still)):
        (stack, mask), (image, moved) = still[i], moving[i]
        for plane, channel in zip(stack.numpy(), image):
            expected, same = Augment()(plane, mask.numpy(), seed=(1, 0, i))
            assert np.array_equal(channel, expected) and np.array_equal(moved, same)


def test_workers_hand_out_the_same_stacks(data):
    slices = SliceDataset(data, "train", transform=Augment(), channels="neighbours")
    for (images, masks), (same, same_masks) in zip(*(make_loader(slices, 16, workers=n, shuffle=True) for n in (0, 2))):
        assert images.is_contiguous() and torch.equal(images, same) and torch.equal(masks, same_masks)


@pytest.mark.parametrize("channels", ["copies", "neighbours"])
def test_prediction_shows_the_network_what_training_did(world, data, channels, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(build_model(encoder_weights="none"), tmp_path / "net.pth", Card(size=SIZE, channels=channels))
    predictor, slices = Predictor(tmp_path / "net.pth", PredictConfig("torch", batch_size=5, crop=False)), SliceDataset(data, "train", channels=channels)
    case = next(c for c in find_source(world / "kaggle").cases if c.series in set(slices.rows.series))
    seen = []
    predictor.engines[0].model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predictor(case.scan)
    rows = slices.rows[slices.rows.series == case.series].sort_values("z")
    assert len(seen) == 3 and list(rows.z) == list(range(12))
    assert torch.equal(torch.cat(seen), as_input(torch.stack([slices[i][0] for i in rows.index])))


@pytest.mark.slow
def test_training_looks_at_the_neighbours(world, tmp_path):
    runs = [train(world / "data", tmp_path / c, replace(SMALL, epochs=1, channels=c)).history for c in ("copies", "neighbours")]
    assert runs[0].train_loss[0] != runs[1].train_loss[0]


@pytest.mark.slow
def test_evaluation_and_prediction_agree(world, data, run):
    result = evaluate(run.checkpoint, world / "data", batch_size=1, workers=0, device="cpu")
    assert (result.matrix.sum(axis=0) > 0).sum() >= 3  # the network finds something
    assert mean_organs(dice(result.matrix)) == pytest.approx(run.best.valid_dice, abs=1e-4)
    predictor, agreed = Predictor(run.checkpoint, PredictConfig("torch", batch_size=1, crop=False)), 0
    for case in find_source(world / "kaggle").cases:
        rows = result.slices[result.slices.series == case.series]
        if len(rows):
            scan = read_scan(case.scan)
            found, truth = (torch.from_numpy(mask[rows.z]) for mask in (predictor(scan).mask, case.mask_on(scan)))
            assert np.array_equal(slice_confusions(found, truth), result.counts[rows.index])
            agreed += len(rows)
    assert agreed == len(result.slices)


@pytest.mark.slow
def test_the_network_looks_at_its_neighbours(world, run):
    "A scan upside down is another picture."
    predictor, case = Predictor(run.checkpoint, PredictConfig("torch", batch_size=1, crop=False)), find_source(world / "kaggle").cases[0]
    scan = read_scan(case.scan)
    turned = predictor(replace(scan, hu=np.ascontiguousarray(scan.hu[::-1]))).mask[::-1]
    assert (turned != predictor(scan).mask).any()


@pytest.mark.slow
def test_examples_show_the_slice_itself(world, run, tmp_path):
    result = evaluate(run.checkpoint, world / "data", workers=0, device="cpu", pictures=tmp_path)
    cases = {case.series: case for case in find_source(world / "kaggle").cases}
    for patient, series in result.slices[["patient", "series"]].drop_duplicates().to_numpy():
        stored, scan = np.load(tmp_path / f"{patient}_{series}.npz"), read_scan(cases[series].scan)
        z = int(stored["z"])
        assert np.array_equal(stored["grey"], window(scan.hu[z]))
        assert np.array_equal(stored["truth"], cases[series].mask_on(scan)[z])
        wrong = result.counts.sum(axis=(1, 2)) - result.counts.trace(axis1=1, axis2=2)
        own = result.slices.series == series
        assert (stored["truth"] != stored["prediction"]).sum() == wrong[own].max()


@pytest.mark.slow
def test_the_card_says_what_the_network_takes(run, tmp_path):
    assert load_checkpoint(run.checkpoint)[1].channels == "neighbours"
    plain = torch.load(run.checkpoint, weights_only=True)
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in build_model(encoder_weights="none").state_dict().items()}
    torch.save(dict(plain), tmp_path / "bare.pth")
    assert load_checkpoint(tmp_path / "bare.pth")[1].channels == "copies"
    card = json.loads(run.checkpoint.with_suffix(".json").read_text())
    del card["channels"]
    (tmp_path / "bare.json").write_text(json.dumps(card))
    assert load_checkpoint(tmp_path / "bare.pth")[1].channels == "copies"
    (tmp_path / "bare.json").write_text(json.dumps({"channels": "neighbours"}))
    assert load_checkpoint(tmp_path / "bare.pth")[1].channels == "neighbours"


def test_other_channels_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="copies or neighbours"):
        SliceDataset(data, "train", channels="neighbors")
    torch.save(build_model(encoder_weights="none").state_dict(), tmp_path / "odd.pth")
    (tmp_path / "odd.json").write_text(json.dumps({"channels": "rgb"}))
    with pytest.raises(ConfigError, match="odd.json holds no card.*'rgb'"):
        load_checkpoint(tmp_path / "odd.pth")[1]
