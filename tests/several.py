"""What the processes of test_several.py do together: `torchrun --nproc_per_node 2 tests/several.py DATA OUT`.

Each writes what it found to OUT/<rank>.json. The reference is plain PyTorch in one process, without the project's loop.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

import rsna_seg.train
from rsna_seg.ct.organs import ALL_ORGANS
from rsna_seg.ct.store import open_data
from rsna_seg.data import SliceDataset, StepSampler, make_loader
from rsna_seg.files import ConfigError
from rsna_seg.model import SegLoss, as_input, build_model
from rsna_seg.scoring.metrics import Confusion
from rsna_seg.train import TrainConfig, train
from rsna_seg.training.loop import (
    Tally, add_gradients, make_loop, merge_upsampling, start_accelerator, train_epoch, valid_epoch,
)  # fmt: skip

PLAIN = TrainConfig(size=64, batch_size=4, accumulation=2, epochs=2, encoder_weights="none", workers=0)
LARGE = TrainConfig(size=64, batch_size=32, accumulation=2, epochs=2, encoder_weights="none", workers=0)
EVERYTHING = TrainConfig(size=64, batch_size=4, accumulation=2, epochs=5, encoder_weights="none", workers=1, save_minutes=0,
                         ema=0.5, freeze_epochs=1, patience=1)  # fmt: skip


class First(Dataset):
    "The first slices of a dataset, as if there were no more."

    def __init__(self, slices, many):
        self.slices, self.many = slices, many

    def __len__(self):
        return self.many

    def __getitem__(self, key):
        return self.slices[key % self.many]

    def batch(self, keys):
        return [torch.stack(planes) for planes in zip(*(self[key] for key in keys))]


def new_network(exact=False):
    "The U-Net, in double precision if the results shall be exact."
    torch.manual_seed(0)
    network = build_model(encoder_weights="none")
    merge_upsampling(network)  # as the loop does; rounding would differ without
    if exact:
        network.double().register_forward_pre_hook(lambda module, images: images[0].double())
    return network


def new_loop(exact=False):
    return make_loop(start_accelerator("no"), new_network(exact), SegLoss(), ALL_ORGANS, lr=1e-3, steps=10)


def loader_of(slices, accumulation, rank, processes=2, **order):
    return make_loader(slices, 2, 0, accumulation=accumulation, process=rank, processes=processes, **order)


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def floats(module):
    "Weights and BatchNorm's statistics, all that the network's results depend on."
    return [t for t in module.state_dict().values() if t.is_floating_point()]


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def statistics(module):
    return torch.cat([b.flatten() for b in module.buffers() if b.is_floating_point()]).clone()


def flat_gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def apart(ours, direct):
    "Length of the difference, in lengths of the reference."
    return ((ours - direct).norm() / direct.norm()).item()


def batches_of(slices, accumulation, epoch=0, **order):
    "The batches of each step, process by process."
    samplers = [StepSampler(len(slices), 2, accumulation, process=p, processes=2, **order) for p in range(2)]
    for sampler in samplers:
        sampler.epoch = epoch
    return list(zip(*(sampler.steps() for sampler in samplers)))


def counted(parts):
    "The batches of all processes, without those that only keep a process company."
    return [keys for part in parts for keys, share in part if share]


def plain_step(network, slices, parts):
    "A step's gradients, loss and confusion, one batch after the other in one process."
    loss, confusion, batches = 0.0, Confusion(), counted(parts)
    network.zero_grad()
    for keys in batches:
        images, masks = slices.batch(keys)
        logits = network.train()(as_input(images))
        value = len(keys) / sum(map(len, batches)) * SegLoss()(logits, masks)
        value.backward()
        loss += value.item()
        confusion.update(logits.argmax(1), masks)
    return loss, confusion.counts


def check_gradients(every, rank):
    "Single steps of one network: a full one, short ones with uneven batches, one in which the second process has none."
    loop, plain, found = new_loop(), new_network(), []
    loop.model.train()
    for many, step in ((11, 0), (11, 1), (13, 1), (9, 1)):
        slices = First(every, many)
        parts, loader = batches_of(slices, 4)[step], loader_of(slices, 4, rank)
        loader.batch_sampler.start = step
        loop.optimizer.zero_grad()
        loss, counts = add_gradients(loop, iter(loader), [share for _, share in parts[rank]])
        gradient = flat_gradient(loop.network)
        found.append({
            "batches": [[len(keys) for keys, share in part if share] for part in parts], "loss": loss.item(),
            "pixels": int(counts.sum()), "gradient": digest([gradient]), "statistics": digest([statistics(loop.network)]),
        })  # fmt: skip
        if rank == 0:
            direct, direct_counts = plain_step(plain, slices, parts)
            found[-1] |= {"direct_loss": direct, "same_counts": torch.equal(counts, direct_counts)}
            found[-1]["apart"] = apart(gradient, flat_gradient(plain))
    return found


def check_statistics(every, rank):
    "How far BatchNorm's statistics are from the mean of two networks, each of which has seen one process's batches."
    slices, loop, plain = First(every, 5), new_loop(), [new_network(), new_network()]
    [parts] = batches_of(slices, 4)
    loop.model.train()
    add_gradients(loop, iter(loader_of(slices, 4, rank)), [share for _, share in parts[rank]])
    for network, part in zip(plain, parts):
        plain_step(network, slices, [part])
    return apart(statistics(loop.network), sum(statistics(network) for network in plain) / 2)


def check_steps(every, rank):
    """Two epochs of a full and a short step, beside the same in plain PyTorch; then the validation.

    In double precision: BatchNorm over the few pixels that 64 x 64 leaves to the deepest layers multiplies rounding errors
    by thousands in each step.
    """
    slices, loop, order = First(every, 7), new_loop(exact=True), {"shuffle": True, "seed": 3}
    loader, found = loader_of(slices, 2, rank, **order), {"loss": [], "pixels": []}
    for epoch in range(2):
        loader.batch_sampler.epoch, tally = epoch, Tally()
        for _ in train_epoch(loop, loader, tally):
            pass
        found["loss"].append(tally.loss.item() / int(tally.slices))
        found["pixels"].append(int(tally.counts.sum()))
    found["weights"] = digest(floats(loop.network))
    if rank == 0:
        begun, plain = weights(new_network(exact=True)), new_network(exact=True)
        found["direct_loss"] = plain_epochs(plain, slices, order)
        found["apart"] = apart(weights(loop.network) - begun, weights(plain) - begun)
    return {**found, "valid": [check_valid(loop, every, many, rank) for many in (7, 5, 1)]}


def plain_epochs(network, slices, order):
    "Two epochs in one process; the loss of each."
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule, losses = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10), []
    for epoch in range(2):
        total = 0.0
        for parts in batches_of(slices, 2, epoch, **order):
            loss, _ = plain_step(network, slices, parts)
            optimizer.step()
            schedule.step()
            total += loss * sum(map(len, counted(parts)))
        losses.append(total / len(slices))
    return losses


def check_valid(loop, every, many, rank):
    "The validation of so many slices, beside the same in one process."
    slices, network, confusion, total = First(every, many), loop.network.eval(), Confusion(), 0.0
    loss, matrix = valid_epoch(loop, loader_of(slices, 2, rank))
    with torch.no_grad():
        for keys in (keys for parts in batches_of(slices, 2) for keys in counted(parts)):
            images, masks = slices.batch(keys)
            logits = network(as_input(images))
            total += SegLoss()(logits, masks).item() * len(keys)
            confusion.update(logits.argmax(1), masks)
    same = bool((matrix == confusion.matrix()).all())
    return {"loss": loss, "direct_loss": total / many, "pixels": int(matrix.sum()), "same": same}


def check_nan(every, rank):
    "The loss of the second process is not a number in the second of three steps."
    slices, loop = First(every, 12), new_loop()
    sound, after = loop.criterion.forward, [digest(floats(loop.network))]
    loader, tally = loader_of(slices, 2, rank), Tally()
    loop.criterion.forward = lambda *both: sound(*both) * (torch.nan if (rank, len(after)) == (1, 2) else 1)
    for _ in train_epoch(loop, loader, tally):
        after.append(digest(floats(loop.network)))
    return {"weights": after, "skipped": tally.skipped, "slices": int(tally.slices), "steps": loop.steps}


def spy(folder, written):
    "Notes whatever this process opens for writing, makes, renames or deletes below the folder."

    def hook(event, words):
        opens = event == "open" and words[2] & (os.O_WRONLY | os.O_RDWR)
        if (opens or event in ("os.mkdir", "os.rename", "os.remove")) and not isinstance(words[0], int):
            path = os.fsdecode(words[0])
            if path.startswith(str(folder)):
                written.append(path)

    sys.addaudithook(hook)


def check_everything(data, out):
    "A run with all that can be switched on."
    loops, encoders, real = [], [], rsna_seg.train.freeze_encoder

    def look(loop, frozen):
        loops.append(loop)
        encoders.append(digest(loop.network.encoder.parameters()))
        real(loop, frozen)

    rsna_seg.train.freeze_encoder = look
    run = train(data, out, EVERYTHING)
    rsna_seg.train.freeze_encoder, loop = real, loops[-1]
    encoders.append(digest(loop.network.encoder.parameters()))
    return {"weights": digest(floats(loop.network)), "average": digest(floats(loop.average)), "encoders": encoders,
            "dice": run.history.valid_dice.tolist(), "checkpoint": run.checkpoint.exists()}  # fmt: skip


def check_unshared(data, out, rank):
    "The folder is on a disk of the first machine, the second has another of the same name."
    if rank == 0:
        shutil.copytree(out / "everything", out / "disk0")
    try:
        train(data, out / f"disk{rank}", EVERYTHING)
    except ConfigError as error:
        return str(error)


def main(data, out):
    rank, out = int(os.environ["RANK"]), Path(out)
    every, written = SliceDataset(open_data(data), "train"), []
    spy(out / "everything", written)
    found = {
        "gradients": check_gradients(every, rank), "statistics": check_statistics(every, rank), "steps": check_steps(every, rank),
        "nan": check_nan(every, rank), "everything": check_everything(data, out / "everything"), "written": written,
        "unshared": check_unshared(data, out, rank),
    }  # fmt: skip
    train(data, out / "whole", PLAIN)
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
