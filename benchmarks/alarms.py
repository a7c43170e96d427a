"""How often is a warning right? False alarms and hits of every rule: the table of 01_checks.

With real data sets beside the project, columns say what share of their series each rule names:
none of them has a known fault.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import pandas as pd

from rsna_seg.anatomy.checks import check_segmentation
from rsna_seg.anatomy.inspect import inspect_data
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.nifti import read_mask
from rsna_seg.data import PrepareConfig, prepare

PAGE = Path(__file__).parents[1] / "nbs" / "anatomy" / "01_checks.ipynb"
KIDNEYS = "left_kidney", "right_kidney"
SETS = {  # folder: organs that are labelled in it
    "curvas_png": ("liver", *KIDNEYS), "msd_liver_slices": ("liver",),
    "kits19_kidney_slices": KIDNEYS, "msd_spleen_slices": ("spleen",),
    "chaos_ct_liver_slices": ("liver",),
}  # fmt: skip
TORSO = {("cut_off", "liver"), ("cut_off", "spleen")}  # it ends below the diaphragm


def page_table():
    "The table that the page ends with."
    cells = [cell for cell in json.loads(PAGE.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "page"}
    for source in ("".join(cell["source"]) for cell in cells):
        if not source.startswith(("#| hide", "#| default_exp")):
            exec(source, names)
    return names["table"]


def named_series(folder):
    "How many series of real data sets the rules of `inspect` name, by kind, and of how many."
    counts, total = Counter(), 0
    with tempfile.TemporaryDirectory() as prepared:
        for name, labelled in SETS.items():
            config = PrepareConfig(size=256, labelled=labelled, jobs=1, valid=0)
            data = prepare(folder / name, Path(prepared) / name, config=config)
            quality = inspect_data(data.folder, jobs=1)
            counts.update(quality.findings.drop_duplicates(["patient", "series", "kind"]).kind)
            total += len(quality.series)
    return counts, total


def untrue_of_the_torso(folder):
    "Findings on a whole real scan and its mask that are not true."
    scan = read_scan(folder / "totalseg_example" / "ct.nii.gz")
    mask = read_mask(folder / "totalseg_example" / "segmentation.nii.gz", scan)
    return {(f.kind, f.organ) for f in check_segmentation(mask, scan)} - TORSO


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="real data sets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates here")
    arguments = parser.parse_args()
    table = page_table()
    if arguments.real:
        named, total = named_series(arguments.real)
        used = table["data sets", "hits, %"].notna()
        share = 100 * pd.Series(named).reindex(table.index, fill_value=0) / total
        table["real sets", "false alarms, %"] = share.where(used)
        table["real sets", "of scans"] = pd.Series(total, table.index).where(used)
        untrue = untrue_of_the_torso(arguments.real)
        print("A whole torso:", untrue or "nothing is said that is not true.")
    print(table.round(1).to_string(na_rep=""))
    if arguments.json:
        table.columns = [": ".join(names) for names in table.columns]
        arguments.json.write_text(table.astype(float).to_json(orient="index", indent=1))


if __name__ == "__main__":
    main()
