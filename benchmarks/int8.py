"Does the network in eight bits pay on this processor: how much faster is it than the other engines, and what does it cost in Dice?"

import os
import tempfile
from functools import partial
from pathlib import Path

os.environ["NNCF_CI"] = "1"  # no reports to Intel; read when nncf is imported

import nncf
import numpy as np
import onnxruntime
import openvino
import pandas as pd
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rounds import arguments, report, speeds, summary

from rsna_seg.augment import AugmentConfig
from rsna_seg.data import PrepareConfig, SliceDataset, prepare
from rsna_seg.engines.engines import OpenvinoEngine, has_bf16
from rsna_seg.engines.export import export_int8, export_onnx, export_openvino
from rsna_seg.scoring.metrics import volume_dice
from rsna_seg.model import as_input, load_checkpoint
from rsna_seg.ct.phantom import draw_patient, render, write_kaggle
from rsna_seg.ct.scan import window
from rsna_seg.train import TrainConfig, train

F32 = "OpenVINO, float32"
SIZE, BATCH = 512, 4  # of the timing
LEARN, PATIENTS, SLICES, EPOCHS, CALIBRATION = 128, 12, 40, 8, 64
UNSEEN = range(7000, 7016)  # patients; that the decoder alone is quantised was chosen on others
NUMBERS = "bfloat16" if has_bf16() else "float32"  # the fastest floats of this processor
INT8, OURS = f"OpenVINO, int8 decoder, {NUMBERS} encoder", f"OpenVINO, {NUMBERS}, upsampling folded"
FEWER = 0.002  # Dice that eight bits may cost


def learn(folder):
    "A checkpoint of a minute's training on phantoms, and some of its training slices."
    write_kaggle(folder / "kaggle", PATIENTS, size=2 * LEARN, slices=SLICES)
    data = prepare(folder / "kaggle", folder / "data", config=PrepareConfig(size=LEARN, jobs=1))
    augment = AugmentConfig(horizontal_flip=0, vertical_flip=0, rotate_limit=15)
    config = TrainConfig(size=LEARN, batch_size=16, accumulation=1, epochs=EPOCHS, lr=3e-3, encoder_weights="none", augment=augment, workers=0)
    checkpoint = train(folder / "data", folder / "run", config).checkpoint
    slices = SliceDataset(data, "train")
    return checkpoint, np.stack([slices[i][0].numpy() for i in np.linspace(0, len(slices) - 1, CALIBRATION).round().astype(int)])


class Slices(CalibrationDataReader):
    "The training slices, one by one, as ONNX Runtime asks for them."

    def __init__(self, images):
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"image": image}


def openvino_engine(network, precision):
    "Logits of an OpenVINO network, of whole frames if it takes a box."
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    boxed = len(compiled.inputs) > 1

    def run(image):
        box = {"box": np.array([0, image.shape[-2], 0, image.shape[-1]])} if boxed else {}
        return compiled({"image": image, **box})["logits"]

    return run


def onnx_engine(path):
    "Logits of an ONNX file."
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def torch_engine(model):
    "Logits of the network in bfloat16."

    @torch.inference_mode()
    def run(image):
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.from_numpy(image).contiguous(memory_format=torch.channels_last)).float().numpy()

    return run


def ours(engine):
    "Logits of the predictor's engine, which is given bytes."
    return lambda image: engine(torch.from_numpy(np.rint((image[:, 0] + 1) * 127.5).astype(np.uint8))).numpy()


def engines(checkpoint, calibration, folder):
    "A function from images to logits for each engine."
    model, _ = load_checkpoint(checkpoint)
    export_onnx(model, folder / "net.onnx")
    export_openvino(model, folder / "net.xml")
    export_int8(model, folder / "decoder.xml", calibration)
    float32, decoder = (openvino.Core().read_model(folder / name) for name in ("net.xml", "decoder.xml"))
    slices = [as_input(torch.from_numpy(each[None])).numpy() for each in calibration]
    eight = nncf.quantize(float32, nncf.Dataset(slices), subset_size=len(slices), preset=nncf.QuantizationPreset.MIXED)
    quant_pre_process(folder / "net.onnx", folder / "ready.onnx", skip_symbolic_shape=True)
    quantize_static(folder / "ready.onnx", folder / "int8.onnx", Slices(slices), quant_format=QuantFormat.QDQ, per_channel=True)
    in_bf16 = {"OpenVINO, bfloat16": openvino_engine(float32, "bf16"), "torch, bfloat16, channels last": torch_engine(model)} if has_bf16() else {}
    return {
        F32: openvino_engine(float32, "f32"),
        "ONNX Runtime, float32": onnx_engine(folder / "net.onnx"),
        **in_bf16,
        OURS: ours(OpenvinoEngine(model)),
        INT8: openvino_engine(decoder, "bf16" if has_bf16() else "f32"),
        "OpenVINO, int8": openvino_engine(eight, "f32"),
        "ONNX Runtime, int8": onnx_engine(folder / "int8.onnx"),
    }


def classes(engine, images):
    "The class of each pixel, some slices at a time."
    batches = np.split(images, range(16, len(images), 16))
    return np.concatenate([engine(as_input(torch.from_numpy(b)).contiguous().numpy()).argmax(1) for b in batches]).astype(np.uint8)


def quality(ways):
    "Mean volume Dice of each engine on unseen patients, a row a patient; share of pixels with the class that float32 gives."
    dice, equal = {name: [] for name in ways}, {name: [] for name in ways}
    for seed in UNSEEN:
        hu, mask, _ = render(draw_patient(seed), size=LEARN, slices=SLICES)
        found = {name: classes(engine, window(hu)) for name, engine in ways.items()}
        for name, each in found.items():
            dice[name].append(np.nanmean(list(volume_dice(each, mask).values())))
            equal[name].append((each == found[F32]).mean())
    return pd.DataFrame(dice), pd.DataFrame(equal)


def main():
    "Trains, quantises, measures and reports."
    args = arguments(__doc__)
    rounds = 3 if args.quick else 9
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ways = engines(*learn(folder), folder)
        dice, equal = quality(ways)
    grey = window(render(draw_patient(1), size=SIZE, slices=12)[0])[4 : 4 + BATCH]
    image = as_input(torch.from_numpy(grey)).contiguous().numpy()
    results = speeds({name: partial(engine, image) for name, engine in ways.items()}, BATCH, "slices/s", rounds)
    ratios = {f"{INT8}/{name}": results[INT8]["median"] / results[name]["median"] for name in ways if name != INT8}
    ratios[f"mean Dice, {INT8}/{F32}"] = dice[INT8].mean() / dice[F32].mean()
    fell = dice[F32].mean() - dice[INT8].mean()
    for name in ways:
        results[f"{name}: Dice"] = summary(dice[name].tolist(), "0..1, of patients")
    for name in ways:
        results[f"{name}: pixels as in float32"] = summary((100 * equal[name]).tolist(), "%, of patients")
    report(__doc__, results, ratios, ("rsna_seg", "torch", "openvino", "nncf", "onnxruntime"), rounds, args.json)
    print(f"Mean Dice: {', '.join(f'{name} {value:.4f}' for name, value in dice.mean().items())}.")
    others = max(results[name]["median"] for name in ways if "int8" not in name)
    keep = fell < FEWER and results[INT8]["median"] > others
    print(f"{INT8}: costs {fell:.4f} Dice, and has {results[INT8]['median'] / others:.2f} times the speed of the fastest engine without int8: "
          f"{'worth it here' if keep else 'not worth it here'} (wanted: less than {FEWER} Dice, and faster).")  # fmt: skip


if __name__ == "__main__":
    main()
