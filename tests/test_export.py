"Exported graphs give the classes that PyTorch gives, on real CT and in sizes that were not traced; the hub's folder holds the same weights."

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from rsna_seg.engines import export, graph
from rsna_seg.app.commands import parse
from rsna_seg.files import ConfigError
from rsna_seg.model import Card, as_input, build_model, file_sha256, load_checkpoint, save_checkpoint

FILES = {"onnx": "net.onnx", "torchscript": "net.ts.pt", "openvino": "net.xml"}
CARD = Card(size=64, level=40.0, width=350.0, labelled=["liver"], dataset="0123abcd", metrics={"valid_dice": 0.875},
            config={"encoder_weights": "/home/somebody/patients/imagenet.safetensors", "trackers": [], "validate_on": "train",
                    "augment": {"sides": "exchange", "horizontal_flip": 0.5, "vertical_flip": 0.0}})  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "Weights whose BatchNorm has seen something, and whose classes all occur."
    torch.manual_seed(0)
    model = build_model(encoder_weights="none").train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    save_checkpoint(model.eval(), path, CARD)
    return path


@pytest.fixture(scope="module")
def needed():
    for name in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def exported(checkpoint, needed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return folder, export.export_model(checkpoint, folder)


def test_files_card_and_table(checkpoint, exported):
    folder, table = exported
    assert sorted(p.name for p in folder.iterdir()) == ["net.bin", "net.json", "net.onnx", "net.ts.pt", "net.xml"]
    assert json.loads((folder / "net.json").read_text()) == json.loads(checkpoint.with_suffix(".json").read_text())
    assert list(table.index) == list(FILES) and (table.equal >= export.ENOUGH).all()
    assert (folder / "net.bin").stat().st_size > 26e6  # float32


@pytest.mark.parametrize("name", FILES)
def test_real_ct_in_sizes_that_were_not_traced(real_ct, checkpoint, exported, name):
    files = sorted((real_ct / "curvas_png" / "images").iterdir())[::40]
    slices = np.stack([cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files])
    model, run = load_checkpoint(checkpoint)[0], export.FORMATS[name].load(exported[0] / FILES[name])
    assert slices.shape == (3, 512, 512)
    for images in (slices[:2], slices[:1, 128:384, 64:448], slices[:, 128:384, 64:448]):
        image = as_input(torch.from_numpy(np.ascontiguousarray(images))).contiguous()
        with torch.inference_mode():
            wanted = model(image).numpy()
        logits = run(image.numpy())
        assert logits.shape == (len(images), 6, *images.shape[1:]) and logits.dtype == np.float32
        assert (logits.argmax(1) == wanted.argmax(1)).mean() >= 0.9995
        assert abs(logits - wanted).max() < 1e-3 * abs(wanted).max()
        assert len(np.unique(wanted.argmax(1))) > 2


def test_contract_of_the_graphs(exported):
    import onnx
    import onnxruntime
    import openvino

    folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "net.onnx")
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, "rows", "cols"])
    assert (logits.name, logits.shape) == ("logits", ["batch", 6, "rows", "cols"])
    onnx.checker.check_model(str(folder / "net.onnx"), full_check=True)
    network = openvino.Core().read_model(folder / "net.xml")
    assert str(network.input("image").partial_shape) == "[?,3,?,?]" and network.output("logits").partial_shape[1] == 6


@pytest.mark.slow
def test_nothing_is_printed(checkpoint, needed, tmp_path):
    code = f"""
from rsna_seg.engines.export import export_openvino, export_torchscript
from rsna_seg.engines.graph import export_onnx
from rsna_seg.model import load_checkpoint
model, _ = load_checkpoint({str(checkpoint)!r})
model.train()
export_onnx(model, {str(tmp_path / "a.onnx")!r}, 64)
export_torchscript(model, {str(tmp_path / "a.ts.pt")!r}, 64)
export_openvino(model, {str(tmp_path / "a.xml")!r}, 64)
assert model.training
"""
    done = subprocess.run([sys.executable, "-W", "always::FutureWarning:torch", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.onnx", "a.ts.pt", "a.xml"]


def test_a_graph_that_differs_is_not_kept(checkpoint, tmp_path, monkeypatch):
    wrong = lambda path: lambda image: np.zeros((len(image), 6, *image.shape[2:]), np.float32)
    form = replace(export.FORMATS["torchscript"], load=wrong)
    monkeypatch.setitem(export.FORMATS, "torchscript", form)
    with pytest.raises(ConfigError, match="was not written"):
        export.export_model(checkpoint, tmp_path / "out", ["torchscript"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_write_that_fails_leaves_nothing(checkpoint, needed, tmp_path, monkeypatch):
    import openvino

    def half(network, path, **_):
        path.write_text("<net")
        path.with_suffix(".bin").write_bytes(b"0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(openvino, "save_model", half)
    with pytest.raises(OSError):
        export.export_openvino(load_checkpoint(checkpoint)[0], tmp_path / "net.xml", 64)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_told(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no format 'coreml'"):
        export.export_model(checkpoint, tmp_path, ["coreml"])
    for images in (np.zeros((2, 100, 64), np.uint8), np.zeros((2, 64, 64)), np.zeros((0, 64, 64), np.uint8)):
        with pytest.raises(ConfigError, match="multiples of 32"):
            export.export_model(checkpoint, tmp_path, ["torchscript"], images)
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install onnx onnxruntime openvino"):
        export.export_model(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_neighbours_are_compared_too(tmp_path):
    save_checkpoint(build_model(encoder_weights="none"), tmp_path / "net.pth", Card(size=64, channels="neighbours"))
    table = export.export_model(tmp_path / "net.pth", tmp_path / "out", ["torchscript"])
    assert table.loc["torchscript", "equal"] == 1


def test_the_command(checkpoint, tmp_path, capsys):
    "Writes what is asked for and nothing else, says how alike it is, and the hub's folder is a checkpoint."
    parse("export", [checkpoint, tmp_path, "--formats", "torchscript", "huggingface"]).run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["huggingface", f"{checkpoint.stem}.json", f"{checkpoint.stem}.ts.pt"]
    assert "torchscript" in capsys.readouterr().out
    assert same(load_checkpoint(tmp_path / "huggingface" / "model.safetensors")[0], checkpoint)


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "abdomen"
    export.save_pretrained(checkpoint, folder, "somebody/abdomen")
    return folder


def same(model, checkpoint):
    state = load_checkpoint(checkpoint)[0].state_dict()
    return list(model.state_dict()) == list(state) and all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_round_trip(checkpoint, hub):
    model, card = export.from_pretrained(hub)
    assert same(model, checkpoint) and not model.training
    assert card.sha256 == file_sha256(hub / "model.safetensors")
    assert card.config == {**CARD.config, "encoder_weights": "imagenet.safetensors"}
    assert (card.size, card.level, card.width, card.labelled, card.dataset, card.metrics) == (64, 40, 350, ["liver"], "0123abcd", CARD.metrics)


def test_plain_smp_loads_the_folder(checkpoint, hub):
    assert same(smp.from_pretrained(str(hub)), checkpoint)


def test_the_page(hub):
    from huggingface_hub import ModelCard

    page = ModelCard.load(hub / "README.md")
    assert (page.data.license, page.data.library_name, page.data.pipeline_tag) == ("apache-2.0", "segmentation-models-pytorch", "image-segmentation")
    for part in ("Not a medical device", "0123abcd", "0.8750", "#EE6677", 'from_pretrained("somebody/abdomen")', "-135..215", "trained on: they say nothing",
                 "organs in pairs exchanged their names", "| 2 | Spleen | `#AA3377` | no |", "Outlines liver in"):  # fmt: skip
        assert part in page.text, part
    assert "/home/somebody" not in page.content


def test_other_folders_and_no_network(hub, tmp_path):
    (tmp_path / "config.json").write_text('{"encoder_name": "resnet34"}')
    with pytest.raises(ConfigError, match="model.safetensors does not exist; give a checkpoint"):
        export.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be downloaded from the hub"):
        export.from_pretrained("somebody/abdomen")  # HF_HUB_OFFLINE is set in all tests
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        export.from_pretrained("not/a/name at all")


def test_up_and_down_with_a_stand_in_for_the_hub(checkpoint, tmp_path, monkeypatch):
    "No network: a folder plays the hub, so this shows what is sent and asked for, not that the hub takes it."
    sent = {}

    class Hub:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, name, private, exist_ok):
            sent["made"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path):
            import shutil

            shutil.copytree(folder_path, tmp_path / repo_id)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(name, revision, allow_patterns):
        sent["asked"] = (name, revision, sorted(allow_patterns))
        return str(tmp_path / name)

    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(export, "snapshot_download", download)
    assert export.push_to_hub(checkpoint, "somebody/abdomen", token="t") == "https://hub/somebody/abdomen/commit/1"
    assert sorted(p.name for p in (tmp_path / "somebody" / "abdomen").iterdir()) == ["README.md", "config.json", "model.json", "model.safetensors"]
    model, _ = export.from_pretrained("somebody/abdomen", revision="v1")
    assert same(model, checkpoint)
    assert sent == {"token": "t", "made": ("somebody/abdomen", True, True), "asked": ("somebody/abdomen", "v1", ["model.*"])}


def test_a_hub_out_of_reach(checkpoint):
    with pytest.raises(ConfigError, match="cannot be uploaded as somebody/abdomen"):
        export.push_to_hub(checkpoint, "somebody/abdomen")
