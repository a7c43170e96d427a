"Does `inspect` find the slices of a scan in another window, and does it take those of different patients for copies?"

import argparse
import itertools
from pathlib import Path

import pandas as pd

from rsna_seg.anatomy.inspect import _near_pairs, sketch
from rsna_seg.ct.png import read_png
from rsna_seg.ct.store import open_data


def patients(folder):
    "A row a patient of a dataset folder: whose, and the sketches of all slices that show something."
    data = open_data(folder)
    rows = []
    for patient, slices in data.manifest.groupby("patient"):
        drawn = [sketch(read_png(data.folder / file)) for file in slices.image]
        rows.append({"name": f"{Path(folder).name} / {patient}", "sketches": [each for each in drawn if each.std() > 10]})
    return rows


def main():
    "Counts pairs of slices of different patients, those that are near, and what is found of one scan in several windows."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", help="dataset folders, made by prepare, of different patients")
    parser.add_argument("--same", nargs="*", default=[], metavar="DATA", help="dataset folders of one scan in several windows")
    args = parser.parse_args()
    series = pd.DataFrame([row for folder in args.data for row in patients(folder)])
    counts = series.sketches.map(len)
    pairs = sum(a * b for a, b in itertools.combinations(counts, 2))
    print(f"{counts.sum()} slices of {len(series)} patients, {pairs:,} pairs of slices of different patients")
    near = _near_pairs(series)
    print(f"near: {sum(near.values())}", *(f"  {series.name[i]} and {series.name[j]}: {n}" for (i, j), n in near.items()), sep="\n")
    windows = pd.DataFrame([row for folder in args.same for row in patients(folder)])
    found = _near_pairs(windows) if len(windows) else {}
    for i, j in itertools.combinations(range(len(windows)), 2):
        print(f"{windows.name[i]} and {windows.name[j]}: {found.get((i, j), 0)} of {len(windows.sketches[i])} slices")


if __name__ == "__main__":
    main()
