"How long does a scan take from DICOM on disk to NIfTI and volumes on a CPU, against the usual loop, ONNX Runtime and OpenVINO?"

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
from rounds import report, speeds, summary, words
from torch.nn.functional import one_hot, unfold

from rsna_seg.ct.dicom import read_scan
from rsna_seg.ct.organs import ALL_ORGANS, CLASSES, ORGANS
from rsna_seg.ct.phantom import draw_patient, render, write_series
from rsna_seg.ct.scan import window
from rsna_seg.engines.graph import export_onnx
from rsna_seg.model import ENCODER, Card, as_input, build_model, has_bf16, load_checkpoint, save_checkpoint
from rsna_seg.predict import PredictConfig, Predictor, plan_work, save_segmentation

SIZE, BATCH, ROUNDS = 512, 4, 5  # pixels of the usual network; slices at once
SAME = 0.999  # share of voxels with the same class; with less, the ways did not do the same work
NUMBERS = "bfloat16" if has_bf16() else "float32"  # the fastest that this processor multiplies by itself
OURS = "ours"
PEERS = SNIPPET, ONNX, OPENVINO = "loop over slices, float32", "ONNX Runtime, float32", "OpenVINO, float32"


def arguments():
    "The words of all benchmarks, a real scan, and weights with their card."
    parser = words(__doc__)
    parser.add_argument("--scan", type=Path, help="a real CT, resampled to the network's size, beside the phantom")
    parser.add_argument("--slices", type=int, default=24, help="of each scan; its middle ones if it has more")
    parser.add_argument("--checkpoint", type=Path, help="weights; if not given, some that are fitted to a phantom at 512 pixels")
    args = parser.parse_args()
    if args.checkpoint:
        card = load_checkpoint(args.checkpoint)[1]
        if card.channels != "copies" or list(card.labelled) != list(ALL_ORGANS):
            parser.error(f"{args.checkpoint} sees neighbouring slices or knows only some organs, as none of the peers does")
    return args


def write_phantom(folder, size, slices):
    "A synthetic patient whose image is as wide as a scanner's usual field of view, as DICOM."
    hu, _, affine = render(draw_patient(7), size=size, slices=slices)
    write_series(folder, hu, affine)


def write_resampled(path, folder, size, slices):
    "Slices from a real scan's middle, with rows and columns resampled to the network's square, as DICOM."
    scan = read_scan(path)
    rows, cols = scan.hu.shape[1:]
    side, first = max(rows, cols), max(0, (len(scan.hu) - slices) // 2)
    around = [(0, 0), *(((side - n) // 2, side - n - (side - n) // 2) for n in (rows, cols))]
    square = np.pad(scan.hu[first : first + slices], around, constant_values=-1000)
    hu = np.stack([cv2.resize(plane, (size, size), interpolation=cv2.INTER_CUBIC) for plane in square])
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (first, *(-a[0] for a in around[1:]))
    affine[:3, 1:3] *= side / size
    write_series(folder, hu, affine)


def tutorial(series, out, infer, card):
    "The same work as a tutorial writes it; `infer` gives the classes of some grey slices."
    slices = sorted((pydicom.dcmread(p) for p in series.iterdir()), key=lambda s: float(s.ImagePositionPatient[2]))
    hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices]).astype(np.float32)
    grey = np.clip((hu - card.level) / card.width + 0.5, 0, 1)
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
    "A peer's runtime on full frames and our number of threads, with the graph that PyTorch's exporter writes: bytes in, `argmax` out."
    threads = torch.get_num_threads()
    model, card = load_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, card.size)
        if way == ONNX:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            run = lambda image: session.run(["logits"], {"image": image})[0]
        else:
            network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
            run = lambda image: network({"image": image})["logits"]
    return lambda grey: torch.from_numpy(run(np.repeat(grey[:, None] * 2 - 1, 3, axis=1))).argmax(1).numpy()


def ours(checkpoint):
    "This project."
    predictor = Predictor(checkpoint, PredictConfig(batch_size=BATCH))
    print(predictor, flush=True)
    return lambda series, out: save_segmentation(predictor(series), out, ("nifti", "volumes"))


def peer(way, checkpoint):
    "The tutorial's path with one of the others' networks."
    infer, card = snippet(checkpoint) if way == SNIPPET else runtime(way, checkpoint), load_checkpoint(checkpoint)[1]
    return lambda series, out: tutorial(series, out, infer, card)


_WAY = {}  # of this process


def begin(way, checkpoint):
    "Makes a process ready for one way."
    warnings.filterwarnings("ignore", category=FutureWarning)
    _WAY["run"] = ours(checkpoint) if way == OURS else peer(way, checkpoint)


def once(series, out):
    "One scan from disk to disk, in the process of a way."
    _WAY["run"](series, out)


def fitted_weights(path):
    "A checkpoint of random weights, whose last layer is fitted to a phantom by least squares: it finds some of a liver."
    torch.manual_seed(1)
    model, (hu, mask, _) = build_model(encoder_weights="none").train(), render(draw_patient(1), SIZE, 12)
    images, classes = as_input(torch.from_numpy(window(hu[3::3]))), torch.from_numpy(mask[3::3]).long().flatten(1)
    with torch.no_grad():
        model(images)  # so that BatchNorm has seen something
        features = model.eval().decoder(model.encoder(images))
        some = torch.randperm(SIZE**2)[:20_000]  # pixels of each slice
        around = torch.cat([unfold(plane, 3, padding=1)[:, some].T for plane in features]).double()
        wanted = 20.0 * one_hot(classes[:, some].flatten(), len(CLASSES)).double()
        weights = torch.linalg.lstsq(torch.cat([around, torch.ones(len(around), 1)], 1), wanted).solution
        head = model.segmentation_head[0]
        head.weight.copy_(weights[:-1].T.reshape(head.weight.shape))
        head.bias.copy_(weights[-1])
    save_checkpoint(model, path, Card(size=SIZE))
    return path


def same_voxels(a, b):
    "Share of equal voxels of two masks on disk; ends the run where it is too small to compare times, or both are empty."
    masks = [np.asarray(nib.load(path).dataobj) for path in (a, b)]
    if not any(mask.any() for mask in masks):
        raise SystemExit(f"{a} and {b} hold no organ, which shows nothing; give other weights with --checkpoint.")
    share = float((masks[0] == masks[1]).mean())
    if share < SAME:
        raise SystemExit(f"Unequal work: only {share:.3%} of the voxels of {a} and {b} are equal, so their times cannot be compared.")
    return share


def about(name, series, limit, speed, card):
    "Prints seconds a scan, what is left out of it, and the share of the processor's limit."
    scan, work = read_scan(series), gflop_of_a_slice() * (card.size / SIZE) ** 2
    box, ranks = plan_work(scan, card)
    decoder = (box[1] - box[0]) * (box[3] - box[2]) / card.size**2
    print(f"{name}: {len(scan.hu)} slices, {len(scan.hu) / speed:.1f} s a scan; decoder on {decoder:.0%} of the frame, {len(ranks)} slices;"
          f" {speed * work / limit:.0%} of the measured {NUMBERS} matrix-product limit ({limit:.0f} GFLOP/s), counting whole frames")  # fmt: skip


def main():
    "Writes the scans, times all ways in turn, each in a process of its own, and reports."
    args = arguments()
    os.environ["TQDM_DISABLE"] = "1"  # in the processes too
    rounds = 1 if args.quick else ROUNDS
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folder, scans = Path(folder), {"phantom": Path(folder) / "phantom"}
        checkpoint = args.checkpoint or fitted_weights(folder / "weights.pth")
        card = load_checkpoint(checkpoint)[1]
        write_phantom(scans["phantom"], card.size, args.slices)
        if args.scan:
            scans["real CT"] = folder / "real"
            write_resampled(args.scan, scans["real CT"], card.size, args.slices)
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
            about(name, series, limit["median"], speed, card)
            for way in PEERS:
                share = same_voxels(out[OURS] / "organs.nii.gz", out[way] / "mask.nii.gz")
                results[f"{name}: same voxels as {way}"] = summary([100 * share], "%")
        report(__doc__, results, ratios, ("rsna_seg", "torch", "onnxruntime", "openvino"), rounds, args.json)


if __name__ == "__main__":
    main()
