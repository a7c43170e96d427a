"What does each step of the post-processing do to the Dice of patients left out of the training?"

import os
import tempfile
import warnings
from pathlib import Path

import pandas as pd
from rounds import report, summary, words

from rsna_seg.anatomy.repair import PostprocessConfig, postprocess
from rsna_seg.augment import AugmentConfig
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle, write_series
from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.predict import Predictor
from rsna_seg.scoring.metrics import volume_dice
from rsna_seg.train import TrainConfig, train

SEEDS, PATIENTS, UNSEEN = 3, 6, 8  # rounds; phantoms to learn from, phantoms to judge on
SIZE, SLICES, EPOCHS = 96, 24, 6
STEPS = {
    "nothing": {}, "sides": {"sides": True}, "largest": {"largest": True},
    "largest, floor 50 ml": {"largest": True, "largest_floor_ml": 50}, "min_piece 1 ml": {"min_piece_ml": 1},
    "min_piece 5 ml": {"min_piece_ml": 5}, "fill_holes": {"fill_holes": True},
    "all": {"sides": True, "largest": True, "min_piece_ml": 1, "fill_holes": True},
}  # fmt: skip
TRAINED = {"without mirroring": 0.0, "with mirroring": 0.5}  # horizontal flips that keep the kidneys' labels


def one_run(folder, seed, flips):
    "Trains on some phantoms, and judges every step on others; a row for each patient and step."
    augment = AugmentConfig(horizontal_flip=flips, vertical_flip=0, grid_distortion=0, rotate_limit=10)
    config = TrainConfig(size=SIZE, batch_size=8, accumulation=1, epochs=EPOCHS, lr=3e-3, encoder_weights="none",
                         workers=0, seed=seed, augment=augment)  # fmt: skip
    predictor, rows = Predictor(train(folder / f"png{seed}", folder / f"run{seed}{flips}", config).checkpoint), []
    for patient in range(UNSEEN):
        hu, truth, affine = render(draw_patient(1000 * seed + 500 + patient), size=256, slices=SLICES)
        found = predictor(write_series(folder / f"scan{seed}{flips}{patient}", hu, affine, compress=False))
        for step, settings in STEPS.items():
            mask, _ = postprocess(found.mask, found.scan, PostprocessConfig(**settings))
            rows.append({"step": step, "patient": patient, **volume_dice(mask, truth)})
    return pd.DataFrame(rows)


def main():
    "Trains and judges for each seed, and reports the Dice without steps and what each step adds."
    args, means = words(__doc__, quick=False).parse_args(), {}
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore")
    keys = [o.key for o in ORGANS]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for seed in range(SEEDS):
            write_kaggle(folder / f"kaggle{seed}", patients=PATIENTS, size=SIZE, slices=SLICES, seed=seed)
            prepare(folder / f"kaggle{seed}", folder / f"png{seed}", config=PrepareConfig(size=SIZE, jobs=1))
            for name, flips in TRAINED.items():
                table = one_run(folder, seed, flips)
                means[name, seed] = table.groupby("step", sort=False)[keys].mean()
                print(f"trained {name}, seed {seed}", means[name, seed].round(4).to_string(), sep="\n", flush=True)
    results, ratios = {}, {}
    for name in TRAINED:
        runs = [means[name, seed] for seed in range(SEEDS)]
        for organ in keys:
            results[f"{name}, nothing, {organ}"] = summary([r.loc["nothing", organ] for r in runs], "Dice")
        for step in list(STEPS)[1:]:
            for organ in keys:
                more = [r.loc[step, organ] - r.loc["nothing", organ] for r in runs]
                if any(more):
                    results[f"{name}, {step}, {organ}"] = summary(more, "Dice more")
            ratios[f"{name}, {step}/nothing"] = sum(r.loc[step].mean() for r in runs) / sum(r.loc["nothing"].mean() for r in runs)
    packages = ("rsna_seg", "torch", "connected-components-3d", "fill-voids")
    report(__doc__, results, ratios, packages, SEEDS, args.json)


if __name__ == "__main__":
    main()
