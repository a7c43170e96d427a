"How fast do RLE DICOM and NIfTI masks become PNG pairs, and how much memory does a worker take?"

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from rounds import arguments, report, speeds, summary

from rsna_seg.data import PrepareConfig, prepare
from rsna_seg.ct.phantom import draw_patient, render, write_mask, write_series

SERIES, SLICES, LONG = 8, 75, 1000


def write_source(folder):
    "A competition folder of a few series of 512 x 512 pixels; two different bodies, so that it is made quickly."
    bodies = [render(draw_patient(seed), 512, SLICES) for seed in (0, 5)]
    for n in range(SERIES):
        hu, mask, affine = bodies[n % 2]
        write_series(folder / "train_images" / f"{n}" / f"{n}1", hu, affine, patient_id=n, falling=n % 2 == 1)
        write_mask(folder / "segmentations" / f"{n}1.nii", mask, affine)


def empty(folder):
    "The folder with empty images/ and masks/."
    shutil.rmtree(folder, ignore_errors=True)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    return folder


def ours(source, out, jobs):
    "`rsna_seg prepare`, with checks, manifest and checksums."
    shutil.rmtree(out, ignore_errors=True)
    prepare(source, out, config=PrepareConfig(jobs=jobs))


def notebook_loop(source, out):
    "The loop of most Kaggle notebooks: pydicom's own decoder, cv2.imwrite as it comes, one process."
    empty(out)
    for series in source.glob("train_images/*/*"):
        mask = nib.load(source / "segmentations" / f"{series.name}.nii").get_fdata()
        files = sorted(series.glob("*.dcm"), key=lambda path: int(path.stem))
        for z, path in enumerate(files):
            dataset = pydicom.dcmread(path)
            dataset.pixel_array_options(decoding_plugin="pydicom")
            hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            grey = (np.clip((hu + 150) / 400, 0, 1) * 255).astype(np.uint8)
            cv2.imwrite(str(out / "images" / f"{series.name}_{z}.png"), grey)
            cv2.imwrite(str(out / "masks" / f"{series.name}_{z}.png"), mask[::-1, ::-1, z].T.astype(np.uint8))


def simpleitk(source, out):
    "The same series read by SimpleITK, whose order and orientation are right by themselves; one process."
    empty(out)
    for series in source.glob("train_images/*/*"):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
        grey = sitk.GetArrayFromImage(sitk.Cast(sitk.IntensityWindowing(reader.Execute(), -150, 250, 0, 255), sitk.sitkUInt8))
        mask = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(source / "segmentations" / f"{series.name}.nii")), "LPS"))
        for z in range(len(grey)):
            cv2.imwrite(str(out / "images" / f"{series.name}_{z}.png"), grey[z])
            cv2.imwrite(str(out / "masks" / f"{series.name}_{z}.png"), mask[z])


WORKER = """
import sys
from pathlib import Path
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.store import write_case
from rsna_seg.ct.cases import ScanCase

scan, mask, out = map(Path, sys.argv[1:])
reason = write_case(ScanCase("p", "s", scan, (mask,)), out, 512, 50, 400, [o.key for o in ORGANS])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))  # Linux
print(reason or int(peak.split()[1]) * 1024 / 1e9)
"""


def peak_memory(folder):
    "Resident memory of a process that prepares one long series as joblib's workers do, GB."
    hu, mask, affine = render(draw_patient(0), 512, 50)
    affine[2, 0] *= 50 / LONG
    scan = write_series(folder / "long", np.tile(hu, (LONG // 50, 1, 1)), affine)
    mask = write_mask(folder / "long.nii", np.tile(mask, (LONG // 50, 1, 1)), affine)
    out = empty(folder / "pairs")
    (out / "parts").mkdir()
    done = subprocess.run([sys.executable, "-c", WORKER, scan, mask, out], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    "Makes the source, measures and reports."
    args, cores = arguments(__doc__), len(os.sched_getaffinity(0))
    rounds = 1 if args.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_source(folder / "kaggle")
        name = f"rsna_seg prepare, {cores} processes"
        ways = {
            name: lambda: ours(folder / "kaggle", folder / "ours", -1),
            "rsna_seg prepare, 1 process": lambda: ours(folder / "kaggle", folder / "ours", 1),
            "pydicom's RLE decoder and cv2.imwrite, 1 process": lambda: notebook_loop(folder / "kaggle", folder / "loop"),
            "SimpleITK and cv2.imwrite, 1 process": lambda: simpleitk(folder / "kaggle", folder / "itk"),
        }  # fmt: skip
        results = speeds(ways, SERIES * SLICES, "slices/s", rounds)
        for path in (folder / "ours" / "images").iterdir():  # the peers did the same work
            _, series, z = path.stem.split("_")
            if z == "0030":
                same = cv2.imread(str(folder / "itk" / "images" / f"{series}_30.png"), cv2.IMREAD_UNCHANGED).astype(int)
                assert np.abs(cv2.imread(str(path), cv2.IMREAD_UNCHANGED) - same).max() <= 1
        ratios = {f"ours/{peer}": results[name]["median"] / results[peer]["median"] for peer in list(ways)[2:]}
        results[f"peak memory of a worker, {LONG} slices"] = summary([peak_memory(folder)], "GB")
    report(__doc__, results, ratios, ("rsna_seg", "pydicom", "pylibjpeg-rle", "opencv-python-headless", "SimpleITK"), rounds, args.json)


if __name__ == "__main__":
    main()
