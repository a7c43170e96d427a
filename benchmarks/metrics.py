"How long do confusion matrix, Dice, IoU and AUC of six classes take, and how much memory, against scikit-learn on the same pixels?"

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rounds import arguments, report, summary

SIZE, COUNTS = 512, (1, 4, 16)  # pixels along both sides; slices

MEASURE = """
import json, sys, time
import numpy as np, torch
sys.path.insert(0, {here!r})
from metrics import made_up, memory, ours, theirs
data = made_up({count})
way = {{"ours": ours, "theirs": theirs}}[{way!r}]
way(*(tensor[:1, ..., :64] for tensor in data))  # libraries are loaded
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of memory so far
seconds, before = [], memory()["VmRSS"]
for _ in range({rounds}):
    start = time.perf_counter()
    found = way(*data)
    seconds.append(time.perf_counter() - start)
print(json.dumps({{"seconds": seconds, "mb": (memory()["VmHWM"] - before) / 1024, "found": [np.asarray(f, float).tolist() for f in found]}}))
"""


def memory():
    "What the process holds now and held at most, kB (Linux)."
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:")}


def made_up(count):
    "Truth, predicted classes and softmax probabilities of slices with five round organs, unsure at their edges."
    generator = torch.Generator().manual_seed(0)
    row, col = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    truth = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    for organ, (x, y, r) in enumerate([(150, 200, 80), (380, 220, 40), (340, 330, 30), (170, 330, 30), (256, 256, 60)], 1):
        truth[:, (col - x) ** 2 + (row - y) ** 2 < r * r] = organ
    hot = torch.nn.functional.one_hot(truth.long(), 6).permute(0, 3, 1, 2).float()
    noise = torch.nn.functional.avg_pool2d(torch.randn(hot.shape, generator=generator), 5, 1, 2)
    logits = torch.nn.functional.avg_pool2d(hot, 9, 1, 4) * 14 + noise * 5
    logits[:, 0] += 3
    return truth, logits.argmax(1).to(torch.uint8), logits.softmax(1)


def ours(truth, found, probabilities):
    "As `evaluate` counts them: a few slices at a time, nothing is kept but counts."
    from rsna_seg.scoring.metrics import METRICS, RocHistogram, class_outcomes, slice_confusions

    roc, matrix = RocHistogram(), 0
    for t, f, p in zip(truth.split(4), found.split(4), probabilities.split(4)):
        matrix = matrix + slice_confusions(f, t).sum(0)
        roc.update(p, t)
    outcome = class_outcomes(matrix)
    return matrix, METRICS["dice"].of(outcome), METRICS["iou"].of(outcome), roc.auc()


def theirs(truth, found, probabilities):
    "scikit-learn's functions on all pixels at once."
    from sklearn import metrics as sk

    true, found = truth.numpy().ravel(), found.numpy().ravel()
    areas = [sk.roc_auc_score(true == c, probabilities[:, c].numpy().ravel()) for c in range(6)]
    return sk.confusion_matrix(true, found), sk.f1_score(true, found, average=None), sk.jaccard_score(true, found, average=None), areas


def measured(way, count, rounds):
    "One way on so many slices, in a process of its own, so that its peak of memory is its own."
    code = MEASURE.format(here=str(Path(__file__).parent), way=way, count=count, rounds=rounds)
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main():
    "Measures both ways on one, four and sixteen slices, compares what they found, and reports."
    args = arguments(__doc__)
    rounds, results, ratios = 1 if args.quick else 5, {}, {}
    for count in COUNTS:
        mine, peer = (measured(way, count, rounds) for way in ("ours", "theirs"))
        for a, b in zip(mine["found"], peer["found"]):
            assert np.allclose(a, b, atol=1e-4), (a, b)
        for name, one in (("rsna_seg", mine), ("scikit-learn", peer)):
            results[f"{name}, {count} slices"] = summary(one["seconds"], "s")
            results[f"{name}, {count} slices, peak"] = summary([one["mb"]], "MB more")
        ratios[f"ours/scikit-learn, speed at {count} slices"] = results[f"scikit-learn, {count} slices"]["median"] / results[f"rsna_seg, {count} slices"]["median"]
    results["rsna_seg, 64 slices, peak"] = summary([measured("ours", 64, rounds)["mb"]], "MB more")
    report(__doc__, results, ratios, ("rsna_seg", "torch", "scikit-learn"), rounds, args.json)


if __name__ == "__main__":
    main()
