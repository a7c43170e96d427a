"How many slices per second does the training loader deliver, what takes its time, and does a training step wait for it?"

import os
import tempfile
import time
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from rounds import arguments, report, speeds, summary
from torch.utils.data import DataLoader, Dataset, default_collate

from rsna_seg.augment import Augment
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.data import PrepareConfig, SliceDataset, make_loader, prepare
from rsna_seg.model import SegLoss, as_input, build_model

BATCH, STEPS = 8, 3  # of the training steps; small, so that a CPU takes seconds


class TutorialDataset(Dataset):
    "As most tutorials write it: read, stack three channels, augment, scale to float in the worker."

    def __init__(self, slices):
        self.images, self.masks = slices.images, slices.masks
        self.augment = A.Compose([
            A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.Rotate(limit=45, p=0.5), A.GridDistortion(p=0.3), A.CoarseDropout(p=0.2),
        ])  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = cv2.cvtColor(cv2.imread(self.images[index]), cv2.COLOR_BGR2RGB)
        both = self.augment(image=image, mask=cv2.imread(self.masks[index], cv2.IMREAD_GRAYSCALE))
        image = (both["image"].astype(np.float32) / 255 - 0.5) / 0.5
        return torch.from_numpy(image.transpose(2, 0, 1)), torch.from_numpy(both["mask"]).long()


def run_through(loader):
    "One epoch."
    for _ in loader:
        pass


def stages(slices, augment):
    "Milliseconds of one slice in each stage, in one process with one thread, as the loader's workers have."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock, seconds = time.perf_counter, {"decode": 0.0, "augment": 0.0, "collate": 0.0}
    items, start = [], clock()
    for index in range(len(slices)):
        items.append(slices[index])
    seconds["decode"] = clock() - start
    start = clock()
    items = [tuple(map(torch.from_numpy, augment(*(t.numpy() for t in item), seed=(0, 0, i)))) for i, item in enumerate(items)]
    seconds["augment"] = clock() - start
    start = clock()
    for first in range(0, len(items), 32):
        default_collate(items[first : first + 32])
    seconds["collate"] = clock() - start
    torch.set_num_threads(threads)
    return {name: 1000 * s / len(slices) for name, s in seconds.items()}


def waiting_share(loader, device):
    "The share of time in which training steps wait for the next batch, after the first."
    model = build_model(encoder_weights="none").to(device).train()
    criterion, optimizer = SegLoss(), torch.optim.AdamW(model.parameters())
    waited, start, batches = 0.0, 0.0, iter(loader)
    for step in range(STEPS + 1):
        asked = time.perf_counter()
        images, masks = (t.to(device, non_blocking=True) for t in next(batches))
        if step:
            waited += time.perf_counter() - asked
        else:
            start = time.perf_counter()  # the workers have started, the first batch is there
        with torch.autocast(device, torch.bfloat16):
            loss = criterion(model(as_input(images)), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return waited / (time.perf_counter() - start)


def main():
    "Makes a dataset folder, measures and reports."
    args, cores = arguments(__doc__), len(os.sched_getaffinity(0))
    rounds, device = (1 if args.quick else 5), "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_kaggle(folder / "kaggle", patients=4, slices=32)
        data = prepare(folder / "kaggle", folder / "data", config=PrepareConfig(valid=0))
        plain, slices = SliceDataset(data, "train"), SliceDataset(data, "train", transform=Augment())
        counts = sorted({0, 1, 2, 4, 8, 16, cores} & set(range(cores + 1)))
        loaders = {f"rsna_seg, {n} workers": make_loader(slices, 32, n, shuffle=True) for n in counts}
        most = f"rsna_seg, {counts[-1]} workers"
        peer = f"tutorial's dataset, {counts[-1]} workers"
        loaders[peer] = DataLoader(TutorialDataset(plain), 32, shuffle=True, num_workers=counts[-1], persistent_workers=True)
        ways = {name: lambda loader=loader: run_through(loader) for name, loader in loaders.items()}
        results = speeds(ways, len(slices), "slices/s", rounds)
        loaders.clear()
        timings = [stages(plain, Augment()) for _ in range(rounds)]
        for stage in timings[0]:
            results[f"{stage}, one process"] = summary([t[stage] for t in timings], "ms/slice")
        shares = [waiting_share(make_loader(slices, BATCH, counts[-1], shuffle=True), device) for _ in range(rounds)]
        results[f"training on {device} waits for data"] = summary([100 * share for share in shares], "% of time")
    ratios = {f"ours/{peer}": results[most]["median"] / results[peer]["median"]}
    report(__doc__, results, ratios, ("rsna_seg", "torch", "albumentations", "opencv-python-headless"), rounds, args.json)


if __name__ == "__main__":
    main()
