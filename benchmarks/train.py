"How many slices per second does training take in at 512 px, against the usual loop, and does it learn the same?"

import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import albumentations as A
import numpy as np
import segmentation_models_pytorch as smp
import torch
from gpu import Timed, repeated
from limits import gflop_of_a_slice, products
from loading import TutorialDataset
from rounds import report, speeds, summary, words
from torch.utils.data import DataLoader

from rsna_seg.augment import Augment
from rsna_seg.ct.organs import ALL_ORGANS, CLASSES
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.ct.store import open_data
from rsna_seg.data import PrepareConfig, SliceDataset, StepSampler, make_loader, prepare
from rsna_seg.model import ENCODER, SegLoss, build_model
from rsna_seg.training.loop import Tally, make_loop, start_accelerator, train_epoch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH, ACCUMULATION, SLICES = (32, 4, 1024) if GPU else (4, 2, 8)  # slices of a round
CURVE = 16  # steps of one batch, whose losses are compared
LR, STEPS = 1e-3, 1000  # of the cosine
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION = start_accelerator("auto").mixed_precision
OURS = "rsna_seg, float32" if PRECISION == "no" else f"rsna_seg, {PRECISION}"
OURS32, USUAL = "rsna_seg, float32", "the usual loop, float32"
SPINNING = f"{OURS}, waiting threads spin"  # which is OpenMP's default, and the usual loop's


def first_weights():
    "The weights that all begin with."
    torch.manual_seed(0)
    return build_model(encoder_weights="none").state_dict()


def ours(data, precision, slices, accumulation, augment):
    "An epoch of `rsna_seg train`, as a function that gives the steps' losses, and its loader."
    dataset = SliceDataset(data, "train", transform=Augment() if augment else None)
    loader = Timed(make_loader(repeated(dataset, slices), BATCH, accumulation=accumulation, shuffle=True))
    model = build_model(encoder_weights="none")
    model.load_state_dict(first_weights())
    loop = make_loop(start_accelerator(precision), model, SegLoss(), list(ALL_ORGANS), LR, STEPS)
    return lambda: [loss for _, loss in train_epoch(loop, loader, Tally())], loader


def usual(data, precision, slices, accumulation, augment, seed=0):
    "The same as most tutorials write it; `seed` is of the order."
    dataset = TutorialDataset(SliceDataset(data, "train"))
    dataset.augment = dataset.augment if augment else A.Compose([])
    batches = list(StepSampler(slices, BATCH, shuffle=True, seed=seed))
    loader = DataLoader(repeated(dataset, slices), batch_sampler=batches, num_workers=os.cpu_count(), pin_memory=GPU, persistent_workers=True)
    model = smp.Unet(encoder_name=ENCODER, encoder_weights=None, in_channels=3, classes=len(CLASSES)).to(DEVICE).train()
    model.load_state_dict(first_weights())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    dice_loss, focal_loss = smp.losses.DiceLoss("multiclass"), smp.losses.FocalLoss("multiclass")

    def epoch():
        losses, matrix = [], np.zeros((len(CLASSES), len(CLASSES)))
        optimizer.zero_grad()
        for i, (images, masks) in enumerate(loader, 1):
            images, masks = images.to(DEVICE), masks.to(DEVICE)
            with torch.autocast(DEVICE, DTYPES[precision], enabled=precision != "no"):
                logits = model(images)
            logits = logits.float()
            loss = 0.5 * dice_loss(logits, masks) + 0.5 * focal_loss(logits, masks)
            (loss / accumulation).backward()
            losses.append(loss.item())
            pairs = len(CLASSES) * masks.cpu().numpy() + logits.argmax(1).cpu().numpy()
            matrix += np.bincount(pairs.ravel(), minlength=matrix.size).reshape(matrix.shape)
            2 * np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1), 1)  # Dice, for the progress bar
            if i % accumulation == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return losses

    return epoch, None


WAYS = {OURS: (ours, PRECISION), OURS32: (ours, "no"), SPINNING: (ours, PRECISION), USUAL: (usual, "no")}


@cache
def training(folder, way, precision, *work):
    "What has been built for these words, in a process of its own."
    return way(open_data(folder), precision, *work)


@dataclass
class Epoch:
    "What a process saw of an epoch."
    losses: list[float]
    waited: float | None  # share of its time, None where it is not known
    memory: float  # most that the process, or the GPU, has used so far, GB


def train(*words):
    "One epoch."
    run, loader = training(*words)
    start = time.perf_counter()
    losses = run()
    if GPU:
        torch.cuda.synchronize()
    waited = loader.waited / (time.perf_counter() - start) if loader else None
    memory = torch.cuda.max_memory_allocated() if GPU else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux
    return Epoch(losses, waited, memory / 1e9)


@contextmanager
def waiting(name):
    "Processes that begin meanwhile have threads that wait as those of this way do; the command has them sleep."
    before = os.environ.pop("OMP_WAIT_POLICY", None)
    if name not in (USUAL, SPINNING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    yield
    os.environ.pop("OMP_WAIT_POLICY", None)
    if before:
        os.environ["OMP_WAIT_POLICY"] = before


def differences(folder, pools):
    "The largest difference of a step's loss: of ours to the usual loop's, and of the usual loop's to its own under noise."
    ways = {
        **{name: (name, *way) for name, way in WAYS.items() if name != SPINNING},
        "the usual loop, bf16": (USUAL, usual, "bf16"),
        "the usual loop, other batches": (USUAL, usual, "no", 1),
    }
    curves = {}
    for name, (pool, way, precision, *seed) in ways.items():
        done = pools[pool].submit(train, folder, way, precision, CURVE * BATCH, 1, False, *seed)
        curves[name] = np.array(done.result().losses)
        print(f"{name}: loss", *(f"{loss:.4f}" for loss in curves[name]))
    return {name: abs(curve - curves[USUAL]).max() for name, curve in curves.items() if name != USUAL}


def main():
    "Makes a dataset folder, measures and reports."
    parser = words(__doc__)
    parser.add_argument("--busy", action="store_true", help="smaller slices, beside a process on each core that only counts; speeds only")
    args = parser.parse_args()
    rounds, done = (1 if args.quick else 3), {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folder = Path(folder)
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in WAYS}
        ready = []
        for name, pool in pools.items():
            with waiting(name):
                ready.append(pool.submit(os.getpid))  # they import while this process draws
        write_kaggle(folder / "kaggle", patients=2, slices=32)
        data = prepare(folder / "kaggle", folder / "data", config=PrepareConfig(size=256 if args.busy else 512, valid=0)).folder
        wait(ready)
        for _ in range(os.cpu_count() if args.busy else 0):
            stack.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)

        def epoch(name):
            done[name].append(pools[name].submit(train, data, *WAYS[name], SLICES, ACCUMULATION, True).result())

        results = speeds({name: partial(epoch, name) for name in WAYS}, SLICES, "slices/s", rounds)
        ratios = {f"{name}/{USUAL}": results[name]["median"] / results[USUAL]["median"] for name in WAYS if name != USUAL}
        unlike, longer = {}, None
        if not args.quick and not args.busy:
            unlike = differences(data, pools)
            longer = pools[OURS].submit(train, data, *WAYS[OURS], CURVE * BATCH, 1, True).result()
    work = 3 * gflop_of_a_slice()  # forward and backward; the counter's own backward takes depthwise convolutions for dense ones
    for name in [] if args.busy else dict.fromkeys((OURS, OURS32)):
        precision = WAYS[name][1]
        limit = products(DTYPES[precision], rounds, DEVICE)
        results[f"matrix products, {name.split()[-1]}"] = limit
        results[f"{name}: of their limit"] = summary([100 * results[name]["median"] * work / limit["median"]], "%")
    for name, epochs in done.items():
        results[f"{name}: peak memory"] = summary([max(e.memory for e in epochs)], "GB")
    if longer:
        results[f"{OURS}: waits for data"] = summary([100 * longer.waited], "% of time")
    for name, difference in unlike.items():
        results[f"{name}: loss unlike {USUAL}'s"] = summary([difference], "at most")
    report(__doc__, results, ratios, ("rsna_seg", "torch", "accelerate", "segmentation-models-pytorch", "albumentations"), rounds, args.json)
    if not args.busy:
        print("Wanted: at least 3 with bf16 on a processor that has it, 1.8 in float32.")


if __name__ == "__main__":
    main()
