"How long does the command take to answer, and how much does the predictor add to the time of PyTorch's own import?"

import subprocess
import sys
import time

from rounds import arguments, report, summary

WAYS = {
    "python -c pass": "pass",
    "rsna_seg --help": "import sys; sys.argv = ['rsna_seg', '--help']; from rsna_seg.app.cli import main; main()",
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
    alone, empty, ours = (results[name]["median"] for name in ("import torch", "python -c pass", "import torch, rsna_seg.predict"))
    results["added by rsna_seg.predict"] = summary([both - torchs for both, torchs in zip(seconds["import torch, rsna_seg.predict"], seconds["import torch"])], "s")
    ratios = {"speed, ours/import torch": alone / ours, "speed, rsna_seg --help/python -c pass": empty / results["rsna_seg --help"]["median"]}
    report(__doc__, results, ratios, ("rsna_seg", "torch"), rounds, args.json)


if __name__ == "__main__":
    main()
