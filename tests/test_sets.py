"Several sets in one training: what a slice does not show is unknown there, and nobody is on two sides."

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from command import rsna_seg
from test_resume import THIN, Tiny

from rsna_seg.ct.organs import ALL_ORGANS, CLASSES, ORGAN, ORGANS, in_words
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.ct.png import Window, picture_key
from rsna_seg.ct.sets import common_window, open_sets, window_table
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, SliceDataset, StepSampler, make_loader, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.files import ConfigError, DataError
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import SegLoss, load_checkpoint, marginal_logits
from rsna_seg.report.evaluation import write_evaluation
from rsna_seg.scoring.metrics import Confusion
from rsna_seg.train import TrainConfig, plan_run, train
from rsna_seg.training.loop import Tally

pytestmark = pytest.mark.usefixtures("one_thread")

ORGAN_SETS = [("liver",), ("left_kidney", "right_kidney"), ALL_ORGANS, ()]


def known_of(*sets):
    return torch.tensor([[c.key in ("background", *keys) for c in CLASSES] for keys in sets])


def mixed_batch(sets=ORGAN_SETS, size=12):
    "Logits, and masks that show what each slice knows."
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(sets), 6, size, size, generator=generator) * 3
    masks = torch.randint(0, 6, (len(sets), size, size), generator=generator)
    known = known_of(*sets)
    return logits, masks * known.gather(1, masks.flatten(1)).view_as(masks), known


def value_and_gradient(loss, logits, *rest):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *rest)
    value.backward()
    return value.detach(), logits.grad


# The loss

@pytest.mark.parametrize("over", ["batch", "image"])
@pytest.mark.parametrize("labelled", [ALL_ORGANS, ["liver", "left_kidney", "right_kidney"], ["bowel"]])
def test_slices_that_know_the_same_have_the_loss_of_one_set(labelled, over):
    logits, masks, known = mixed_batch([labelled] * 3)
    one_set = value_and_gradient(SegLoss(0.4, 0.6, labelled, over), logits, masks)
    by_slice = value_and_gradient(SegLoss(0.4, 0.6, ALL_ORGANS, over), logits, masks, known)
    torch.testing.assert_close(by_slice[0], one_set[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(by_slice[1], one_set[1], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(marginal_logits(logits, known), marginal_logits(logits, labelled))


@pytest.mark.parametrize("loss", [SegLoss(0, 1), SegLoss(1, 0, dice_over="image")])
def test_what_is_a_mean_over_slices_is_that_of_each_slice_alone(loss):
    "So batches add up, whatever set their slices are from."
    logits, masks, known = mixed_batch()
    alone = [SegLoss(loss.dice, loss.focal, list(keys))(logits[i : i + 1], masks[i : i + 1]) for i, keys in enumerate(ORGAN_SETS)]
    torch.testing.assert_close(loss(logits, masks, known), torch.stack(alone).mean())


def test_dice_over_a_mixed_batch_by_hand():
    "Areas are added up over the slices that know a class; what no slice knows is in no mean."
    sets = [("liver",), ("liver", "bowel"), ("bowel",)]
    logits, masks, known = mixed_batch(sets)
    shares, scores = marginal_logits(logits, known).softmax(1), []
    for c in (0, ORGAN["liver"].id, ORGAN["bowel"].id):
        knowing = known[:, c]
        truth, found = (masks[knowing] == c).float(), shares[knowing][:, c]
        scores.append(2 * (truth * found).sum() / (truth.sum() + found.sum()))
    torch.testing.assert_close(SegLoss(1, 0)(logits, masks, known), 1 - torch.stack(scores).mean())


@pytest.mark.parametrize("over", ["batch", "image"])
def test_the_loss_does_not_see_how_background_and_unknown_organs_share(over):
    "Exchanging their logits in a slice changes nothing; along that direction the gradient is zero."
    logits, masks, known = mixed_batch()
    loss, spleen = SegLoss(dice_over=over), ORGAN["spleen"].id
    value, gradient = value_and_gradient(loss, logits, masks, known)
    swapped = logits.clone()
    swapped[0, [0, spleen]] = logits[0, [spleen, 0]]  # the first slice knows the liver alone
    torch.testing.assert_close(loss(swapped, masks, known), value)
    swapped[2, [0, spleen]] = logits[2, [spleen, 0]]  # the third knows all
    assert abs(loss(swapped, masks, known) - value) > 1e-3
    shares = logits[0, [0, spleen]].softmax(0)  # moves that keep the sum of both probabilities
    along = gradient[0, 0] * shares[1] - gradient[0, spleen] * shares[0]
    assert along.abs().max() < 1e-7 < gradient[0].abs().max()


def test_an_organ_that_no_slice_knows_has_no_term():
    "Nor does one that only other slices know: its logits get what its share of the background gets."
    sets = [("liver",), ("liver", "spleen")]
    logits, masks, known = mixed_batch(sets)
    louder = logits.clone()
    kidney = ORGAN["left_kidney"].id
    louder[:, kidney] += 2
    louder[:, 0] = (logits[:, [0, kidney]].logsumexp(1).exp() - louder[:, kidney].exp()).clamp_min(1e-30).log()
    fits = (logits[:, [0, kidney]].logsumexp(1).exp() > louder[:, kidney].exp()).all(0, keepdim=True).expand(2, -1, -1)
    louder = torch.where(fits.unsqueeze(1), louder, logits)
    assert fits.any()
    torch.testing.assert_close(SegLoss()(louder, masks, known), SegLoss()(logits, masks, known))
    _, gradient = value_and_gradient(SegLoss(1, 0), logits, masks, known_of((), ()))
    assert gradient.abs().max() < 1e-6  # all is background: its Dice is 1 whatever is said


# The order

def test_one_set_is_drawn_as_ever():
    sampler = StepSampler(23, 4, 2, shuffle=True, seed=5)
    sampler.epoch = 3
    assert sampler.order().tolist() == np.random.default_rng([5, 3]).permutation(23).tolist()


def test_weights_by_size_are_one_folder():
    sets = np.repeat([0, 1, 2], [3, 11, 9])
    orders = [StepSampler(23, shuffle=True, sets=s, weights=w).order().tolist() for s, w in ((None, ()), (sets, (3, 11, 9)))]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("weights", [(), (1, 1, 2), (5, 0.01, 1)])
def test_an_epoch_is_as_long_as_there_are_slices(weights):
    "Processes share it, a slice that comes again has a number of its own, and the draw hangs on seed and epoch alone."
    sets = np.repeat([0, 1, 2], [40, 2, 9])
    order = dict(batch_size=4, accumulation=3, shuffle=True, seed=1, sets=sets, weights=weights)
    alone, again = StepSampler(51, **order), StepSampler(51, **order)
    for epoch in (2, 0, 1):
        alone.epoch = again.epoch = epoch
        keys = sum(alone, [])
        assert len(keys) == len(set(keys)) == 51 and keys == sum(again, [])
        both = [StepSampler(51, process=p, processes=2, **order) for p in range(2)]
        for sampler in both:
            sampler.epoch = epoch
        shared = [key for sampler in both for step in sampler.steps() for batch, share in step if share for key in batch]
        assert sorted(shared) == sorted(keys)
        counts = np.bincount(sets[np.array(keys) % 51])
        wanted = np.sqrt([40, 2, 9]) if not weights else np.array(weights)
        assert counts.sum() == 51 and np.abs(counts - 51 * wanted / wanted.sum()).max() <= 1


def test_which_organs_a_batch_shows():
    classes = known_of(("liver",), ("bowel",)).numpy()
    sampler = StepSampler(5, 5, shuffle=True, sets=[0, 0, 0, 0, 1], weights=(1, 4), classes=classes)
    [[(keys, _)]] = sampler.steps()
    assert torch.equal(sampler.known(keys), torch.from_numpy(classes[[int(key % 5 == 4) for key in keys]]))
    assert StepSampler(5).known([1, 2]) is None


def test_what_is_found_of_an_organ_that_the_slice_does_not_know_is_background():
    found, truth, counts = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[0, 2], [1, 0]]), Confusion()
    counts.update(found, truth, known_of(("spleen",), ("liver",)))
    assert counts.matrix()[:3, :3].tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 1]]


# The folders

MADE = {  # seed, first patient, organs, window, split
    "liver": (1, 10, ("liver",), (50, 400), 1), "kidneys": (1, 20, ("left_kidney", "right_kidney"), (50, 400), 0),
    "narrow": (2, 30, ("liver", "bowel"), (127.5, 255), 0), "plain": (3, 40, ALL_ORGANS, (50, 400), 0),
    "more": (4, 50, ALL_ORGANS, (50, 400), 0),
}  # fmt: skip
SMALL = TrainConfig(size=64, batch_size=4, accumulation=2, epochs=2, encoder_weights="none", workers=0, save_minutes=0, mixed_precision="no")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Sets of three patients each; the kidneys' are the liver's, under other names."
    folder = tmp_path_factory.mktemp("sets")
    for name, (seed, first_id, labelled, (level, width), split) in MADE.items():
        write_kaggle(folder / "ct" / name, patients=3, seed=seed, size=64, slices=8, first_id=first_id)
        how = PrepareConfig(size=64, labelled=labelled, level=level, width=width, seed=split, folds=3, jobs=1)
        prepare(folder / "ct" / name, folder / name, config=how)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(smp, "Unet", Tiny)


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.setattr(smp, "Unet", THIN)


def paths(folder, *names):
    return [folder / name for name in names]


def same_weights(*runs):
    states = [torch.load(run.folder / "last" / "state.pt", weights_only=True) for run in runs]
    return all(torch.equal(value, other["model"][key]) for other in states for key, value in states[0]["model"].items())


def test_a_person_is_on_the_side_that_the_first_set_has(folder):
    sides = {}
    for order in (("liver", "kidneys"), ("kidneys", "liver")):
        data, first = open_sets(paths(folder, *order)), open_data(folder / order[0])
        assert (data.manifest.groupby("patient").split.nunique() == 1).all()
        assert set(data.manifest.patient) == set(first.manifest.patient) and data.manifest.series.nunique() == len(data.manifest.groupby(["set", "series"]))
        sides[order] = data.part("valid").patient.unique().tolist()
        assert sides[order] == first.part("valid").patient.unique().tolist()
        assert any("2 patients change sides" in note for note in data.info["joined"])
        moved = data.info["sets"][1]["moved"]
        own = open_data(folder / order[1]).manifest.set_index("patient").split
        assert sorted(moved.values()) == ["train", "valid"] and all(own[name].iloc[0] != side for name, side in moved.items())
    fold = open_sets(paths(folder, "liver", "kidneys"), fold=2).manifest
    assert (fold.groupby("patient").split.nunique() == 1).all() and (fold.split == "valid").any()


def test_the_keys_of_pictures_of_an_older_folder_are_computed(folder, tmp_path):
    for name in ("liver", "kidneys"):
        shutil.copytree(folder / name, tmp_path / name)
        table = pd.read_csv(tmp_path / name / "manifest.csv", dtype=str)
        table.drop(columns="picture").to_csv(tmp_path / name / "manifest.csv", index=False)
    assert open_sets(paths(tmp_path, "liver", "kidneys")).info["persons"] == {"20": "10", "21": "11", "22": "12"}
    assert picture_key(np.zeros((8, 8), np.uint8)) is None


def test_the_same_name_is_the_same_person(folder, tmp_path):
    shutil.copytree(folder / "plain", tmp_path / "plain")
    table = pd.read_csv(tmp_path / "plain" / "manifest.csv", dtype=str)
    names = dict(zip(table.patient.unique(), open_data(folder / "more").manifest.patient.unique()))
    table.assign(patient=table.patient.map(names)).to_csv(tmp_path / "plain" / "manifest.csv", index=False)
    data = open_sets([folder / "more", tmp_path / "plain"])
    assert data.manifest.patient.nunique() == 3 and (data.manifest.groupby("patient").split.nunique() == 1).all()


def test_pictures_are_brought_to_one_window(folder):
    data = open_sets(paths(folder, "liver", "narrow"))
    slices, alone = SliceDataset(data, "train"), SliceDataset(open_data(folder / "narrow"), "train")
    assert data.window == (50, 400, "known", "") and slices.tables[0].tolist() == list(range(256))
    table = window_table(Window(127.5, 255), Window(50, 400))
    first = int((slices.sets == 0).sum())
    for i in range(len(alone)):
        assert torch.equal(slices[first + i][0], torch.from_numpy(table[alone[i][0].numpy()]))
        assert torch.equal(slices[first + i][1], alone[i][1])
    assumed = Window(127.5, 255, "assumed")
    assert common_window([assumed, Window(40, 350, "estimated")])[:3] == (40, 350, "estimated")
    assert common_window([assumed, assumed])[:3] == assumed[:3]


def test_folders_that_do_not_fit(folder):
    with pytest.raises(DataError, match="given twice"):
        open_sets(paths(folder, "liver", "liver"))
    with pytest.raises(DataError, match="has no fold 7"):
        open_sets(paths(folder, "liver", "plain"), fold=7)
    for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ConfigError, match="--weights needs 2 numbers above 0, one a set"):
            train(paths(folder, "liver", "plain"), folder / "never", replace(SMALL, weights=weights))
    assert not (folder / "never").exists()
    done = rsna_seg("train", folder / "liver")
    assert done.returncode == 2 and "one folder or several" in done.stderr and "Traceback" not in done.stderr


# Training

def test_several_folders_are_one_folder_with_all_slices(folder, tmp_path, tiny):
    "With the numbers of slices as weights: the same losses and weights."
    both, whole = paths(folder, "plain", "more"), tmp_path / "whole"
    tables = [pd.read_csv(path / "manifest.csv", dtype=str) for path in both]
    shutil.copytree(both[0], whole)
    shutil.copytree(both[1], whole, dirs_exist_ok=True)
    pd.concat(tables).to_csv(whole / "manifest.csv", index=False)
    weights = tuple(float((table.split == "train").sum()) for table in tables)
    several = train(both, tmp_path / "several", replace(SMALL, weights=weights))
    one = train(whole, tmp_path / "one", SMALL)
    losses = ["train_loss", "valid_loss", "train_dice", "valid_dice"]
    assert several.history[losses].equals(one.history[losses]) and same_weights(several, one)


def test_a_run_of_several_sets_resumes_bit_for_bit(folder, tmp_path, tiny, monkeypatch):
    "Whatever the number of workers; what each epoch has seen stands in its row."
    data, real = paths(folder, "liver", "kidneys", "narrow"), Tally.add

    def run(name, workers=0, stop=0):
        made = []

        def add(tally, *step):
            made.append(real(tally, *step))
            if len(made) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Tally, "add", add)
        return train(data, tmp_path / name, replace(SMALL, workers=workers))

    whole, parallel = run("whole"), run("parallel", workers=2)
    for stop in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(f"stopped{stop}", stop=stop)
    assert same_weights(whole, parallel, run("stopped1"), run("stopped4"))
    history, slices = pd.read_csv(whole.folder / "history.csv"), SliceDataset(open_sets(data), "train", 64)
    seen = history[[f"slices_of_{path.name}" for path in data]]
    assert (seen.sum(axis=1) == len(slices)).all() and (seen > 0).all(axis=None)
    assert (history[["pixels_of_liver", "pixels_of_bowel", "pixels_of_left_kidney"]] > 0).all(axis=None)
    assert (history.pixels_of_spleen == 0).all() and history.valid_dice_spleen.isna().all()
    assert "slices of narrow" in (whole.folder / "train.log").read_text()
    card = load_checkpoint(whole.checkpoint)[1]
    assert {each["name"]: tuple(each["labelled"]) for each in card.sets} == {path.name: MADE[path.name][2] for path in data}
    assert card.labelled == ["liver", "left_kidney", "right_kidney", "bowel"] and (card.level, card.width) == (50, 400)


def test_pixels_that_are_seen_are_those_of_the_masks(folder, tmp_path, tiny):
    still = {name: 0 for name in ("horizontal_flip", "vertical_flip", "rotate", "grid_distortion", "coarse_dropout")}
    config = replace(SMALL, epochs=1, augment=replace(SMALL.augment, **still))
    row = train(paths(folder, "liver", "narrow"), tmp_path / "run", config).history.iloc[0]
    data = open_sets(paths(folder, "liver", "narrow"))
    slices = SliceDataset(data, "train", 64)
    keys = sum(make_loader(slices, 4, 0, accumulation=2, shuffle=True).batch_sampler, [])
    counts = sum(torch.bincount(slices[key][1].flatten(), minlength=6) for key in keys)
    assert {o.key: row[f"pixels_of_{o.key}"] for o in ORGANS} == {o.key: counts[o.id] for o in ORGANS}
    assert row.slices_of_narrow == sum(slices.sets[key % len(slices)] == 1 for key in keys)


@pytest.mark.slow
def test_phantoms_are_a_set_that_begins_alone(folder, tmp_path, tiny, monkeypatch):
    "They show the organs of the real sets and are never judged; one folder with phantoms resumes bit for bit."
    monkeypatch.setenv("RSNA_SEG_CACHE", str(tmp_path / "cache"))
    config, real = replace(SMALL, epochs=4, phantoms=2, phantoms_alone=0.5, fold=0), Tally.add
    whole, steps = train(folder / "liver", tmp_path / "whole", config), []

    def add(tally, *step):
        steps.append(real(tally, *step))
        if len(steps) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tally, "add", add)
        train(folder / "liver", tmp_path / "stopped", config)
    assert same_weights(whole, train(folder / "liver", tmp_path / "stopped", config))
    history, real_slices = whole.history, open_data(folder / "liver", 0).part("train").shape[0]
    assert (history.slices_of_liver[:2] == 0).all() and (history.slices_of_phantoms[:2] == real_slices + 28).all()
    share = history.slices_of_phantoms[2:] / (real_slices + 28)
    assert share.between(0.2, 0.3).all() and (history.pixels_of_spleen == 0).all()
    card = load_checkpoint(whole.checkpoint)[1]
    assert card.labelled == ["liver"] and [each["name"] for each in card.sets] == ["liver", "phantoms"]
    plan = plan_run(folder / "liver", config)
    judged = open_data(folder / "liver", 0).part("valid").shape[0]
    assert plan.lines["set phantoms"] == "liver" and plan.lines["validation"].startswith(f"{judged} slices of ")
    with pytest.raises(ConfigError, match="phantoms_alone 2 is not a share from 0 to 1"):
        replace(config, phantoms_alone=2)


def test_the_plan_names_sets_and_what_nobody_labels(folder):
    plan = plan_run(paths(folder, "liver", "narrow"), replace(SMALL, encoder_weights="none"))
    assert plan.lines["set narrow"] == "liver, bowel" and plan.lines["organs"] == "liver, bowel"
    notes = " ".join(text for name, text in plan.lines.items() if name.startswith("note"))
    assert "narrow: its window, level 127.5, width 255 (known), is brought to level 50, width 400" in notes
    assert f"No set labels {in_words(['spleen', 'left_kidney', 'right_kidney'])}" in notes


# Evaluation

def test_each_set_is_judged_by_itself_and_all_together(folder, tmp_path, thin):
    names = ("liver", "kidneys", "narrow")
    run = train(paths(folder, *names), tmp_path / "run", SMALL)
    both = evaluate(run.checkpoint, paths(folder, *names), workers=0, device="cpu")
    assert list(both.volumes["set"].unique()) == list(names)
    volumes = both.volumes.set_index(["set", "organ"])
    for name in names:
        judged = volumes.state[name][volumes.state[name] != "not labelled"].index.unique()
        assert set(judged) == set(MADE[name][2])
    alone = evaluate(run.checkpoint, folder / "narrow", workers=0, device="cpu").volumes
    np.testing.assert_allclose(alone.dice, both.volumes.dice[both.volumes["set"] == "narrow"], equal_nan=True)
    page = write_evaluation(both, tmp_path / "report").read_text()
    assert "Each set" in page and "all together" in page
    scores = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert list(scores["sets"]) == list(names) and scores["sets"]["narrow"]["dice"]["left_kidney"]["mean"] is None
    livers = both.volumes.query("organ == 'liver' and state != 'not labelled'").groupby("patient").dice.mean()
    assert scores["mean_over_patients"]["dice"]["liver"]["mean"] == pytest.approx(livers.mean(), nan_ok=True)
    assert scores["sets"]["narrow"]["dice"]["liver"]["mean"] == pytest.approx(alone[alone.organ == "liver"].dice.mean())
    assert np.isnan(both.table["AUC-ROC"]["Spleen"]) and both.table["AUC-ROC"]["Bowel"] > 0


def test_who_was_moved_to_the_training_is_told(folder, tmp_path, thin):
    "The kidneys' validation patient went to the training, where the liver's set has them."
    run = train(paths(folder, "liver", "kidneys"), tmp_path / "run", SMALL)
    sets = paths(folder, "liver", "kidneys")
    told = lambda data: [note for note in evaluate(run.checkpoint, data, workers=0, device="cpu").about["notes"] if "were in the training" in note]
    assert told(sets) == [] == told(sets[0])
    assert told(sets[1]) == ["1 of the 1 patients were in the training of this checkpoint: these scores are no test of it."]


def test_finetuning_brings_pictures_to_the_window_of_the_checkpoint(folder, tmp_path, tiny, capsys):
    first = train(folder / "plain", tmp_path / "first", SMALL)
    small = FinetuneConfig(size=64, batch_size=8, epochs=1, workers=0, mixed_precision="no")
    run = finetune(first.checkpoint, paths(folder, "narrow", "more"), tmp_path / "second", small)
    assert "narrow: its window, level 127.5, width 255 (known), is brought to level 50, width 400" in capsys.readouterr().out
    card = load_checkpoint(run.checkpoint)[1]
    assert (card.level, card.width, card.window) == (50, 400, "known") and card.labelled == list(ALL_ORGANS)
