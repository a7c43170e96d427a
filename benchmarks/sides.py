"What do the three ways to mirror make of left and right kidney, after equally many steps, on patients left out of the training?"

import itertools
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed
from recipe import last_weights
from rounds import report, summary, words

from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.organs import ORGAN
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.scoring.metrics import dice, side_confusion
from rsna_seg.train import TrainConfig, train

SIDES = ("keep", "exchange", "off")
FOLDS, SEEDS = 3, 3
SIZE, BATCH, EPOCHS = 128, 4, 16  # a run of a minute on one core
UNITS = {"Dice of liver": "0..1", "Dice of left kidney": "0..1", "Dice of right kidney": "0..1",
         "kidney pixels on the wrong side": "%", "CPU time of a run": "s"}  # fmt: skip
WRONG, TIME = list(UNITS)[3:]


def arguments():
    "What to learn from, and where to write; nothing is quick, as each answer is a training."
    parser = words(__doc__, quick=False)
    parser.add_argument("folder", type=Path, help="PNG pairs of several patients, or another source that prepare knows")
    parser.add_argument("--labelled", nargs="*", default=(), help="organs that the masks show; those of the labels if none")
    parser.add_argument("--encoder-weights", default="none", help='"imagenet", "none" for random, or a file')
    return parser.parse_args()


def one_run(data, seed, fold, side, encoder_weights):
    "Trains without one fold, and judges on it the weights after the last step: the fold chooses nothing."
    torch.set_num_threads(1)
    config = TrainConfig(
        size=SIZE, batch_size=BATCH, accumulation=1, epochs=EPOCHS, workers=0, fold=fold, seed=seed,
        encoder_weights=encoder_weights, augment=AugmentConfig(sides=side),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = train(data, Path(folder) / "run", config)
        seconds = time.process_time() - start
        last, _ = last_weights(run, Path(folder) / "last.pth")
        matrix = evaluate(last, data, workers=0, fold=fold).matrix
    wrong = 100 * side_confusion(matrix)
    scores = dice(matrix)
    judged = [scores[ORGAN[key].id] for key in ("liver", "left_kidney", "right_kidney")]
    return {"sides": side, "seed": seed, "fold": fold, **dict(zip(UNITS, (*judged, wrong, seconds)))}


def several(values, unit):
    "Mean, median and spread over the seeds."
    return {**summary(values, unit), "mean": round(statistics.mean(values), 4)}


def main():
    "Prepares the folder, trains and judges side by side, and reports."
    args = arguments()
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come: a line for each run says enough
    warnings.filterwarnings("ignore", "A worker stopped")  # joblib replaces a process that has grown
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        config = PrepareConfig(size=SIZE, folds=FOLDS, labelled=tuple(args.labelled))
        prepared = prepare(args.folder, data, config=config)
        print(prepared)
        for fold, rows in prepared.manifest.groupby("fold"):
            steps, patients = EPOCHS * math.ceil((len(prepared.manifest) - len(rows)) / BATCH), rows.patient.nunique()
            print(f"without fold {fold}: {steps} optimiser steps, judged on {len(rows)} slices of {patients} patients")
        todo, runs = itertools.product([data], range(SEEDS), range(FOLDS), SIDES, [args.encoder_weights]), []
        work = Parallel(len(os.sched_getaffinity(0)), return_as="generator_unordered")
        for run in work(delayed(one_run)(*each) for each in todo):
            runs.append(run)
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in run.items()), flush=True)
    means = pd.DataFrame(runs).groupby(["sides", "seed"])[list(UNITS)].mean()  # over the folds
    results = {f"{side}, {name}": several(means.loc[side, name].tolist(), unit) for name, unit in UNITS.items() for side in SIDES}
    for name, unit in UNITS.items():
        for side in SIDES[1:]:
            results[f"{side} minus keep, {name}"] = several((means.loc[side, name] - means.loc["keep", name]).tolist(), unit)
    both = means[["Dice of left kidney", "Dice of right kidney"]].mean(axis=1).groupby("sides").mean()
    ratios = {f"keep/{side}, Dice of both kidneys": both["keep"] / both[side] for side in SIDES[1:]}
    report(__doc__, results, ratios, ("rsna_seg", "torch", "albumentations", "segmentation-models-pytorch"), SEEDS, args.json)


if __name__ == "__main__":
    main()
