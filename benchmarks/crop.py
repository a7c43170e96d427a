"What does leaving out the air around the body save, and what does it change, by the margin that is kept?"

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rsna_seg.anatomy.measure import find_body
from rsna_seg.ct.inputs import opened
from rsna_seg.ct.scan import to_square, window
from rsna_seg.engines.engines import TorchEngine
from rsna_seg.engines.graph import REACH, grow_box
from rsna_seg.engines.slices import box_on_square
from rsna_seg.model import load_checkpoint, marginal_logits

MARGINS, SLICES = (0, 8, 16, 32, REACH), 8


def changed(engine, card, squares, whole, box):
    "Share of the pixels whose class is not that of whole frames, %."
    part = torch.zeros_like(whole)
    part[:, box[0] : box[1], box[2] : box[3]] = marginal_logits(engine(squares, box), card.labelled).argmax(1)
    return 100 * float((part != whole).double().mean())


def main():
    "A row for each scan and margin."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("scans", type=Path, nargs="+", help="DICOM or NIfTI")
    args = parser.parse_args()
    model, card = load_checkpoint(args.checkpoint)
    engine, rows = TorchEngine(model), []
    for path in args.scans:
        with opened(path, level=card.level, width=card.width) as scan:
            ranks = np.unique(np.linspace(0, len(scan.hu) - 1, SLICES).round().astype(int))
            squares = torch.from_numpy(np.stack([to_square(window(scan.hu[z], card.level, card.width), card.size) for z in ranks]))
            whole = marginal_logits(engine(squares), card.labelled).argmax(1)
            body = box_on_square(find_body(scan.hu, card.level - card.width / 2).box, *scan.hu.shape[1:], card.size)
            for margin in MARGINS:
                box = grow_box(body, card.size, margin)
                area = (box[1] - box[0]) * (box[3] - box[2]) / card.size**2
                rows.append({"scan": path.name, "margin, px": margin, "decoder on, %": 100 * area, "pixels changed, %": changed(engine, card, squares, whole, box)})
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
