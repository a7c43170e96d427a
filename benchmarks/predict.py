"How long does a scan take from DICOM on disk to NIfTI and volumes on a CPU, against the usual loop, ONNX Runtime and OpenVINO?"

import argparse
import multiprocessing
import os
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
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

from rsna_seg.app.demo import example
from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.organs import ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_series
from rsna_seg.engines.graph import export_onnx
from rsna_seg.model import ENCODER, Card, has_bf16, load_checkpoint, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor, plan_work, save_segmentation

SIZE, BATCH, ROUNDS = 512, 4, 3
NUMBERS = "bfloat16" if has_bf16() else "float32"  # the fastest that this processor multiplies by itself
OURS = "ours"
PEERS = SNIPPET, ONNX, OPENVINO = "loop over slices, float32", "ONNX Runtime, float32", "OpenVINO, float32"


def arguments():
    "The words of the other benchmarks, a real scan, and weights."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan", type=Path, help="a real CT, resampled to 512 x 512 beside the phantom")
    parser.add_argument("--checkpoint", type=Path, help="weights; if not given, those of the example")
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
    return {c.key: float((mask == c.id).sum() * np.prod(spacing) / 1000) for c in ORGANS}


def snippet(checkpoint):
    "PyTorch as in most tutorials: one slice at a time, float32, the layout it comes in."
    model = smp.Unet(encoder_name=ENCODER, encoder_weights=None, in_channels=3, classes=len(ORGANS) + 1)
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


def ours(checkpoint):
    "This project."
    predictor = Predictor(checkpoint, PredictConfig(batch_size=BATCH))
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
    _WAY["run"] = ours(checkpoint) if way == OURS else peer(way, checkpoint)


def once(series, out):
    "One scan from disk to disk, in the process of a way."
    _WAY["run"](series, out)


def example_weights(folder):
    "Weights that know the organs: those of the example, to be run on 512 pixels."
    save_checkpoint(load_checkpoint(example().checkpoint)[0], folder / "weights.pth", Card(size=SIZE))
    return folder / "weights.pth"


def agreement(a, b):
    "Share of equal voxels of two masks on disk."
    return float((np.asarray(nib.load(a).dataobj) == np.asarray(nib.load(b).dataobj)).mean())


def about(name, series, limit, speed, checkpoint):
    "Prints seconds a scan, what is left out of it, and the share of the processor's limit."
    scan = read_scan(series)
    box, ranks = plan_work(scan(checkpoint))
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
        checkpoint = args.checkpoint or example_weights(folder)
        write_phantom(scans["phantom"], slices)
        if args.scan:
            scans["real CT"] = folder / "real"
            write_resampled(args.scan, scans["real CT"], 24 if args.quick else 0)
        spawn = multiprocessing.get_context("spawn")
        pools = {way: stack.enter_context(ProcessPoolExecutor(1, spawn, begin, (way, checkpoint))) for way in (OURS, *PEERS)}
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
            ratios |= {f"{name}: {OURS}/{way}": speed / found[f"{name}: {way}"]["median"] for way in PEERS}
            about(name, series, limit["median"], speed, checkpoint)
            for way in PEERS:
                print(f"{name}: {agreement(out[OURS] / 'organs.nii.gz', out[way] / 'mask.nii.gz'):.3%} of the voxels equal to {way}")
        report(__doc__, results, ratios, ("rsna_seg", "torch", "onnxruntime", "openvino"), rounds, args.json)


if __name__ == "__main__":
    main()
