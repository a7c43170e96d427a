"What does it save to run the decoder only where the body is, and does it change a logit?"

from contextlib import suppress
from functools import partial

import torch
from rounds import arguments, report, speeds

from rsna_seg.engines.engines import make_engine
from rsna_seg.files import ConfigError
from rsna_seg.model import build_model

SIZE, SLICES = 512, 4
BOXES = {  # pixels: top, bottom, left, right
    "a wide frame": (176, 336, 136, 376),  # the body fills 15 % of it
    "an arm's width of air": (96, 400, 56, 456),  # 46 %
    "a tight frame": (56, 456, 8, 504),  # 76 %
}


def main():
    "Slices a second of each engine, whole and in each box, and the largest change of a logit."
    args = arguments(__doc__)
    rounds = 2 if args.quick else 5
    model = build_model(encoder_weights="none").eval()
    slices = torch.randint(0, 256, (SLICES, SIZE, SIZE), dtype=torch.uint8)
    results, ratios = {}, {}
    for name in ("torch", "openvino"):
        with suppress(ConfigError):  # a runtime that is not installed
            engine = make_engine(name, model, SIZE, "cpu")
            ways = {f"{name}, whole frame": partial(engine, slices)}
            ways |= {f"{name}, {what}": partial(engine, slices, box) for what, box in BOXES.items()}
            results |= speeds(ways, SLICES, "slices/s", rounds)
            frame = engine(slices).float()
            for what, (top, bottom, left, right) in BOXES.items():
                gap = engine(slices, (top, bottom, left, right)) - frame[..., top:bottom, left:right]
                print(f"{name}, {what}: logits differ by at most {gap.abs().max():.1e}")
                ratio = results[f"{name}, {what}"]["median"] / results[f"{name}, whole frame"]["median"]
                ratios[f"{name}, {what}/whole frame"] = ratio
    report(__doc__, results, ratios, ["torch", "openvino"], rounds, args.json)


if __name__ == "__main__":
    main()
