"""What a GPU would be given to do: the real step and the real evaluation on tensors that only pretend to be on one.

Fake tensors have shape, type, place and memory format but no numbers. So they show which layer computes in which precision,
what is copied between processor and GPU, and how many bytes move, on a machine without CUDA.
"""

import contextlib
import os
import weakref

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from joblib import Parallel, delayed
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import rsna_seg.engines.engines
import rsna_seg.scoring.surfaces
import rsna_seg.training.loop
from rsna_seg.ct.organs import ALL_ORGANS, CLASSES
from rsna_seg.data import StepSampler
from rsna_seg.engines.engines import TorchEngine, idle_gpu, make_engine
from rsna_seg.engines.slices import on_scan
from rsna_seg.files import ConfigError
from rsna_seg.finetune import FinetuneConfig
from rsna_seg.model import SegLoss, as_input, build_model, marginal_logits
from rsna_seg.scoring.metrics import Confusion
from rsna_seg.scoring.surfaces import SurfaceTally
from rsna_seg.train import TrainConfig
from rsna_seg.training.loop import add_gradients, make_loop, make_step, merge_upsampling, start_accelerator, valid_epoch
from rsna_seg.training.plan import SLICE_GB, fitting_batch, try_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends CUDA where there is none")

BATCH, SIZE = 4, 256
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::is_nonzero")
HALF = ("torch.float16", "channels_last")


class Card:
    "The properties of a GPU."

    def __init__(self, name, major):
        self.name, self.major, self.minor, self.total_memory = name, major, 0, 16e9


A100, T4 = Card("NVIDIA A100", 8), Card("Tesla T4", 7)


@pytest.fixture
def insert(monkeypatch):
    "A function that puts a card into this computer."

    def insert(card):
        torch._C._ensureCUDADeviceGuardSet()
        answers = {
            "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_properties": card,
            "get_device_name": card.name, "get_device_capability": (card.major, card.minor), "device": contextlib.nullcontext(),
            "set_device": None, "_lazy_init": None, "reset_peak_memory_stats": None, "_check_bf16_tensor_supported": True,
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    return insert


class Watched(TorchDispatchMode):
    "Notes operations that wait for the GPU, copies between it and the processor, bytes that move, and the most that are held."

    def __init__(self):
        super().__init__()
        self.waits, self.copies, self.moved, self.held, self.peak, self.storages = [], [], 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation._schema.name
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in WAITS and any(t.device.type == "cuda" for t in given):
            self.waits.append(name)
        if name == "aten::_local_scalar_dense":
            return 1.0  # a fake tensor has no numbers
        out = operation(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name in ("aten::_to_copy", "aten::copy_") and given[-1].device != made[0].device and given[-1].ndim:  # a number travels with its kernel
            queued = kwargs.get("non_blocking") or args[-1] is True
            self.copies.append((given[-1].device.type, made[0].device.type, "queued" if queued else "blocking"))
        self._hold(made)
        views = any(argument.alias_info and not argument.alias_info.is_write for argument in operation._schema.arguments)
        if not views and not name.startswith(("prim::", "aten::empty")):
            self.moved += sum(min(t.untyped_storage().nbytes(), t.numel() * t.element_size()) for t in (*given, *made))
        return out

    def _hold(self, made):
        for storage in (t.untyped_storage() for t in made):
            if storage not in self.storages:
                self.storages.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)

    def _free(self, nbytes):
        self.held -= nbytes


def faked(module, device="cuda", dtype=None):
    "The module with weights that have no numbers."
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    return module


def pixels(count=1, batch=BATCH, size=SIZE):
    "Batches of images and masks, in the processor's memory."
    return [tuple(torch.empty(batch, size, size, dtype=torch.uint8) for _ in range(2)) for _ in range(count)]


@pytest.fixture
def fake_loop(insert, monkeypatch):
    "A function that makes the loop of a training on an A100."
    network = build_model(encoder_weights="none")

    def make(labelled=ALL_ORGANS, **settings):
        insert(A100)
        accelerator = start_accelerator()
        accelerator.device_placement = False  # `Module.to` does not know fake tensors
        loop = make_loop(accelerator, network, SegLoss(labelled=labelled), labelled, 1e-3, 100, **settings)
        loop.scaled = set()

        def backward(loss):  # autograd has no thread for a GPU that is not there
            loop.scaled.add(accelerator.scaler.scale(loss).dtype)
            for weight in loop.network.parameters():
                weight.grad = torch.empty_like(weight)

        monkeypatch.setattr(accelerator, "backward", backward)
        return loop

    with FakeTensorMode(allow_non_fake_inputs=True):
        faked(network)
        yield make


@contextlib.contextmanager
def layers():
    "Number format and memory format of what the network's layers give out, and the number format of the loss."
    network, loss = set(), set()

    def note(layer, given, out):
        if isinstance(layer, SegLoss):
            loss.add(out.dtype)
        elif isinstance(out, torch.Tensor) and not list(layer.children()):
            last = out.is_contiguous(memory_format=torch.channels_last)
            network.add((str(out.dtype), "channels_last" if last else "other"))

    hook = register_module_forward_hook(note)
    yield network, loss
    hook.remove()


@pytest.mark.parametrize("labelled", [ALL_ORGANS, ["liver", "bowel"]])
def test_a_step_computes_in_half_precision_and_waits_once(fake_loop, labelled):
    "The network in float16 and channels_last, the loss in float32; only the end of a step asks the GPU for a number."
    loop = fake_loop(labelled, clip=1.0)
    with layers() as (network, loss_types), Watched() as watched:
        loss, counts = add_gradients(loop, iter(pixels(3)), [0.4, 0.4, 0.2])
    assert network == {HALF} and loss_types == loop.scaled == {torch.float32}
    assert watched.copies == 6 * [("cpu", "cuda", "queued")] and watched.waits == []
    assert loss.device.type == counts.device.type == "cuda"
    known = [torch.ones(BATCH, len(CLASSES), dtype=torch.bool) for _ in range(3)]  # of several sets: what each slice shows
    with Watched() as watched:
        add_gradients(loop, iter(pixels(3)), [0.4, 0.4, 0.2], known)
    assert watched.copies == 9 * [("cpu", "cuda", "queued")] and watched.waits == []
    before = [buffer.clone() for buffer in loop.statistics]
    with Watched() as watched:
        assert make_step(loop, loss, before)
    assert watched.waits == ["aten::_local_scalar_dense"] and watched.copies == []
    moments = loop.optimizer.optimizer.state[next(loop.network.parameters())]
    assert {(value.device.type, value.dtype) for value in moments.values()} == {("cuda", torch.float32)}


def test_validation_waits_at_its_end_only(fake_loop, monkeypatch):
    class Loader(list):
        batch_sampler = StepSampler(2 * BATCH, BATCH)

    loop, waited = fake_loop(), []
    monkeypatch.setattr(Confusion, "matrix", lambda _: waited.extend(watched.waits))
    monkeypatch.setattr(rsna_seg.training.loop, "merge_unlabelled", lambda *_: None)
    with layers() as (network, loss_types), Watched() as watched:
        valid_epoch(loop, Loader(pixels(2)))
    assert waited == [] and watched.copies == 4 * [("cpu", "cuda", "queued")]
    assert network == {HALF} and loss_types == {torch.float32}


def test_a_prediction_and_its_scores_stay_on_the_card(insert):
    "In half precision without autocast; nothing waits before the classes are fetched, and the scores are float32."
    engine = TorchEngine(build_model(encoder_weights="none").eval())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        engine.device, engine.dtype, engine.model = torch.device("cuda:0"), torch.float16, faked(engine.model, dtype=torch.float16)
        [(images, masks)] = pixels()
        with layers() as (network, _), Watched() as watched:
            logits = engine.__call__.__wrapped__(engine, images, (32, 160, 64, 224))
            shares = marginal_logits(on_scan(logits, (32, 160, 64, 224), SIZE, (200, 180)), ["liver"]).softmax(1)
            confusion = Confusion(logits.device)
            confusion.update(shares.argmax(1), torch.empty(BATCH, 200, 180, dtype=torch.uint8, device="cuda"))
    assert {dtype for dtype, _ in network} == {"torch.float16"} == {str(logits.dtype)} and logits.shape == (BATCH, 6, 128, 160)
    assert shares.dtype == torch.float32 and shares.shape == (BATCH, 6, 200, 180) and confusion.counts.device.type == "cuda"
    assert watched.waits == [] and watched.copies == [("cpu", "cuda", "queued")]


def test_the_average_of_the_weights_is_adapted_too():
    "Its layers call themselves, not those of the network that it was copied from."
    loop = make_loop(start_accelerator("no"), build_model(encoder_weights="none"), SegLoss(), ALL_ORGANS, 1e-3, 10, decay=0.9)
    for network in (loop.network, loop.judged):
        assert [block.forward.args[0] is block for block in network.decoder.blocks] == [True] * 5
    assert loop.network is not loop.judged


@pytest.fixture
def networks():
    "As it is written, as a training on a processor has it, and its average."
    loop = make_loop(start_accelerator("no"), build_model(encoder_weights="none"), SegLoss(), ALL_ORGANS, 1e-3, 10, decay=0.9)
    return {"as written": build_model(encoder_weights="none"), "cpu": loop.network, "its average": loop.judged}


def test_upsampling_is_part_of_a_convolution(networks, fake_loop):
    "The forward pass makes two thirds of the products, on a processor and on a card."
    work = {}
    for name, network in {**networks, "cuda": fake_loop().network}.items():
        device = "cuda" if name == "cuda" else "cpu"
        with FlopCounterMode(display=False) as counter:
            faked(network, device)(torch.empty(BATCH, 3, SIZE, SIZE, device=device))
        work[name] = counter.get_total_flops()
    assert work["cuda"] == work["cpu"] == work["its average"] < 0.72 * work["as written"]


def test_the_loss_moves_fewer_bytes_than_smps():
    def moved(loss):
        with FakeTensorMode():
            logits = torch.empty(BATCH, len(CLASSES), SIZE, SIZE).to(memory_format=torch.channels_last).requires_grad_()
            masks = torch.empty(BATCH, SIZE, SIZE, dtype=torch.uint8)
            with Watched() as watched:
                torch.autograd.grad(loss(logits, masks), logits)
        return watched.moved

    dice, focal = DiceLoss("multiclass"), FocalLoss("multiclass")
    ours, smps = moved(SegLoss()), moved(lambda logits, masks: dice(logits, masks.long()) / 2 + focal(logits, masks.long()) / 2)
    print(f"ours {ours / 1e6:.0f} MB, smp's {smps / 1e6:.0f} MB")
    assert ours < 0.65 * smps


@pytest.mark.parametrize("precision, gigabytes", [("fp16", 2.2), ("no", 3.8)])
def test_bytes_and_memory_of_a_slice(precision, gigabytes):
    "Forward and backward; autograd runs for a processor."
    network = build_model(encoder_weights="none").train()
    merge_upsampling(network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked(network, "cpu")
        [(images, masks)] = pixels(size=512)
        with Watched() as watched:
            with torch.autocast("cpu", torch.float16, enabled=precision != "no"):
                logits = network(as_input(images))
            SegLoss()(logits, masks).backward()
    print(f"{precision}: {watched.moved / BATCH / 1e9:.2f} GB moved for a slice, {watched.peak / BATCH / 1e9:.3f} GB held")
    assert watched.moved / BATCH < gigabytes * 1e9
    assert watched.peak / BATCH / 1e9 == pytest.approx(SLICE_GB[precision], rel=0.05)


def test_a_card_without_bfloat16_is_not_given_it(insert):
    insert(T4)
    with pytest.raises(ConfigError, match="^Tesla T4 has no bfloat16 of its own; use --mixed-precision auto.$"):
        start_accelerator("bf16")
    assert start_accelerator("auto").mixed_precision == "fp16"
    insert(A100)
    assert start_accelerator("bf16").mixed_precision == "bf16"


def test_the_engine_of_a_card(insert, monkeypatch):
    "Half precision that the card has; float32 by its true name."
    monkeypatch.setattr(nn.Module, "to", lambda network, *_, **__: network)  # there is no card to send it to
    network, precisions = build_model(encoder_weights="none").eval(), {}
    for card in (A100, T4):
        insert(card)
        engines = {name: make_engine(name, network, device="cuda:0") for name in ("cuda", "torch")}
        precisions[card.name] = {name: engine.precision for name, engine in engines.items()}
    assert precisions == {"NVIDIA A100": {"cuda": "float16", "torch": "TF32"}, "Tesla T4": {"cuda": "float16", "torch": "float32"}}


def test_fewer_slices_at_once_where_memory_is_short(monkeypatch):
    sizes, room = [], 3

    def forward(network, images, box):
        sizes.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images[..., :1, :1]

    monkeypatch.setattr(rsna_seg.engines.engines, "forward_box", forward)
    engine, images = TorchEngine(build_model(encoder_weights="none").eval()), torch.arange(10, dtype=torch.uint8)
    images = images[:, None, None].expand(-1, 32, 32)
    for _ in range(2):
        assert torch.equal(engine(images), as_input(images)[..., :1, :1])
    assert sizes == [10, 5, 2, 2, 1, 2, 2, 1] + [2, 2, 2, 2, 2]
    room = 0
    with pytest.raises(ConfigError, match="^cpu has no memory for a single slice; use --device cpu.$"):
        engine(images)


def test_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert idle_gpu() == []  # hidden from the tests
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    [note] = idle_gpu()
    assert note.startswith(f"PyTorch {torch.__version__} cannot use the NVIDIA GPU that is here: ")
    smi.write_text("#!/bin/sh\nexit 9\n")  # a driver without a card
    assert idle_gpu() == []


def test_a_plan_is_made_by_a_process_of_its_own(monkeypatch):
    "Which waits for no other process of a launch; this one has no Accelerator afterwards, so that a notebook can launch."
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    trial = try_batch(1, 64, "no")
    assert trial["device"] == "cpu" and trial["batch_size"] == 1 and not AcceleratorState._shared_state
    with pytest.raises(ConfigError, match="^A batch of slices of 64 pixels cannot be tried here: fp16 needs a GPU; use --mixed-precision auto.$"):
        try_batch(1, 64, "fp16")


def test_a_smaller_batch_keeps_the_virtual_batch():
    flags = {gb: fitting_batch(FinetuneConfig(), "fp16", gb) for gb in (15.8, 7.9, 1)}
    assert flags == {15.8: "--batch-size 32 --accumulation 2", 7.9: "--batch-size 16 --accumulation 4", 1: "--batch-size 1 --accumulation 64"}
    assert fitting_batch(TrainConfig(batch_size=20, accumulation=3), "no", 9) == "--batch-size 15 --accumulation 4"


def test_surfaces_in_other_processes_are_the_same(monkeypatch):
    "Where a GPU computes the network, they do not keep it waiting."
    truth, prediction = np.zeros((2, 12, 64, 64), np.uint8)
    truth[2:9, 10:40, 12:50], prediction[3:10, 12:40, 10:45] = 1, 1
    truth[4:8, 50:60, 50:60], prediction[4:9, 50:60, 48:60] = 4, 4

    def distances():
        tally = SurfaceTally((3.0, 0.8, 0.8))
        for part in np.array_split(np.arange(12), 4):
            tally.add(prediction[part], truth[part])
        return tally.distances()

    usual, used = distances(), []
    executor = rsna_seg.scoring.surfaces.get_memmapping_executor
    monkeypatch.setattr(rsna_seg.scoring.surfaces, "get_memmapping_executor", lambda _: used.append(1) or executor(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    beside = distances()
    assert len(used) > 10
    assert Parallel(2)(map(delayed(len), ["a", "bc"])) == [1, 2]  # joblib takes the same processes
    for key, each in usual.items():
        arrays = zip((*each.edges, each.surfels, each.areas), (*beside[key].edges, beside[key].surfels, beside[key].areas))
        assert all(np.array_equal(*pair) for pair in arrays)
