"What a machine can compute at most, and what the network asks of it."

import torch
from rounds import speeds
from torch.utils.flop_counter import FlopCounterMode

from rsna_seg.model import as_input, build_model


def gflop_of_a_slice():
    "Of the network's convolutions in one forward pass at 512 x 512, GFLOP."
    with FlopCounterMode(display=False) as counter:
        build_model(encoder_weights="none").to("meta")(as_input(torch.zeros(1, 512, 512, dtype=torch.uint8, device="meta")).expand(2, -1, -1, -1))
    return counter.get_total_flops() / 2 / 1e9


def products(dtype, rounds, device="cpu"):
    "Matrix products of this machine, GFLOP/s."
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN does for convolutions in float32
    size, times = (2048, 5) if device == "cpu" else (8192, 100)
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def multiply():
        for _ in range(times):
            product = torch.mm(a, b)
        product[0, 0].item()

    return speeds({"": multiply}, times * 2 * size**3 / 1e9, "GFLOP/s", rounds)[""]
