"""Does this project compute rightly on this GPU, and how fast? At most ten minutes, with data of its own and no network.

    python gpu.py [--json FILE] [--parts PART ...]

Ends with 0 if all is as wanted, with 1 if something is not, with 2 where there is no CUDA. Needs nothing but the installed
package: the file may be copied anywhere.
"""

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset

from rsna_seg.app.many import Job, predict_many
from rsna_seg.augment import Augment
from rsna_seg.ct.inputs import read_input
from rsna_seg.ct.organs import ALL_ORGANS, CLASSES
from rsna_seg.ct.phantom import write_kaggle
from rsna_seg.data import PrepareConfig, SliceDataset, cores, make_loader, prepare
from rsna_seg.evaluate import evaluate
from rsna_seg.model import ENCODER, Card, SegLoss, as_input, build_model, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor, save_segmentation
from rsna_seg.scoring.metrics import Confusion, RocHistogram
from rsna_seg.training.loop import (
    Tally, add_gradients, make_loop, make_step, merge_upsampling, put_state, read_state, start_accelerator, train_epoch,
)  # fmt: skip
from rsna_seg.training.plan import try_batch

GB, MINUTES = 1e9, 10


@dataclass(frozen=True)
class Work:
    "How much is done. The tests take less, on a processor."
    folder: Path
    device: str = "cuda"
    size: int = 512  # pixels along both sides
    batch: int = 32
    slices: int = 32  # of a patient's scan
    steps: int = 17  # of the comparison with float32
    seconds: float = 12.0  # of each measured speed
    network: type = smp.Unet  # of the plain loop

    @property
    def gpu(self):
        return self.device == "cuda"

    @property
    def half(self):
        return "fp16" if self.gpu else "bf16"


@dataclass(frozen=True)
class Finding:
    "One thing that was measured."
    name: str
    value: object
    wanted: str = ""
    fine: bool | None = None  # None: nothing is wanted

    def __str__(self):
        mark = {True: "ok", False: "NOT", None: ""}[self.fine]
        value = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        return f"{mark:>4}  {self.name}: {value}{f'  (wanted: {self.wanted})' if self.wanted else ''}"


def at_least(name, value, least):
    return Finding(name, float(value), f"at least {least:g}", bool(value >= least))


def at_most(name, value, most):
    return Finding(name, float(value), f"at most {most:g}", bool(value <= most))


def is_so(name, value):
    return Finding(name, bool(value), "True", bool(value))


# What all parts use


def wait(work):
    if work.gpu:
        torch.cuda.synchronize()


def new_loop(work, precision, **settings):
    "A training from the same random weights each time."
    torch.manual_seed(0)
    network = build_model(encoder_weights="none")
    return make_loop(start_accelerator(precision), network, SegLoss(), list(ALL_ORGANS), 1e-3, 1000, **settings)


def make_data(work):
    "A dataset folder of two synthetic patients, beside their DICOM series."
    write_kaggle(work.folder / "kaggle", patients=2, size=work.size, slices=work.slices)
    return prepare(work.folder / "kaggle", work.folder / "data", config=PrepareConfig(size=work.size, valid=0, jobs=1))


def read_batches(work, data, count, batch=None):
    "So many batches of real slices in the processor's memory, pinned for a GPU."
    slices, batch = SliceDataset(data, "train", work.size), batch or work.batch
    pairs = [[slices[(i * batch + k) % len(slices)] for k in range(batch)] for i in range(count)]
    stacked = [[torch.stack(planes) for planes in zip(*pair)] for pair in pairs]
    return [[plane.pin_memory() for plane in pair] for pair in stacked] if work.gpu else stacked


def one_step(loop, batches):
    "A step over these batches, repeated while fp16's scale is too large; its loss, and how often it was repeated."
    loop.model.train()
    for repeated in range(20):
        before = [buffer.clone() for buffer in loop.statistics]
        loss, _ = add_gradients(loop, iter(batches), [1 / len(batches)] * len(batches))
        gradient = torch.cat([p.grad.flatten() for p in loop.network.parameters()])
        if make_step(loop, loss, before):
            return loss.item(), gradient.cpu(), repeated
    raise RuntimeError("20 steps in a row were not finite")


@contextmanager
def exact_float32():
    "Convolutions and products in float32 proper, not TF32."
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# 1. The machine


def look_at_machine(work, data):
    "Driver, PyTorch, card; number and memory format of each layer's output in a training step."
    findings = [Finding("PyTorch", torch.__version__), Finding("processor cores", cores())]
    if work.gpu:
        card = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip().replace("\n", ", ")
        findings += [
            Finding("card", card.name), Finding("capability", f"{card.major}.{card.minor}"), Finding("driver", driver),
            Finding("memory, GB", card.total_memory / GB), Finding("CUDA of PyTorch", torch.version.cuda),
            Finding("cuDNN", torch.backends.cudnn.version()), Finding("GPUs", torch.cuda.device_count()),
        ]  # fmt: skip
    numbers, orders = Counter(), Counter()

    def note(layer, given, out):
        if isinstance(out, torch.Tensor) and out.ndim == 4 and not list(layer.children()):
            numbers[str(out.dtype).removeprefix("torch.")] += 1
            last = out.is_contiguous(memory_format=torch.channels_last)
            orders["channels_last" if last else "other"] += 1

    loop = new_loop(work, "auto" if work.gpu else work.half)
    hook = register_module_forward_hook(note)
    one_step(loop, read_batches(work, data, 1))
    hook.remove()
    half = {"fp16": "float16", "bf16": "bfloat16"}[work.half]
    return [
        *findings, Finding("layers by number format", dict(numbers)), Finding("layers by memory format", dict(orders)),
        is_so("every layer in half precision", set(numbers) == {half}),
        is_so("every layer in channels_last", set(orders) == {"channels_last"}),
    ]  # fmt: skip


# 2. Half precision against float32


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0).item()


def compare_precisions(work, data):
    """Losses and gradients of half precision against float32, and steps that are not finite.

    BatchNorm multiplies the rounding of a random network: float16 on a processor gave a cosine of 0.987 to 0.991 for its first
    gradients at 128 and 256 pixels, and 0.9999 after 15 steps. So the two have different limits.
    """
    batches = read_batches(work, data, work.steps, min(work.batch, 16))  # float32 needs twice the memory
    curves, first, later = {}, {}, {}
    with exact_float32():
        for precision in (work.half, "no"):
            loop = new_loop(work, precision)
            done = [one_step(loop, [batch]) for batch in batches]
            curves[precision], first[precision] = np.array([loss for loss, *_ in done]), done[0][1]
        trained = copy.deepcopy(loop.network.state_dict())
        for precision in (work.half, "no"):
            loop = new_loop(work, precision)
            loop.network.load_state_dict(trained)
            later[precision] = one_step(loop, batches[:1])[1]
    return [
        at_most(f"losses of {work.steps} steps, {work.half} against float32", abs(curves[work.half] - curves["no"]).max(), 0.01),
        at_least("cosine of the first gradients", cosine(*first.values()), 0.98),
        at_least(f"cosine of the gradients after {work.steps} steps", cosine(*later.values()), 0.999),
        *check_bad_steps(work, batches[0]),
    ]  # fmt: skip


def check_bad_steps(work, batch):
    "A loss that is not a number, and a scale that overflows: nothing moves, and the scale is halved."
    findings = []
    for name in ("a NaN", "a scale of 1e38"):
        loop = new_loop(work, work.half)
        one_step(loop, [batch])
        scaler = loop.accelerator.scaler
        if name == "a NaN":
            sound = loop.criterion.forward
            loop.criterion.forward = lambda *given: sound(*given) * torch.nan
        elif scaler is None:
            continue
        else:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 1e38})
        scale = scaler.get_scale() if scaler else 1.0
        before = [buffer.clone() for buffer in loop.statistics]
        state = copy.deepcopy(loop.network.state_dict())
        loss, _ = add_gradients(loop, iter([batch]), [1.0])
        made = make_step(loop, loss, before)
        floats = [(state[key], value) for key, value in loop.network.state_dict().items() if value.is_floating_point()]
        findings.append(is_so(f"{name} moves nothing", not made and all(torch.equal(*pair) for pair in floats)))
        if scaler:
            findings.append(is_so(f"{name} halves the scale", abs(scaler.get_scale() / scale - 0.5) < 1e-6))
    return findings


# 3. Waiting


def check_waits(work, data):
    "Nothing in a step's batches makes the processor wait for the GPU."
    loop, batches = new_loop(work, work.half), read_batches(work, data, 2)
    one_step(loop, batches)  # kernels are found, memory is there
    if not work.gpu:
        return []
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_gradients(loop, iter(batches), [0.5, 0.5])
        what = ""
    except RuntimeError as error:
        what = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [Finding("what waits inside a step", what or "nothing", "nothing", not what)]


# 4. Speed


class Timed:
    "A loader that notes how long its batches are waited for, after the first of an epoch."

    def __init__(self, loader):
        self.loader, self.batch_sampler, self.waited = loader, loader.batch_sampler, 0.0

    def __iter__(self):
        batches, self.waited = iter(self.loader), 0.0
        yield next(batches)
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()


class Plain(Dataset):
    "As most tutorials write it: augmented, stacked to three channels and scaled to float in the worker."

    def __init__(self, slices):
        self.slices, self.augment = slices, Augment()

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, index):
        image, mask = self.augment(*(plane.numpy() for plane in self.slices[index]), seed=(0, 0, index))
        image = (np.stack([image] * 3).astype(np.float32) / 255 - 0.5) / 0.5
        return torch.from_numpy(image), torch.from_numpy(mask).long()


def repeated(dataset, count):
    "So many slices of the dataset, from the beginning again where it has fewer."
    return Subset(dataset, [i % len(dataset) for i in range(count)])


def rate(work, run, slices):
    "Slices a second of `run`, once."
    wait(work)
    start = time.perf_counter()
    run()
    wait(work)
    return slices / (time.perf_counter() - start)


def our_epoch(work, data, count):
    "Slices a second of an epoch as `rsna_seg train` makes it, the share of time it waits for data, and its memory, GB."
    slices = SliceDataset(data, "train", work.size, Augment())
    workers = min(16, cores()) if work.gpu else 0
    loader = Timed(make_loader(repeated(slices, count), work.batch, workers, accumulation=4, shuffle=True))
    loop = new_loop(work, work.half)
    list(train_epoch(loop, loader, Tally()))  # workers start, kernels are found
    if work.gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    speed = rate(work, lambda: list(train_epoch(loop, loader, Tally())), count)
    memory = torch.cuda.max_memory_allocated() / GB if work.gpu else 0.0
    return speed, loader.waited / (time.perf_counter() - start), memory, loop


def plain_epoch(work, data, count):
    "Slices a second of the usual loop: smp's network and losses, autocast, GradScaler, PyTorch's own memory order."
    slices = Plain(SliceDataset(data, "train", work.size))
    workers = min(16, cores()) if work.gpu else 0
    loader = DataLoader(repeated(slices, count), work.batch, shuffle=True, num_workers=workers, pin_memory=work.gpu, persistent_workers=workers > 0)
    network = work.network(encoder_name=ENCODER, encoder_weights=None, in_channels=3, classes=len(CLASSES)).to(work.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(work.device, enabled=work.gpu)
    dice, focal = smp.losses.DiceLoss("multiclass"), smp.losses.FocalLoss("multiclass")
    dtype = torch.float16 if work.gpu else torch.bfloat16
    torch.backends.cudnn.benchmark = True

    def epoch():
        for images, masks in loader:
            images, masks = images.to(work.device), masks.to(work.device)
            with torch.autocast(work.device, dtype):
                logits = network(images)
                loss = 0.5 * dice(logits, masks) + 0.5 * focal(logits, masks)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            loss.item()

    epoch()
    speed = rate(work, epoch, count)
    torch.backends.cudnn.benchmark = False
    return speed


def on_card(work, data, count):
    "Slices a second with the data on the card already."
    loop, [batch] = new_loop(work, work.half), read_batches(work, data, 1)
    batch, torch.backends.cudnn.benchmark = [plane.to(work.device) for plane in batch], True
    one_step(loop, [batch] * 2)

    def run():
        for _ in range(max(1, count // (4 * work.batch))):
            before = [buffer.clone() for buffer in loop.statistics]
            loss, _ = add_gradients(loop, iter([batch] * 4), [0.25] * 4)
            make_step(loop, loss, before)

    speed = rate(work, run, max(1, count // (4 * work.batch)) * 4 * work.batch)
    torch.backends.cudnn.benchmark = False
    return speed


class Floor(TorchDispatchMode):
    "The seconds that the operations take at least: each its bytes or its products, whichever take longer."

    def __init__(self, bandwidth, products):
        super().__init__()
        self.bandwidth, self.products, self.seconds = bandwidth, products, 0.0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out, name = operation(*args, **(kwargs or {})), operation._schema.name
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs or {}), out))
        views = any(argument.alias_info and not argument.alias_info.is_write for argument in operation._schema.arguments)
        if views or name.startswith(("prim::", "aten::empty")):
            return out
        moved = sum(min(t.untyped_storage().nbytes(), t.numel() * t.element_size()) for t in (*given, *made))
        if "batch_norm" in name:  # statistics first, then the same values again
            moved *= 1.5
        work = 0
        if name.startswith("aten::convolution"):
            backward = name.endswith("backward")
            image, weight = (given[1], given[2]) if backward else (given[0], given[1])
            pixels = (given[0] if backward else made[0]).shape
            work = 2 * pixels[0] * pixels[2] * pixels[3] * weight.numel() * (2 if backward else 1)
        self.seconds += max(moved / self.bandwidth, work / self.products)
        return out


def floor_of_a_slice(work, bandwidth, products):
    "Seconds that forward and backward of a slice take at least, counted on tensors without numbers."
    network = build_model(encoder_weights="none").train()
    merge_upsampling(network)
    with FakeTensorMode(allow_non_fake_inputs=True), Floor(bandwidth, products) as counted:
        for part in network.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        tensors[name] = torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake
        pixels = torch.empty(work.batch, work.size, work.size, dtype=torch.uint8)
        with torch.autocast("cpu", torch.float16):
            logits = network(as_input(pixels))
        SegLoss()(logits, pixels).backward()
    return counted.seconds / work.batch


def measure_card(work):
    "Bytes a second of a copy, and products a second in half precision."
    size, dtype = (8192, torch.float16) if work.gpu else (512, torch.float32)
    a, b = torch.randn(2, size, size, device=work.device).to(dtype)
    block = torch.empty(2**30 if work.gpu else 2**20, dtype=torch.uint8, device=work.device)
    target, times = torch.empty_like(block), 20

    def copies():
        for _ in range(times):
            target.copy_(block)

    def multiply():
        for _ in range(times):
            torch.mm(a, b)

    copies(), multiply()
    return rate(work, copies, 2 * times * len(block)), rate(work, multiply, times * 2 * size**3)


def measure_speed(work, data):
    "Training, against the usual loop, the loader alone, and what the card could do."
    guess = on_card(work, data, 4 * work.batch)
    count = max(4, round(guess * work.seconds / (4 * work.batch)) * 4) * work.batch
    ours, waited, memory, loop = our_epoch(work, data, count)
    save_checkpoint(loop.network, work.folder / "trained.pth", Card(size=work.size))
    del loop
    plain, held = plain_epoch(work, data, count), on_card(work, data, count)
    slices = SliceDataset(data, "train", work.size, Augment())
    loader = make_loader(repeated(slices, count), work.batch, min(16, cores()) if work.gpu else 0, shuffle=True)
    alone = rate(work, lambda: [None for _ in loader], count)
    bandwidth, products = measure_card(work)
    limit = 1 / floor_of_a_slice(work, bandwidth, products)
    return [
        Finding("slices in an epoch", count), Finding("training, slices/s", ours), Finding("the usual loop, slices/s", plain),
        Finding("data on the card, slices/s", held), Finding("the loader alone, slices/s", alone),
        Finding("copies, GB/s", bandwidth / GB), Finding("products, TFLOP/s", products / 1e12), Finding("limit, slices/s", limit),
        at_least("training / the usual loop", ours / plain, 1.5), Finding("data on the card / limit", held / limit),
        at_most("share of the time that waits for data", waited, 0.02),
        at_most(f"memory of a batch of {work.batch}, GB", memory, 14), Finding("_held", held), Finding("_memory", memory),
    ]  # fmt: skip


# 5. The plan


def check_plan(work, data, held=None, memory=None):
    "What the plan measures, against what happened."
    trial = try_batch(work.batch, work.size, "auto")
    planned = trial["batch_size"] / trial["train_seconds"]
    findings = [Finding("planned, slices/s", planned), Finding("planned memory, GB", trial["memory_gb"])]
    if not held:
        return findings
    return [
        *findings, at_most("plan's time, off by", abs(held / planned - 1), 0.15),
        at_most("plan's memory, off by", abs(trial["memory_gb"] / memory - 1), 0.15),
    ]  # fmt: skip


# 6. Resume


def check_resume(work, data):
    "Three steps, a state, another three: the weights of six, bit for bit."
    batches, before = read_batches(work, data, 6, batch=max(2, work.batch // 4)), torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        whole, first, second = (new_loop(work, work.half) for _ in range(3))
        for batch in batches:
            one_step(whole, [batch])
        for batch in batches[:3]:
            one_step(first, [batch])
        torch.save(read_state(first, Tally()), work.folder / "state.pt")
        put_state(second, torch.load(work.folder / "state.pt", map_location="cpu", weights_only=True))
        for batch in batches[3:]:
            one_step(second, [batch])
    finally:
        torch.backends.cudnn.deterministic = before
    pairs = zip(whole.network.state_dict().values(), second.network.state_dict().values())
    return [is_so("3 + 3 steps are 6 steps, bit for bit", all(torch.equal(*pair) for pair in pairs))]


# 7. Counts


def check_counts(work, data):
    "Confusion matrix and ROC of the same pixels, on the card and on the processor."
    torch.manual_seed(0)
    truth = torch.randint(0, len(CLASSES), (4, work.size, work.size), dtype=torch.uint8)
    shares = (3 * torch.randn(4, len(CLASSES), work.size, work.size)).softmax(1)
    matrices, curves, areas = [], [], []
    for device in ("cpu", work.device):
        confusion, roc = Confusion(device), RocHistogram()
        confusion.update(shares.argmax(1).to(device), truth.to(device))
        roc.update(shares.to(device), truth.to(device))
        matrices.append(confusion.matrix())
        curves.append(torch.stack([each.counts.cpu() for each in roc.classes]))
        areas.append(roc.auc())
    moved = (curves[0] - curves[1]).abs().sum().item() / 2 / curves[0].sum().item()
    return [
        is_so("confusion matrix as on the processor", (matrices[0] == matrices[1]).all()),
        is_so("as many scores of each class as on the processor", torch.equal(*(curve.sum(1) for curve in curves))),
        at_most("AUC, card against processor", abs(areas[0] - areas[1]).max(), 1e-5),
        Finding("share of scores that rounding puts into another bin", moved),
    ]  # fmt: skip


# 8. Prediction and evaluation


def trained(work):
    "The checkpoint of the speed's training, or of a random network."
    if not (work.folder / "trained.pth").exists():
        save_checkpoint(new_loop(work, "no").network, work.folder / "trained.pth", Card(size=work.size))
    return work.folder / "trained.pth"


def check_prediction(work, data):
    "The same scan and the same evaluation on the processor and on the card, and where the time goes."
    checkpoint, [series, *_] = trained(work), sorted((work.folder / "kaggle" / "train_images").glob("*/*"))
    start = time.perf_counter()
    scan = read_input(series)
    reading = time.perf_counter() - start
    card, half = ("torch", "cuda") if work.gpu else ("torch", "torch-bf16")
    ways = {"processor": ("torch", "cpu"), "card": (card, work.device), "half": (half, work.device)}
    masks, seconds = {}, {}
    with exact_float32():
        for name, (engine, device) in ways.items():
            predictor = Predictor(checkpoint, PredictConfig(engine=engine, device=device, batch_size=8))
            result = predictor(scan)
            wait(work)
            start = time.perf_counter()
            masks[name] = predictor(scan).mask if name != "processor" else result.mask
            seconds[name] = time.perf_counter() - start
        whole = Predictor(checkpoint, PredictConfig(engine=half, device=work.device, batch_size=8, crop=False))(scan).mask
    start = time.perf_counter()
    save_segmentation(result, work.folder / "organs", ("nifti",))
    writing = time.perf_counter() - start
    parts = {"reading": reading, "network": seconds["half"], "writing": writing}
    total = sum(parts.values())
    equal = lambda one, other: (one == other).mean()
    return [
        at_least("voxels of the processor's class, float32", equal(masks["processor"], masks["card"]), 0.9999),
        at_least("voxels of the processor's class, half precision", equal(masks["processor"], masks["half"]), 0.999),
        at_least("voxels of the whole frame's class", equal(whole, masks["half"]), 0.999),
        Finding("DICOM to NIfTI, slices/s", len(scan.hu) / total),
        *(Finding(f"share of {name}", taken / total) for name, taken in parts.items()), *compare_evaluations(work, checkpoint),
    ]  # fmt: skip


def compare_evaluations(work, checkpoint):
    "Dice of each organ in each volume, on the processor and on the card."
    with exact_float32():
        tables = [
            evaluate(checkpoint, work.folder / "data", "train", 8, workers=0, device=device).volumes.dice for device in ("cpu", work.device)
        ]
    return [at_most("Dice of a volume, processor against card", (tables[0] - tables[1]).abs().max(), 1e-3)]


# 9. Several GPUs

_RUN = """
import sys
from rsna_seg.train import TrainConfig, train
settings = TrainConfig(size=int(sys.argv[3]), batch_size=4, accumulation=4, epochs=2, encoder_weights="none", mixed_precision="no",
                       validate_on="train", workers=2)
if len(sys.argv) > 4:
    from accelerate import notebook_launcher
    notebook_launcher(train, (sys.argv[1], sys.argv[2], settings), num_processes=2)
else:
    train(sys.argv[1], sys.argv[2], settings)
"""


def check_several(work, data):
    "The same training by one process, by two, and from a notebook; then scans with two jobs."
    if work.gpu and torch.cuda.device_count() < 2:
        return [Finding("several GPUs", "there is one")]
    script = work.folder / "run.py"
    script.write_text(_RUN)
    launches = {
        "one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }  # fmt: skip
    findings, losses = [], {}
    for name in ("one", "two", "notebook"):
        out, command = work.folder / name, launches.get(name, launches["one"])
        words = [*command, script, data.folder, out, work.size, *(["notebook"] if name == "notebook" else [])]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=180)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            errors = [line for line in lines if re.search(r"Error\b|Signal|exitcode", line)] or lines
            findings.append(Finding(f"training by {name}", errors[-5:], "no error", False))
            continue
        losses[name] = pd.read_csv(out / "history.csv").train_loss
    if "one" in losses:
        others = [name for name in losses if name != "one"]
        findings += [at_most(f"loss of {name} against one process", (losses[name] - losses["one"]).abs().max(), 0.02) for name in others]
    job = Job((str(trained(work)),), str(work.folder / "many"), PredictConfig(device=None if work.gpu else "cpu"), ("nifti",))
    *_, failed = predict_many(job, work.folder / "kaggle" / "train_images", jobs=2)
    return [*findings, is_so("many scans with two jobs", failed.empty)]


PARTS = {
    "machine": look_at_machine, "half precision": compare_precisions, "waiting": check_waits, "speed": measure_speed,
    "plan": check_plan, "resume": check_resume, "counts": check_counts, "prediction": check_prediction, "several GPUs": check_several,
}  # fmt: skip


def run_parts(work, data, parts=PARTS):
    "All findings by part; a part that fails is a finding too, and the others go on."
    found, start = {}, time.perf_counter()
    for name, part in parts.items():
        given = {}
        if name == "plan":
            given = {f.name[1:]: f.value for f in found.get("speed", []) if f.name.startswith("_")}
        if time.perf_counter() - start > 60 * MINUTES:
            found[name] = [Finding(name, "no time was left", f"within {MINUTES} minutes", False)]
            continue
        try:
            found[name] = part(work, data, **given)
        except Exception as error:  # whatever it is, the other parts tell more
            found[name] = [Finding(name, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}", "no error", False)]
        print(f"\n{name}, {time.perf_counter() - start:.0f} s", *(f for f in found[name] if f.name[0] != "_"), sep="\n", flush=True)
        if work.gpu:
            torch.cuda.empty_cache()
    return found


def main():
    "The command."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"only these of: {', '.join(PARTS)}")
    arguments = parser.parse_args()
    file = arguments.json
    if not torch.cuda.is_available():
        print(f"gpu.py: PyTorch {torch.__version__} finds no CUDA GPU here, so there is nothing to try.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        found = run_parts(work, make_data(work), {name: PARTS[name] for name in arguments.parts})
    wrong = [f"{name}: {finding.name}" for name, findings in found.items() for finding in findings if finding.fine is False]
    if file:
        versions = {name: version(name) for name in ("rsna_seg", "torch", "accelerate", "segmentation-models-pytorch")}
        machine = {"cores": os.cpu_count(), "system": platform.platform(), "card": torch.cuda.get_device_name()}
        results = {name: [asdict(f) for f in findings if f.name[0] != "_"] for name, findings in found.items()}
        content = {"question": __doc__.splitlines()[0], "machine": machine, "versions": versions, "results": results, "wrong": wrong}
        file.write_text(json.dumps(content, indent=2, default=str))
    print("\nAll is as wanted." if not wrong else "\nNot as wanted: " + "; ".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
