"How long does a scan take from DICOM on disk to NIfTI and volumes on a CPU, against the usual loop, ONNX Runtime and OpenVINO?"

import argparse
import multiprocessing
import os
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import onnxruntime
import openvino
import pydicom
import segmentation_models_pytorch as smp
import torch
from limits import gflop_of_a_slice, products
from rounds import report, speeds

from rsna_seg.app.commands import Export
from rsna_seg.app.demo import DemoConfig, demo
from rsna_seg.model import has_bf16
from rsna_seg.engines.graph import export_onnx
from rsna_seg.ct.inputs import scan_table
from rsna_seg.app.many import Job, predict_many, predict_one
from rsna_seg.model import ENCODER, Card, load_checkpoint, save_checkpoint
from rsna_seg.ct.organs import CLASSES
from rsna_seg.predict import save_segmentation
from rsna_seg.ct.phantom import draw_patient, render, write_series
from rsna_seg.predict import PredictConfig, Predictor
from rsna_seg.ct.scan import read_scan

SIZE, BATCH, ROUNDS, SCANS = 512, 4, 3, 3
NUMBERS = "bfloat16" if has_bf16() else "float32"  # the fastest that this processor multiplies by itself
OURS, INT8 = "ours", "ours, int8"
PEERS = SNIPPET, ONNX, OPENVINO = "loop over slices, float32", "ONNX Runtime, float32", "OpenVINO, float32"


def arguments():
    "The words of the other benchmarks, a real scan, and weights."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan", type=Path, help="a real CT, resampled to 512 x 512 beside the phantom")
    parser.add_argument("--checkpoint", type=Path, help="weights; if not given, those of the demo, which trains first")
    parser.add_argument("--int8", type=Path, metavar="DATA", help="the weights' own dataset folder, to fit the engine int8 to; the demo's for its weights")
    parser.add_argument("--slices", type=int, default=200, help="of the phantom")
    parser.add_argument("--quick", action="store_true", help="24 slices of each scan and one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return parser.parse_args()


def write_phantom(folder, slices):
    "A synthetic patient whose image is as wide as a scanner's usual field of view, as DICOM."
    hu, _, affine = render(draw_patient(7), size=SIZE, slices=slices)
    write_series(folder, hu, affine)


def write_resampled(path, folder, slices):
    "A real scan with its rows and columns resampled to a square of 512 pixels, as DICOM."
    scan = read_scan(path)
    rows, cols = scan.hu.shape[1:]
    side = max(rows, cols)
    around = [(0, 0), *(((side - n) // 2, side - n - (side - n) // 2) for n in (rows, cols))]
    square = np.pad(scan.hu, around, constant_values=-1000)[: slices or None]
    hu = np.stack([cv2.resize(plane, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for plane in square])
    affine = scan.affine.copy()
    affine[:3, 3] -= affine[:3, 1:3] @ [a[0] for a in around[1:]]
    affine[:3, 1:3] *= side / SIZE
    write_series(folder, hu, affine)


def tutorial(series, out, infer):
    "The same work as a tutorial writes it; `infer` gives the classes of some grey slices."
    slices = sorted((pydicom.dcmread(p) for p in series.iterdir()), key=lambda s: float(s.ImagePositionPatient[2]))
    hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices]).astype(np.float32)
    grey = np.clip((hu + 150) / 400, 0, 1)
    mask = np.concatenate([infer(grey[i : i + BATCH]) for i in range(0, len(grey), BATCH)]).astype(np.uint8)
    spacing = [*map(float, slices[0].PixelSpacing), abs(float(slices[1].ImagePositionPatient[2]) - float(slices[0].ImagePositionPatient[2]))]
    nib.save(nib.Nifti1Image(mask.transpose(2, 1, 0), np.diag([-spacing[1], -spacing[0], spacing[2], 1])), out / "mask.nii.gz")
    return {c.key: float((mask == c.id).sum() * np.prod(spacing) / 1000) for c in CLASSES[1:]}


def snippet(checkpoint):
    "PyTorch as in most tutorials: one slice at a time, float32, the layout it comes in."
    model = smp.Unet(encoder_name=ENCODER, encoder_weights=None, in_channels=3, classes=len(CLASSES))
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    model.eval()

    @torch.no_grad()
    def infer(grey):
        found = []
        for plane in grey:
            image = torch.from_numpy(plane).expand(1, 3, -1, -1) * 2 - 1
            found.append(model(image).argmax(1)[0].numpy())
        return np.stack(found)

    return infer


def runtime(way, checkpoint):
    "A peer's runtime on full frames, with the graph that PyTorch's exporter writes: bytes in, `argmax` out."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(load_checkpoint(checkpoint)[0], path, SIZE)
        if way == ONNX:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            run = lambda image: session.run(["logits"], {"image": image})[0]
        else:
            network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            run = lambda image: network({"image": image})["logits"]
    return lambda grey: torch.from_numpy(run(np.repeat(grey[:, None] * 2 - 1, 3, axis=1))).argmax(1).numpy()


def ours(way, checkpoint):
    "This project."
    predictor = Predictor(checkpoint, PredictConfig("int8" if way == INT8 else "auto", batch_size=BATCH))
    print(predictor, flush=True)
    return lambda series, out: save_segmentation(predictor(series), out, ("nifti", "volumes"))


def peer(way, checkpoint):
    "The tutorial's path with one of the others' networks."
    infer = snippet(checkpoint) if way == SNIPPET else runtime(way, checkpoint)
    return lambda series, out: tutorial(series, out, infer)


_WAY = {}  # of this process


def begin(way, checkpoint):
    "Makes a process ready for one way."
    warnings.filterwarnings("ignore", category=FutureWarning)
    _WAY["run"] = ours(way, checkpoint) if way in (OURS, INT8) else peer(way, checkpoint)


def once(series, out):
    "One scan from disk to disk, in the process of a way."
    _WAY["run"](series, out)


def many(series, out, checkpoint, rounds):
    "Slices a second of some scans after each other in one process, and as `predict_many` overlaps them."
    listed = folder_of(out, "scans") / "scans.csv"
    listed.write_text("path,name\n" + "".join(f"{series},{number}\n" for number in range(SCANS)))
    places = (str(folder_of(out, f"{number}")) for number in count())
    start = lambda: Job((str(checkpoint),), next(places), PredictConfig(batch_size=BATCH), ("nifti", "volumes"))

    def each():
        job, rows = start(), scan_table(listed).to_dict(orient="records")
        for row in rows:
            predict_one(job, row, job.fingerprint())

    ways = {f"{SCANS} scans, one after the other": each, f"{SCANS} scans, overlapped": lambda: predict_many(start(), listed)}
    return speeds(ways, SCANS * len(list(series.iterdir())), "slices/s", rounds)


def folder_of(out, name):
    "A new folder."
    (out / name).mkdir(parents=True)
    return out / name


def demo_weights(folder):
    "Weights that know the five organs, in a few minutes: those of the demo, to be run on 512 pixels."
    demo(DemoConfig(out=folder / "demo"))
    found = next((folder / "demo" / "refined").glob("*.pth"))
    save_checkpoint(load_checkpoint(found)[0], folder / "weights.pth", Card(size=SIZE))
    return folder / "weights.pth"


def agreement(a, b):
    "Share of equal voxels of two masks on disk."
    return float((np.asarray(nib.load(a).dataobj) == np.asarray(nib.load(b).dataobj)).mean())


def about(name, series, limit, speed, checkpoint):
    "Prints seconds a scan, what is left out of it, and the share of the processor's limit."
    predictor, scan = Predictor(checkpoint, PredictConfig("torch", "cpu")), read_scan(series)
    box, ranks = predictor.work_on(scan)
    print(f"{name}: {len(scan.hu)} slices, {len(scan.hu) / speed:.1f} s a scan; decoder on {(box[1] - box[0]) * (box[3] - box[2]) / SIZE**2:.0%}"
          f" of the frame, {len(ranks)} slices; {speed * gflop_of_a_slice() / limit:.0%} of the measured {NUMBERS} matrix-product limit"
          f" ({limit:.0f} GFLOP/s), counting whole frames")  # fmt: skip


def main():
    "Writes the scans, times all ways in turn, each in a process of its own, and reports."
    args = arguments()
    os.environ["TQDM_DISABLE"] = "1"  # in the processes too
    rounds, slices = (1, 24) if args.quick else (ROUNDS, args.slices)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folder, scans = Path(folder), {"phantom": Path(folder) / "phantom"}
        checkpoint, data = (args.checkpoint, args.int8) if args.checkpoint else (demo_weights(folder), folder / "demo" / "data")
        if data:
            Export(checkpoint, folder, formats=(), int8=data).run()
        write_phantom(scans["phantom"], slices)
        if args.scan:
            scans["real CT"] = folder / "real"
            write_resampled(args.scan, scans["real CT"], 24 if args.quick else 0)
        spawn = multiprocessing.get_context("spawn")
        names = (OURS, INT8, *PEERS) if data else (OURS, *PEERS)
        pools = {way: stack.enter_context(ProcessPoolExecutor(1, spawn, begin, (way, checkpoint))) for way in names}
        limit, ratios = products(getattr(torch, NUMBERS), rounds), {}
        results = {f"matrix products, {NUMBERS}": limit}
        for name, series in scans.items():
            out = {way: folder / "out" / name / way for way in pools}
            for place in out.values():
                place.mkdir(parents=True)
            ways = {f"{name}: {way}": lambda way=way, pool=pool: pool.submit(once, series, out[way]).result() for way, pool in pools.items()}
            found = speeds(ways, len(list(series.iterdir())), "slices/s", rounds)
            results |= found
            speed = found[f"{name}: {OURS}"]["median"]
            for own in names[: -len(PEERS)]:
                ratios |= {f"{name}: {own}/{way}": found[f"{name}: {own}"]["median"] / found[f"{name}: {way}"]["median"] for way in PEERS}
            about(name, series, limit["median"], speed, checkpoint)
            for own, way in [(OURS, way) for way in PEERS] + [(own, SNIPPET) for own in names[1 : -len(PEERS)]]:
                print(f"{name}: {agreement(out[own] / 'organs.nii.gz', out[way] / 'mask.nii.gz'):.3%} of the voxels of {own} equal to {way}")
        found = many(scans["phantom"], folder_of(folder, "many"), checkpoint, rounds)
        before, after = (each["median"] for each in found.values())
        results, ratios = results | found, ratios | {"several scans: overlapped/one after the other": after / before}
        report(__doc__, results, ratios, ("rsna_seg", "torch", "onnxruntime", "openvino", "nncf"), rounds, args.json)


if __name__ == "__main__":
    main()
