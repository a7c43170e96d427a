"How soon does the command answer, and what does the predictor add to PyTorch's own import?"

import subprocess
import sys
import time

from rounds import arguments, report, summary

WAYS = {
    "python -c pass": "pass",
    "import rsna_seg": "import rsna_seg",
    "rsna_seg --help": "from rsna_seg.app.cli import main; main(['--help'])",
    "import torch": "import torch",
    "import torch, rsna_seg.predict": "import torch, rsna_seg.predict",
}


def main():
    "Times new processes in turn, after a round that warms the disk's cache."
    args = arguments(__doc__)
    rounds, seconds = 3 if args.quick else 9, {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name, code in WAYS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    results = {name: summary(taken, "s") for name, taken in seconds.items()}
    both, alone = seconds["import torch, rsna_seg.predict"], seconds["import torch"]
    added = [with_us - without for with_us, without in zip(both, alone)]
    results["added by rsna_seg.predict"] = summary(added, "s")
    python, package, command, torch, predict = (results[way]["median"] for way in WAYS)
    ratios = {
        "speed, ours/import torch": torch / predict,
        "speed, import rsna_seg/python -c pass": python / package,
        "speed, rsna_seg --help/python -c pass": python / command,
    }
    report(__doc__, results, ratios, ("rsna_seg", "torch"), rounds, args.json)


if __name__ == "__main__":
    main()
