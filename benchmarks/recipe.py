"What does each recipe learn within the same time, a core's or a GPU's, judged on patients who were left out of the training?"

import io
import itertools
import json
import math
import os
import tempfile
import time
import warnings
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from joblib import Parallel, delayed
from rounds import machine, versions_of, words
from torch import nn
from torch.optim import lr_scheduler as schedules

from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.organs import CLASSES
from rsna_seg.evaluate import evaluate
from rsna_seg.files import whole_file
from rsna_seg.finetune import FinetuneConfig, finetune
from rsna_seg.model import SegLoss, load_checkpoint, marginal_logits, save_checkpoint
from rsna_seg.scoring.intervals import MEAN, interval_table, interval_text, patient_means
from rsna_seg.scoring.metrics import side_confusion
from rsna_seg.train import TrainConfig, make_loop, train

USERS, CT = TrainConfig(), TrainConfig.ct()


def ct(**changes):
    "The recipe `ct` with other settings of the augmentation."
    return replace(CT, augment=replace(CT.augment, **changes))


RECIPES = {
    "recipe": USERS,
    "recipe, small batches": replace(USERS, batch_size=CT.batch_size, accumulation=1),
    "recipe, small batches, no flips": replace(
        USERS, batch_size=CT.batch_size, accumulation=1, augment=AugmentConfig(sides="off")
    ),
    "demo": replace(USERS, batch_size=16, accumulation=1, lr=3e-3, augment=AugmentConfig(horizontal_flip=0, vertical_flip=0, rotate_limit=15)),
    "ct": CT,
    "ct without phantoms": replace(CT, phantoms=0),
    "ct with flips": ct(sides="keep"),
    "ct with exchanging flips": ct(sides="exchange"),
    "ct with rotations to 45°": ct(rotate_limit=45),
    "ct without rotation": ct(rotate=0),
    "ct without other sizes and places": ct(affine=0),
    "ct without grid distortion": ct(grid_distortion=0),
    "ct with dropout": ct(coarse_dropout=0.2),
    "ct without contrast": ct(contrast=0),
    "ct without gamma": ct(gamma=0),
    "ct without noise": ct(noise=0),
    "ct without blur": ct(blur=0),
    "ct without other grey values": ct(contrast=0, gamma=0, noise=0, blur=0),
    "ct, rate 3e-4": replace(CT, lr=3e-4),
    "ct, rate 3e-3": replace(CT, lr=3e-3),
    "ct, batches of 4": replace(CT, batch_size=4),
    "ct, batches of 16": replace(CT, batch_size=16),
    "ct, batches of 32": replace(CT, batch_size=32),
    "ct, weight decay 0.1": replace(CT, weight_decay=0.1),
    "ct, moving average": replace(CT, ema=0.99),
    "ct, Dice alone": replace(CT, dice=1, focal=0),
    "ct, Dice of each image": replace(CT, dice_over="image"),
    "ct, slice and neighbours": replace(CT, channels="neighbours"),
}
SHARE = 0.25  # of the time, as 10 epochs after 30
REFINED = {  # a share of the time goes to a fine-tuning of what the recipe ct has learned until then, at this size
    "ct, then fine-tuned": (SHARE, FinetuneConfig.ct(), None),
    "ct, then fine-tuned at 3e-4": (SHARE, replace(FinetuneConfig.ct(), lr=3e-4), None),
    "ct, a half at 96 pixels": (0.5, replace(FinetuneConfig.ct(), lr=CT.lr), 96),
}


class PixelLoss(SegLoss):
    "Softmax focal loss of each pixel, with gamma 0 its cross-entropy, in place of the focal loss of each class."

    def __init__(self, like, gamma, weights):
        super().__init__(like.dice, 0, like.labelled)
        self.axes, self.share, self.gamma = like.axes, like.focal, gamma
        self.weights = torch.tensor([weights.get(c.key, 1.0) for c in CLASSES])

    def forward(self, logits, masks, known=None):
        dice, masks = super().forward(logits, masks, known), masks.long()
        shares = marginal_logits(logits.float(), self.labelled if known is None else known).log_softmax(1)
        share = shares.gather(1, masks.unsqueeze(1)).squeeze(1)
        losses = -((1 - share.exp()) ** self.gamma) * share * self.weights.to(share.device)[masks]
        return dice + self.share * losses.mean()


def pixel_loss(gamma, **weights):
    "A change of a loop: this loss, with weights of classes that are not 1."

    def change(loop, steps):
        loop.criterion = PixelLoss(loop.criterion, gamma, weights)

    return change


def cosine(step, steps):
    "Of the learning rate at the start."
    return (1 + math.cos(math.pi * step / steps)) / 2


def warm_up(loop, steps):
    "The first twentieth of the steps raises the learning rate, then the cosine follows."
    rates = lambda step: min(1, 20 * (step + 1) / steps) * cosine(step, steps)
    loop.scheduler = schedules.LambdaLR(loop.optimizer.optimizer, rates)


def one_cycle(loop, steps):
    "Up to three times the recipe's learning rate and down, which is one value more than there are steps."
    loop.scheduler = schedules.OneCycleLR(loop.optimizer.optimizer, 3 * CT.lr, total_steps=steps + 1, cycle_momentum=False)


def frozen_statistics(loop, steps):
    "BatchNorm uses and keeps its running statistics in the last fifth of the steps, but for the first of an epoch."
    norms = [layer for layer in loop.network.modules() if isinstance(layer, nn.BatchNorm2d)]

    def rates(step):
        for layer in norms if step > 0.8 * steps else ():
            layer.eval()
        return cosine(step, steps)

    loop.scheduler = schedules.LambdaLR(loop.optimizer.optimizer, rates)


ALTERED = {  # what no setting offers
    "ct, cross-entropy and Dice": pixel_loss(0),
    "ct, softmax focal loss and Dice": pixel_loss(2),
    "ct, cross-entropy with weights of organs": pixel_loss(0, background=0.5, spleen=2, left_kidney=3, right_kidney=3),
    "ct, warm-up": warm_up,
    "ct, one cycle": one_cycle,
    "ct, BatchNorm frozen at the end": frozen_statistics,
}
NAMES = [*RECIPES, *REFINED, *ALTERED]


def altered(name):
    "A context in which each training's loop is changed once it is made."

    def make(accelerator, model, criterion, taught, lr, steps, *others, **settings):
        loop = make_loop(accelerator, model, criterion, taught, lr, steps, *others, **settings)
        ALTERED[name](loop, steps)
        return loop

    return mock.patch("rsna_seg.train.make_loop", make) if name in ALTERED else nullcontext()


CARD = torch.cuda.get_device_name() if torch.cuda.is_available() else None
clock = time.perf_counter if CARD else time.process_time  # one training has the GPU and all cores, or one core


def arguments():
    "What to learn from, how long, and where to write; nothing is quick, as each answer is a training."
    parser = words(__doc__, quick=False)
    parser.add_argument("data", type=Path, nargs="+", help="dataset folders, made by prepare, that are one training")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="dataset folders to judge on, of which nothing is learned")
    parser.add_argument("--scan", type=Path, nargs=2, metavar=("CT", "MASK"), help="a scan with its mask to judge on")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=NAMES, default=NAMES, help="these recipes")
    parser.add_argument("--size", type=int, default=128, help="pixels along both sides")
    parser.add_argument("--seconds", type=float, default=300, help="for each training: of a core, or of the GPU where there is one")
    parser.add_argument("--folds", type=int, nargs="*", default=[0], help="to leave out, one after the other")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="for these folds in turn")
    parser.add_argument("--encoder-weights", default="none", help='"imagenet", "none" for random, or a file')
    return parser.parse_args()


def epochs_within(seconds, begin, config, folder):
    "How many epochs take so long, by the second of two."
    ends = []
    begin(folder / "trial", replace(config, epochs=2), watch=lambda history: ends.append(clock()))
    return max(1, round(seconds / (ends[1] - ends[0])))


def last_weights(run, path):
    "Writes the weights after a run's last step as a checkpoint: those of its best epoch were chosen by the validation."
    model, card = load_checkpoint(run.checkpoint)
    state = torch.load(run.folder / "last" / "state.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"] if state["average"] is None else state["average"])
    save_checkpoint(model, path, card)
    return path, state["steps"]


def learn(begin, config, seconds, folder):
    "A training that takes so long: its history, its weights after the last step, how many steps, and the time."
    with redirect_stdout(io.StringIO()):
        config = replace(config, epochs=epochs_within(seconds, begin, config, folder))
        start = clock()
        run = begin(folder / "run", config)
        taken = clock() - start
    return (run.history, *last_weights(run, folder / "last.pth"), taken)


def dice_of(result, judged, taught):
    "The Dice of each patient and organ that the network was taught."
    table = patient_means(result.volumes, "dice")[taught].stack().rename("dice").reset_index()
    return table.set_axis(["patient", "organ", "dice"], axis=1).assign(judged=judged)


def one_run(name, fold, seed, args):
    "Trains, and judges the weights after the last step: what was left out chooses nothing."
    workers = len(os.sched_getaffinity(0)) if CARD else 0
    if not CARD:
        torch.set_num_threads(1)
    data = args.data if len(args.data) > 1 else args.data[0]
    share, second, smaller = REFINED.get(name, (0, None, None))
    common = {"workers": workers, "fold": fold, "seed": seed, "save_minutes": 60}
    first = replace(RECIPES.get(name, CT), **common, size=smaller or args.size, encoder_weights=args.encoder_weights)
    with tempfile.TemporaryDirectory() as folder, altered(name):
        history, last, steps, taken = learn(partial(train, data), first, (1 - share) * args.seconds, Path(folder))
        if share:
            refine, second = partial(finetune, last, data), replace(second, **common, size=args.size)
            more, last, refined, rest = learn(refine, second, share * args.seconds, Path(folder, "refined"))
            history, steps, taken = pd.concat([history, more]), steps + refined, taken + rest
        left_out = evaluate(last, data, workers=workers, fold=fold)
        taught = load_checkpoint(last)[1].labelled
        tables = [dice_of(left_out, "left out", taught)]
        for other in args.also:
            tables.append(dice_of(evaluate(last, other, "train", workers=workers), other.name, taught))
        if args.scan:
            tables.append(dice_of(evaluate(last, args.scan[0], mask=args.scan[1]), args.scan[0].name, taught))
    swapped = 100 * side_confusion(left_out.matrix)
    about = {"recipe": name, "fold": fold, "seed": seed, "epochs": len(history), "steps": steps}
    curve = history[["seconds", "valid_dice"]].round(4).to_dict(orient="list")
    return {**about, "seconds": taken, "swapped": swapped, "curve": curve}, pd.concat(tables).assign(**about)


def summary(scores):
    "Of each recipe and what it was judged on the Dice of each organ, a mean over patients with its interval, and of the organs."
    rows = {}
    for key, table in scores.groupby(["judged", "recipe"], sort=False):
        by_patient = table.groupby(["patient", "organ"]).dice.mean().unstack()
        rows[key] = interval_table(by_patient).apply(interval_text, axis=1, digits=2)
    table = pd.DataFrame(rows).T.rename_axis(["judged on", "recipe"])
    return table[[*[organ for organ in table if organ != MEAN], MEAN]].dropna(axis=1, how="all").fillna("–")


def asked(args):
    "What the runs of a file have in common; folders and files by their names."
    names = {key: [path.name for path in getattr(args, key) or ()] for key in ("data", "also", "scan")}
    about = {"size": args.size, "seconds": args.seconds, "encoder_weights": args.encoder_weights}
    return {**names, **about, **({"gpu": CARD} if CARD else {})}


def read_earlier(args):
    "Runs and scores that are in the file already, of other recipes, folds and seeds, or of a call that was cut off."
    if not (args.json and args.json.exists()):
        return [], []
    read = json.loads(args.json.read_text())
    if read["asked"] != asked(args):
        raise SystemExit(f"{args.json} holds runs of {read['asked']}, to which these do not fit; name another file.")
    return read["runs"], read["scores"]


def write(args, runs, scores):
    "All runs so far, so that a call that is cut off loses only those at work."
    for rows in (runs, scores):
        rows.sort(key=lambda row: (NAMES.index(row["recipe"]), row["fold"], row["seed"]))
    about = {"question": __doc__, "machine": machine(), "versions": versions_of("rsna_seg", "torch", "albumentations")}
    with whole_file(args.json) as part:
        part.write_text(json.dumps({**about, "asked": asked(args), "runs": runs, "scores": scores}, indent=1))


def main():
    "Trains each recipe as often as asked for, a run a core or one after the other on a GPU, and reports."
    args = arguments()
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come: a line for each run says enough
    warnings.filterwarnings("ignore", "A worker stopped")  # joblib replaces a process that has grown
    runs, scores = read_earlier(args)
    done = {(run["recipe"], run["fold"], run["seed"]) for run in runs}
    seeded = list(zip(args.folds, itertools.cycle(args.seeds), strict=False))
    todo = [(name, *pair) for name, pair in itertools.product(args.only, seeded) if (name, *pair) not in done]
    work = Parallel(1 if CARD else len(os.sched_getaffinity(0)), return_as="generator_unordered")
    for run, table in work(delayed(one_run)(*each, args) for each in todo):
        runs.append(run)
        scores += table[["recipe", "fold", "seed", "judged", "patient", "organ", "dice"]].round(4).to_dict(orient="records")
        if args.json:
            write(args, runs, scores)
        means = table.groupby("judged").apply(lambda t: t.groupby("organ").dice.mean().mean(), include_groups=False)
        said = {**run, **means.to_dict()}
        del said["curve"]
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in said.items()), flush=True)
    print(__doc__, summary(pd.DataFrame(scores)).to_string(), "", sep="\n")
    print(pd.DataFrame(runs).groupby("recipe", sort=False)[["epochs", "steps", "seconds", "swapped"]].mean().round(1).to_string())


if __name__ == "__main__":
    main()
