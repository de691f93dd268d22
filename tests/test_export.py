"""Exported files: they compute what the model does, say what they are, and are refused where they do not."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from conam_zoo.data.dataset import image_hashes
from conam_zoo.data.load import find_sources
from conam_zoo.deploy.export import calibration_images, export
from conam_zoo.deploy.runtime import OnnxClassifier
from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import export_model
from conam_zoo.training.evaluate import TRAINED_ON

MEAN, STD = (0.4914, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)


@pytest.fixture(scope="module")
def net() -> StagedClassifier:
    torch.manual_seed(0)
    model = timm.create_model("resnet20_conam.cifar10").eval()
    with torch.no_grad():  # statistics as after a training, so that folded norms matter
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).float().permute(0, 3, 1, 2).contiguous()


def run(path: Path, batch: torch.Tensor) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": batch.numpy()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, net: StagedClassifier) -> Path:
    """``plain.onnx`` with confidences, and ``pixels.onnx``."""
    place = tmp_path_factory.mktemp("exported")
    export(net, place / "plain.onnx", confidence=True, facts={"name": "resnet20_conam.cifar10", "top1_percent": 12.5})
    export(net, place / "pixels.onnx", pixels=True)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 11])
def test_the_file_gives_the_models_logits_and_confidences_at_any_batch_size(
    folder: Path, net: StagedClassifier, count: int
) -> None:
    batch = normalised(images(count))
    logits, *maps = run(folder / "plain.onnx", batch)
    with torch.no_grad():
        np.testing.assert_allclose(logits, net(batch).numpy(), rtol=1e-3, atol=1e-4)
    assert [m.shape for m in maps] == [(count, 4, 4)] * 3
    for site in maps:
        np.testing.assert_allclose(site.sum((1, 2)), 1, rtol=1e-5)
    assert not np.allclose(logits.sum(1), 1), "logits, not a softmax"


@pytest.mark.slow
def test_pixels_are_normalised_inside(folder: Path, net: StagedClassifier) -> None:
    (logits,) = run(folder / "pixels.onnx", images(4))
    with torch.no_grad():
        np.testing.assert_allclose(logits, net(normalised(images(4))).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_file_says_what_it_is(folder: Path) -> None:
    proto = onnx.load(folder / "plain.onnx")
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["name"] == "resnet20_conam.cifar10"
    assert facts["architecture"] == "resnet20_conam"
    assert json.loads(facts["classes"])[3] == "cat"
    assert json.loads(facts["top1_percent"]) == 12.5
    assert facts["layout"] == "NCHW float32"
    assert [output.name for output in proto.graph.output] == [
        "logits",
        "confidence.layer1.0.attn",
        "confidence.layer2.0.attn",
        "confidence.layer3.0.attn",
    ]
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert [p.name for p in folder.iterdir() if p.name not in ("plain.onnx", "pixels.onnx")] == []


@pytest.mark.slow
@pytest.mark.parametrize("file", ["plain.onnx", "pixels.onnx"])
def test_it_can_be_used_like_a_model(folder: Path, net: StagedClassifier, file: str) -> None:
    model = OnnxClassifier(folder / file)
    batch = normalised(images(5))
    with torch.no_grad():
        torch.testing.assert_close(model(batch), net(batch), rtol=1e-3, atol=1e-3)
    assert model.num_classes == 10
    assert model.pretrained_cfg["label_names"][:2] == ("airplane", "automobile")


@pytest.mark.slow
def test_torch_export_gives_the_same(net: StagedClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export(net, "~/net.pt2").path == tmp_path / "net.pt2"
    batch = normalised(images(6))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(batch)[0], net(batch))


@pytest.mark.slow
def test_int8_has_quantised_convolutions_and_about_the_same_logits(net: StagedClassifier, tmp_path: Path) -> None:
    pixels = images(60)
    export(net, tmp_path / "net.onnx", calibration=pixels, facts={"name": "a net", "top1_percent": 12.5})
    proto = onnx.load(tmp_path / "net.onnx")
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == 21
    assert kinds.count("DequantizeLinear") > 2 * 21
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert (facts["precision"], facts["name"]) == ("int8", "a net")
    assert "top1_percent" not in facts  # the float32 net's
    batch = normalised(pixels)
    with torch.no_grad():
        wanted = net(batch)
    found = torch.from_numpy(run(tmp_path / "net.onnx", batch)[0])
    assert (found - wanted).abs().mean() < 0.1 * wanted.std()
    assert not torch.equal(found, wanted)


@pytest.mark.slow
def test_an_int8_file_that_says_something_else_is_not_written(
    net: StagedClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn_round(path: Path, pixels: torch.Tensor) -> None:
        proto = onnx.load(str(path))
        for node in proto.graph.node:
            node.output[:] = ["before" if name == "logits" else name for name in node.output]
        proto.graph.node.append(onnx.helper.make_node("Neg", ["before"], ["logits"]))
        onnx.save(proto, str(path))

    (tmp_path / "net.onnx").write_bytes(b"before")
    monkeypatch.setattr("conam_zoo.deploy.export._quantize", turn_round)
    with pytest.raises(UserError, match=r"after quantisation it gives 0 of \d+ training images the class"):
        export(net, tmp_path / "net.onnx", calibration=images(60))
    assert (tmp_path / "net.onnx").read_bytes() == b"before"


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(
    net: StagedClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"before")
    session = onnxruntime.InferenceSession

    class Wrong:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.right = session(*args, **kwargs)

        def run(self, *args: object) -> list[np.ndarray]:
            return [output + 0.1 for output in self.right.run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(UserError, match=r"its logits differs from PyTorch's by 0\.1 on a batch of 1"):
        export(net, tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == b"before"


@pytest.mark.slow
def test_the_command_exports_a_folder_and_evaluates_and_predicts_with_the_file(
    net: StagedClassifier, tmp_path: Path, conam
) -> None:
    export_model(net, tmp_path / "final", tag=None)
    data = tmp_path / "data"
    data.mkdir()
    labels = np.arange(40) % 10
    for split in ("train", "test"):
        np.save(data / f"{split}_images.npy", images(40).numpy())
        np.save(data / f"{split}_labels.npy", labels)
    (data / "classes.txt").write_text("\n".join(net.pretrained_cfg["label_names"]) + "\n")
    hashes = image_hashes(find_sources(data)["test"], 32)
    np.save(tmp_path / TRAINED_ON, np.sort(hashes)[:30])
    (tmp_path / "run.json").write_text("{}")
    target = tmp_path / "net.onnx"
    code, out, err = conam("export", f"local-dir:{tmp_path / 'final'}", "--output", target, "--int8", "--data", data)
    assert code == 0, err
    assert "calibrated on 40 images" in out
    assert "top-1 on 40 test images" in out
    assert "The net was trained on 30 of these 40 images" in out  # of which its run folder tells
    code, out, err = conam("evaluate", target, "--data", data, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["images"] == 40
    picture = Path(__file__).parents[1] / "examples" / "photos" / "cat.jpg"
    code, out, err = conam("predict", target, picture, "--json", "-")
    assert code == 0, err
    best = json.loads(out)[0]["top"][0]
    assert best["class"] in net.pretrained_cfg["label_names"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "net.txt"], "its suffix must be .onnx or .pt2"),
        (["--output", "net.onnx", "--int8"], "say where they are with --data"),
        (["--output", "net.onnx", "--data", "x"], "add --int8"),
        (["--output", "net.pt2", "--int8", "--data", "DATA"], "only .onnx files are quantised"),
        (["--output", "net.onx", "--int8", "--data", "nowhere"], "its suffix must be .onnx or .pt2"),
        (["--output", "net.onnx", "--opset", "99"], "the installed onnx knows them up to"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    net: StagedClassifier, tmp_path: Path, conam, arguments: list[str], sentence: str
) -> None:
    export_model(net, tmp_path / "final", tag=None)
    np.save(tmp_path / "train_images.npy", images(20).numpy())
    np.save(tmp_path / "train_labels.npy", np.arange(20) % 10)
    (tmp_path / "classes.txt").write_text("\n".join(net.pretrained_cfg["label_names"]) + "\n")
    words = [str(tmp_path) if word == "DATA" else word for word in arguments]
    words[1] = str(tmp_path / words[1])
    code, _, err = conam("export", f"local-dir:{tmp_path / 'final'}", *words)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / arguments[1]).exists()


def test_an_export_does_not_overwrite_what_it_reads(net: StagedClassifier, tmp_path: Path, conam) -> None:
    export_model(net, tmp_path / "final", tag=None)
    weights = tmp_path / "final" / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "net.onnx").symlink_to(weights)
    code, _, err = conam("export", f"local-dir:{tmp_path / 'final'}", "--output", tmp_path / "net.onnx")
    assert code == 2
    assert "net.onnx cannot be written: it is the input" in err
    assert weights.read_bytes() == before


@pytest.mark.slow
def test_the_file_names_the_hash_of_the_weights_that_were_read(net: StagedClassifier, tmp_path: Path, conam) -> None:
    sha256 = export_model(net, tmp_path / "final", tag=None)
    code, _, err = conam("export", f"local-dir:{tmp_path / 'final'}", "--output", tmp_path / "net.onnx")
    assert code == 0, err
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert (facts["name"], facts["sha256"]) == ("resnet20_conam", sha256)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (b"not onnx", "is not an ONNX file"),
        ("format", "was not written by 'conam export'"),
        ("std", "is damaged"),
        ("classes", "is damaged"),
        ("interpolation", "is damaged"),
        ("crop_pct", "is damaged"),
        ("num_classes", "is damaged"),
    ],
)
def test_a_file_that_is_no_export_is_refused(folder: Path, tmp_path: Path, change: bytes | str, sentence: str) -> None:
    target = tmp_path / "net.onnx"
    if isinstance(change, bytes):
        target.write_bytes(change)
    else:
        proto = onnx.load(folder / "plain.onnx")
        for entry in proto.metadata_props:
            if entry.key == change:
                entry.value = "0" if change == "num_classes" else "[0]"
        onnx.save(proto, target)
    with pytest.raises(UserError, match=sentence):
        OnnxClassifier(target)


def test_calibration_images_have_the_size_of_the_net(small_data: Path) -> None:
    net = timm.create_model("resnet20_conam.cifar10", pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    assert calibration_images(net, small_data, "cifar10").shape[1:] == (16, 16, 3)


@pytest.mark.slow
def test_a_file_says_how_many_classes_a_new_head_has_and_how_pictures_are_cropped(tmp_path: Path) -> None:
    overlay = {"crop_mode": "squash"}
    net = timm.create_model("resnet20_conam.cifar10", num_classes=3, pretrained_cfg_overlay=overlay).eval()
    export(net, tmp_path / "net.onnx")
    found = OnnxClassifier(tmp_path / "net.onnx")
    assert (found.num_classes, found.pretrained_cfg["label_names"]) == (3, ())
    assert found.pretrained_cfg["crop_mode"] == "squash"
