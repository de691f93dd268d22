"""Other libraries take the nets: the lines of docs/clients.md, run as they stand, and what they have to give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import PYTHON_BLOCK, Command
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config
from torch import Tensor, nn

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.data import read_split

pytestmark = pytest.mark.slow

NAME = "resnet20_conam.cifar10"
Names = dict[str, Any]


def own() -> tuple[nn.Module, Tensor]:
    """The net as timm makes it, and the picture of the page as its transform makes it."""
    model = timm.create_model(NAME, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    return model, transform(Image.open("examples/photos/dog.jpg").convert("RGB"))[None]


def check_transformers(names: Names) -> None:
    model, image = own()
    with torch.no_grad():
        logits = model(image)
    assert torch.equal(names["logits"], logits)
    assert names["label"] == names["answers"][0]["label"] == "dog"
    scores = [answer["score"] for answer in names["answers"]]
    assert scores == pytest.approx(logits.softmax(1).topk(5).values[0].tolist(), abs=1e-5)


def check_grad_cam(names: Names) -> None:
    model, image = own()
    maps = model.forward_features(image)
    logits = model.forward_head(maps)
    (slopes,) = torch.autograd.grad(logits.max(), maps)
    expected = (slopes.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach()[0].numpy()
    heat = np.asarray(Image.fromarray(names["heat"]).resize((8, 8), Image.Resampling.BOX))
    assert names["heat"].shape == (32, 32)
    assert np.corrcoef(heat.ravel(), expected.ravel())[0, 1] > 0.95
    assert Image.open("cam.png").size == (256, 256)


def check_captum(names: Names) -> None:
    model, image = own()
    with torch.no_grad():
        rise = (model(image) - model(torch.zeros_like(image)))[0, names["target"]]
    assert names["pixels"].sum().item() == pytest.approx(rise.item(), rel=0.02)
    assert abs(names["error"].item()) < 0.02 * rise
    assert names["site"].shape == (1, 16, 32, 32)
    assert names["site"].isfinite().all()
    assert names["site"].abs().max() > 0


def check_feature_extraction(names: Names) -> None:
    model, image = own()
    with torch.no_grad():
        maps = names["extractor"](image)
        assert torch.equal(maps["logits"], model(image))
        assert torch.equal(maps["last"], model.forward_features(image))
        before = model.layer1(model.act1(model.bn1(model.conv1(image))))
        assert torch.equal(maps["rescaled"], model.layer2[0].attn(before))
    assert names["maps"]["rescaled"].shape == (2, 16, 32, 32)


def check_torchao(names: Names) -> None:
    images = torch.stack([image for image, _ in names["pictures"]])
    with torch.no_grad():
        exact, quantised = names["model"](images), names["quantised"](images)
    assert not torch.equal(quantised, exact)
    assert torch.corrcoef(torch.stack([exact.ravel(), quantised.ravel()]))[0, 1] > 0.95
    assert torch.int8 in {buffer.dtype for buffer in names["quantised"].buffers()}


def check_lightning(names: Names) -> None:
    net = names["classifier"].model
    before = timm.create_model(NAME, pretrained=True).state_dict()
    assert names["trainer"].global_step == 1
    assert net.fc.out_features == 3
    assert not torch.equal(net.conv1.weight.cpu(), before["conv1.weight"])
    attention = net.layer2[0].attn.fc1.weight
    groups = names["trainer"].optimizers[0].param_groups
    (group,) = [group for group in groups if any(attention is parameter for parameter in group["params"])]
    assert group["weight_decay"] == 0


CHECKS: dict[str, Callable[[Names], None]] = {
    "transformers": check_transformers,
    "pytorch-grad-cam": check_grad_cam,
    "Captum": check_captum,
    "torchvision's feature extraction": check_feature_extraction,
    "torchao": check_torchao,
    "Lightning": check_lightning,
}


def blocks(checkout: Path) -> dict[str, list[str]]:
    """The page's Python blocks, by the title that they stand under."""
    _, *sections = (checkout / "docs" / "clients.md").read_text(encoding="utf-8").split("\n## ")
    found = {section.partition("\n")[0]: PYTHON_BLOCK.findall(section) for section in sections}
    return {title: lines for title, lines in found.items() if lines}


def test_every_block_has_a_check(checkout: Path) -> None:
    assert {title: len(lines) for title, lines in blocks(checkout).items()} == dict.fromkeys(CHECKS, 1)


@pytest.mark.parametrize("title", CHECKS)
def test_the_lines_of_the_page(title: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("weights", "examples"):
        (tmp_path / folder).symlink_to(checkout / folder)
    for index, name in enumerate(("ant", "bee", "cow") * 4):
        picture = Image.open(checkout / "examples" / "photos" / ("cat.jpg", "dog.jpg", "bird.jpg")[index % 3])
        (tmp_path / "my_pictures" / name).mkdir(parents=True, exist_ok=True)
        picture.rotate(10 * index).resize((40, 36)).save(tmp_path / "my_pictures" / name / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    names: Names = {"__name__": "__main__"}
    (block,) = blocks(checkout)[title]
    exec(compile(block, f"docs/clients.md, {title}", "exec"), names)
    CHECKS[title](names)


@pytest.mark.parametrize(
    ("name", "layer"), [("wide_resnet16_4_conam.cifar10", "act1"), ("densenet40_12_conam.cifar10", "act1")]
)
def test_grad_cam_on_the_last_maps_of_the_other_families(name: str, layer: str) -> None:
    from pytorch_grad_cam import GradCAM

    model = timm.create_model(name, pretrained=True).eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with GradCAM(model=model, target_layers=[getattr(model, layer)]) as cam:
        heat = cam(input_tensor=image, targets=None)
    assert heat.shape == (2, 32, 32)
    assert (heat.max((1, 2)) > 0.99).all()


def test_timms_data_set_and_loader_count_what_evaluate_counts(conam: Command, cifar_root: Path, tmp_path: Path) -> None:
    split = read_split(cifar_root, "test", "cifar10").spread(1000)
    for index, (pixels, label) in enumerate(zip(split.images.numpy(), split.labels.tolist(), strict=True)):
        folder = tmp_path / "cifar10" / "test" / split.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    model = timm.create_model(NAME, pretrained=True).eval()
    config = resolve_model_data_config(model)
    dataset = create_dataset("", root=str(tmp_path / "cifar10"), split="test")
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # what validate.py hands on
    config = {key: config[key] for key in keys}
    loader = create_loader(dataset, **config, batch_size=250, num_workers=0, device=torch.device("cpu"))
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    assert conam("evaluate", NAME, "--data", tmp_path / "cifar10", "--json", tmp_path / "scores.json")[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["top1_percent"] == pytest.approx(right / 10)
