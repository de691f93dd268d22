"""The model families: sizes against published numbers, golden outputs, attention sites, and timm's contract."""

import json
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden.make import MODELS_WITH_OUTPUTS, count, fill, image, logits, read_golden
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_model_args, save_for_hf
from timm.models._manipulate import group_parameters
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor

import conam_zoo.models._builder as builder
import experiments  # noqa: F401 (registers the forms of the ablation)
from conam_zoo import ConAM
from conam_zoo.errors import UserError
from conam_zoo.layers import registry
from conam_zoo.layers.registry import attention_names
from conam_zoo.models.registry import export_model
from experiments.speed.cost_net import kept_bytes

NAMES = timm.list_models("*_conam")
TAGGED = timm.list_models("*_conam", include_tags=True)
LARGE = ("resnet101_", "resnet110_", "wide_resnet40_4_", "densenetbc100_12_", "densenetbc190_40_")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name.startswith(LARGE) else name for name in NAMES]
SMALL = ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"]  # one of each family
LAYERS = [name for name in attention_names() if name not in ("simam", "conam_variant")]  # they have tests of their own

# Parameters of the nets without attention, with 10 classes. Sources: pytorch-cifar-models and pytorchcv (their tables),
# kuangliu/pytorch-cifar (the ImageNet nets with a 3x3 stem), the WideResNet and DenseNet papers.
PLAIN_PARAMS = {
    "resnet20_conam": 272_474,
    "resnet32_conam": 466_906,
    "resnet44_conam": 661_338,
    "resnet56_conam": 855_770,
    "resnet110_conam": 1_730_714,
    "resnet18_conam": 11_173_962,
    "resnet34_conam": 21_282_122,
    "resnet50_conam": 23_520_842,
    "resnet101_conam": 42_512_970,
    "wide_resnet16_4_conam": 2_748_890,
    "wide_resnet16_8_conam": 10_961_370,
    "wide_resnet40_4_conam": 8_949_210,
    "wide_resnet28_10_conam": 36_479_194,
    "densenet40_12_conam": 1_019_722,  # the paper's 1.0 M
    "densenetbc100_12_conam": 769_162,
    "densenetbc190_40_conam": 25_624_430,
}
# Millions of multiply-accumulates that pytorch-cifar-models publishes.
PUBLISHED_MEGA_MACS = {
    "resnet20_conam": 40.81,
    "resnet32_conam": 69.12,
    "resnet44_conam": 97.44,
    "resnet56_conam": 125.75,
}


def make(name: str, **kwargs: Any) -> nn.Module:
    """A model in evaluation mode, filled by formula."""
    return fill(timm.create_model(name, **kwargs)).eval()


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model without memory, for questions of structure and shape."""
    return timm.create_model(name, device="meta", **kwargs).eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# Sizes


def _conv(in_channels: int, out_channels: int, kernel: int, side: int) -> int:
    """Multiply-accumulates of a convolution with an output of ``side`` squared pixels."""
    return in_channels * out_channels * kernel**2 * side**2


def _macs_of_resnet(block: str, layers: list[int], widths: list[int]) -> int:
    expansion = 4 if block == "bottleneck" else 1
    total, channels, side = _conv(3, widths[0], 3, 32), widths[0], 32
    for stage, (depth, width) in enumerate(zip(layers, widths, strict=True)):
        for index in range(depth):
            before = side
            side = side // 2 if stage > 0 and index == 0 else side
            if block == "bottleneck":
                total += _conv(channels, width, 1, before) + _conv(width, width, 3, side)
                total += _conv(width, 4 * width, 1, side)
            else:
                total += _conv(channels, width, 3, side) + _conv(width, width, 3, side)
            if index == 0 and (stage > 0 or channels != width * expansion):
                total += _conv(channels, width * expansion, 1, side)
            channels = width * expansion
    return total + channels * 10


def _macs_of_wide_resnet(depth: int, widen_factor: int) -> int:
    total, channels, side = _conv(3, 16, 3, 32), 16, 32
    for stage, width in enumerate([16 * widen_factor, 32 * widen_factor, 64 * widen_factor]):
        side = 32 // 2**stage
        total += _conv(channels, width, 1, side)  # shortcut
        for _ in range((depth - 4) // 6):
            total += _conv(channels, width, 3, side) + _conv(width, width, 3, side)
            channels = width
    return total + channels * 10


def _macs_of_densenet(depth: int, growth: int, bottleneck: bool) -> int:
    channels = 2 * growth if bottleneck else 16
    total = _conv(3, channels, 3, 32)
    for stage, side in enumerate([32, 16, 8]):
        if stage > 0:
            narrowed = channels // 2 if bottleneck else channels
            total += _conv(channels, narrowed, 1, 2 * side)  # before the pooling
            channels = narrowed
        for _ in range((depth - 4) // (6 if bottleneck else 3)):
            if bottleneck:
                total += _conv(channels, 4 * growth, 1, side) + _conv(4 * growth, growth, 3, side)
            else:
                total += _conv(channels, growth, 3, side)
            channels += growth
    return total + channels * 10


def plain_macs(name: str) -> int:
    """Multiply-accumulates of convolutions and classifier, from the papers' tables."""
    numbers = [int(part) for part in "".join(c if c.isdigit() else " " for c in name).split()]
    if name.startswith("wide_resnet"):
        return _macs_of_wide_resnet(*numbers)
    if name.startswith("densenet"):
        return _macs_of_densenet(*numbers, bottleneck=name.startswith("densenetbc"))
    wide = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
    if numbers[0] in wide:
        block = "basic" if numbers[0] < 50 else "bottleneck"
        return _macs_of_resnet(block, wide[numbers[0]], [64, 128, 256, 512])
    return _macs_of_resnet("basic", [(numbers[0] - 2) // 6] * 3, [16, 32, 64])


def test_every_model_has_a_published_size() -> None:
    assert sorted(PLAIN_PARAMS) == sorted(NAMES)
    assert sorted(TAGGED) == sorted(f"{name}.{tag}" for name in NAMES for tag in ("cifar10", "cifar100"))


@pytest.mark.parametrize("name", EACH)
def test_plain_twin_has_the_published_size(name: str) -> None:
    counts = count(name, attn_layer="none")
    assert counts["params"] == PLAIN_PARAMS[name]
    assert counts["macs"] == plain_macs(name)
    if name in PUBLISHED_MEGA_MACS:
        assert round(counts["macs"] / 1e6, 2) == PUBLISHED_MEGA_MACS[name]


def sizes() -> dict[str, dict[str, int]]:
    """The package's table, which ``conam list`` reads instead of counting."""
    return json.loads((files("conam_zoo.models") / "sizes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EACH)
def test_conam_adds_what_its_equations_say(name: str) -> None:
    counts = count(name)
    assert counts == sizes()[name]
    channels = [m.channels for m in on_meta(name).modules() if isinstance(m, ConAM)]
    assert len(channels) == 3
    assert counts["params"] - PLAIN_PARAMS[name] == sum(2 * c * c + 2 * c for c in channels)
    # 16 patches and the global context go through two linear layers.
    assert counts["macs"] - plain_macs(name) == sum(17 * 2 * c * c for c in channels)


def test_goldens_are_complete() -> None:
    assert sorted(sizes()) == sorted(NAMES)
    assert sorted(read_golden("outputs.json")) == sorted(MODELS_WITH_OUTPUTS)


@pytest.mark.parametrize("name", MODELS_WITH_OUTPUTS)
def test_golden_outputs(name: str) -> None:
    golden = torch.tensor(read_golden("outputs.json")[name], dtype=torch.float64)
    assert len(golden) == 10
    assert golden.std() > 1e-3, "outputs that hardly vary would prove little"
    torch.testing.assert_close(logits(name), golden, rtol=1e-6, atol=1e-7)
    scale = golden.abs().max().item()
    torch.testing.assert_close(logits(name, torch.float32).double(), golden, rtol=0, atol=1e-3 * scale)


# Attention sites


def conam_sites(model: nn.Module) -> dict[str, int]:
    return {name: module.patch_size for name, module in model.named_modules() if isinstance(module, ConAM)}


def patches_at_sites(model: nn.Module, side: int) -> list[int]:
    """How many patches each ConAM of the model sees on an image of that side, in order of execution."""
    seen: list[int] = []

    def watch(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(math.prod(module.confidence(inputs[0]).shape[1:]))

    for module in model.modules():
        if isinstance(module, ConAM):
            module.register_forward_pre_hook(watch)
    model(torch.empty(1, 3, side, side, device="meta"))
    return seen


@pytest.mark.parametrize("name", EACH)
def test_default_sites(name: str) -> None:
    if name.startswith("densenet"):
        expected = {"block1.attn": 8, "block2.attn": 4, "block3.attn": 2}
    else:
        expected = {"layer1.0.attn": 8, "layer2.0.attn": 8, "layer3.0.attn": 4}
    model = on_meta(name)
    assert conam_sites(model) == expected
    assert patches_at_sites(model, 32) == [16, 16, 16]
    assert list(model.patch_sizes) == (
        [8, 8, 4, 0] if hasattr(model, "layer4") and len(model.layer4) else [*expected.values()]
    )


BLOCK_SITES = {
    "resnet20_conam": {
        "layer1.0.attn": 8,
        "layer1.1.attn": 8,
        "layer1.2.attn": 8,
        "layer2.0.attn": 8,
        "layer2.1.attn": 4,
        "layer2.2.attn": 4,
        "layer3.0.attn": 4,
        "layer3.1.attn": 2,
        "layer3.2.attn": 2,
    },
    "wide_resnet16_4_conam": {
        "layer1.0.attn": 8,
        "layer1.1.attn": 8,
        "layer2.0.attn": 8,
        "layer2.1.attn": 4,
        "layer3.0.attn": 4,
        "layer3.1.attn": 2,
    },
    "resnet18_conam": {
        "layer1.0.attn": 8,
        "layer1.1.attn": 8,
        "layer2.0.attn": 8,
        "layer2.1.attn": 4,
        "layer3.0.attn": 4,
        "layer3.1.attn": 2,
    },
    "densenet40_12_conam": {
        f"block{block}.layer{layer}.attn": side for block, side in ((1, 8), (2, 4), (3, 2)) for layer in range(1, 13)
    },
}


@pytest.mark.parametrize("name", BLOCK_SITES)
def test_sites_in_every_block(name: str) -> None:
    model = on_meta(name, attn_placement="block")
    assert conam_sites(model) == BLOCK_SITES[name]
    assert patches_at_sites(model, 32) == [16] * len(BLOCK_SITES[name])


def test_patch_sizes_move_and_remove_sites() -> None:
    model = on_meta("resnet20_conam", patch_sizes=(0, 16, 2))
    assert conam_sites(model) == {"layer2.0.attn": 16, "layer3.0.attn": 2}
    assert model.patch_sizes == (0, 16, 2)
    assert conam_sites(on_meta("resnet20_conam", patch_sizes=(0, 0, 0))) == {}
    with_se = on_meta("densenet40_12_conam", attn_layer="se", patch_sizes=(8, 0, 2))
    assert [hasattr(block, "attn") for block in (with_se.block1, with_se.block2, with_se.block3)] == [True, False, True]


def recorded(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the named modules for one image."""
    record: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: record.__setitem__(name, (inputs[0].clone(), output.clone()))
        )
    run(model, image().float())
    return record


@pytest.mark.parametrize("name", ["resnet20_conam", "resnet50_conam"])
@pytest.mark.parametrize("block", ["layer1.0", "layer2.0"])
def test_resnet_shortcut_keeps_the_raw_map(name: str, block: str) -> None:
    record = recorded(make(name), [block, f"{block}.attn", f"{block}.conv1", f"{block}.downsample"])
    raw = record[block][0]
    attended = record[f"{block}.attn"][1]
    assert torch.equal(record[f"{block}.attn"][0], raw), "the attention sees the block's input"
    assert not torch.equal(attended, raw)
    assert torch.equal(record[f"{block}.conv1"][0], attended), "the residual branch starts with the attended map"
    assert torch.equal(record[f"{block}.downsample"][0], raw), "the shortcut does not see the attention"


@pytest.mark.parametrize("block", ["layer1.0", "layer3.0"])
def test_wide_resnet_attends_the_activated_map(block: str) -> None:
    names = [f"{block}.{part}" for part in ("act1", "attn", "conv1", "downsample")]
    record = recorded(make("wide_resnet16_4_conam"), names)
    activated, attention, conv1, downsample = (record[name] for name in names)
    assert torch.equal(attention[0], activated[1])
    assert not torch.equal(attention[1], attention[0])
    assert torch.equal(conv1[0], attention[1])
    assert torch.equal(downsample[0], activated[1]), "the shortcut does not see the attention"


def test_densenet_attends_the_input_of_each_block() -> None:
    names = ["block2", "block2.attn", "block2.layer1"]
    record = recorded(make("densenetbc100_12_conam"), names)
    assert torch.equal(record["block2.attn"][0], record["block2"][0])
    assert not torch.equal(record["block2.attn"][1], record["block2"][0])
    assert torch.equal(record["block2.layer1"][0], record["block2.attn"][1])


@pytest.mark.parametrize("placement", ["stage", "block"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SMALL)
def test_every_attention_trains_everywhere(name: str, layer: str, placement: str) -> None:
    model = timm.create_model(name, attn_layer=layer, attn_placement=placement)
    output = model(torch.cat([image(side=16), -image(side=16)]).float())
    assert output.shape == (2, 10)
    assert output.isfinite().all()
    output.square().sum().backward()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []

    attended = sorted({n.partition(".attn.")[0] for n in model.state_dict() if ".attn." in n})
    sites = [
        n.removesuffix(".attn") for n in (BLOCK_SITES[name] if placement == "block" else conam_sites(on_meta(name)))
    ]
    assert attended == ([] if layer == "none" else sorted(sites))
    assert (model.attn_layer, model.attn_placement) == (layer, placement)


@pytest.mark.parametrize("name", EACH)
def test_plain_twin_differs_by_the_attention_alone(name: str) -> None:
    plain = {key: tensor.shape for key, tensor in on_meta(name, attn_layer="none").state_dict().items()}
    attended = {key: tensor.shape for key, tensor in on_meta(name).state_dict().items()}
    assert plain == {key: shape for key, shape in attended.items() if ".attn." not in key}
    assert sorted({key.rpartition(".attn.")[2] for key in attended.keys() - plain.keys()}) == [
        "fc1.bias",
        "fc1.weight",
        "fc2.bias",
        "fc2.weight",
    ]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "bad",
    [
        {"attn_layer": "conan"},
        {"attn_layer": "CONAM"},
        {"attn_placement": "everywhere"},
        {"patch_sizes": (8, 8)},
        {"patch_sizes": (8, 8, 4, 2)},
        {"patch_sizes": (8, -8, 4)},
        {"patch_sizes": (8, 8.0, 4)},
    ],
    ids=str,
)
def test_bad_attention_arguments_are_refused(name: str, bad: dict[str, Any]) -> None:
    ((argument, value),) = bad.items()
    with pytest.raises(ValueError, match=f"^{argument} is ") as caught:
        on_meta(name, **bad)
    message = str(caught.value)
    assert message.startswith(f"{argument} is {value!r}, but it must ")
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("name", SMALL)
def test_unknown_arguments_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1)


# What comes in and goes out


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 29), (64, 64), (32, 48)])
def test_other_image_sizes(name: str, height: int, width: int) -> None:
    x = image(side=64)[..., :height, :width].float()
    model = make(name)
    output = run(model, torch.cat([x, x.flip(-1)]))
    assert output.shape == (2, 10)
    assert output.isfinite().all()
    torch.testing.assert_close(output[:1], run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_heads(name: str) -> None:
    x = torch.empty(2, 1, 32, 32, device="meta")
    model = on_meta(name, num_classes=5, in_chans=1)
    pooled, unpooled = (2, model.num_features), (2, model.num_features, *model.pretrained_cfg["pool_size"])
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape == unpooled
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == pooled
    model.reset_classifier(0)
    assert model(x).shape == pooled
    model.reset_classifier(0, "")
    assert model(x).shape == unpooled
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.fc
    assert on_meta(name, num_classes=0, in_chans=1)(x).shape == pooled
    assert on_meta(name, num_classes=0, in_chans=1, global_pool="")(x).shape == unpooled


@pytest.mark.parametrize("name", SMALL)
def test_head_arguments_do_what_they_say(name: str) -> None:
    model, x = make(name), image().float()
    features = run(make(name, num_classes=0, global_pool=""), x)
    pooled = run(make(name, num_classes=0), x)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    torch.testing.assert_close(run(model, x), model.fc(pooled))
    torch.testing.assert_close(run(make(name, num_classes=0, global_pool="max"), x), features.amax(dim=(2, 3)))


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,)])
@pytest.mark.parametrize("name", SMALL)
def test_features_equal_intermediates(name: str, out_indices: tuple[int, ...]) -> None:
    x = image().float()
    model = make(name)
    extractor = timm.create_model(name, features_only=True, out_indices=out_indices).eval()
    extractor.load_state_dict({key: model.state_dict()[key] for key in extractor.state_dict()})
    features = run(extractor, x)
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(x, indices=list(out_indices))
    assert len(features) == len(out_indices)
    torch.testing.assert_close(features, intermediates)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [feature.shape[1] for feature in features] == extractor.feature_info.channels()
    assert [32 // feature.shape[-1] for feature in features] == extractor.feature_info.reduction()


@pytest.mark.parametrize("name", EACH)
def test_without_indices_the_maps_of_every_stage_are_given(name: str) -> None:
    extractor = timm.create_model(name, features_only=True, device="meta")
    assert extractor.feature_info.channels() == [info["num_chs"] for info in on_meta(name).feature_info]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_keeps_the_gradients(name: str) -> None:
    x = torch.cat([image(side=16), -image(side=16)]).float()
    gradients, kept = [], []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        kept.append(kept_bytes(model, x, "fp32"))
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({n: parameter.grad for n, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *((name, "drop_rate") for name in SMALL),
        *((name, "block_drop_rate") for name in SMALL if "wide" in name or "dense" in name),
    ],
)
def test_dropout_drops_in_training_alone(name: str, argument: str) -> None:
    x = image(side=16).float()
    torch.manual_seed(0)
    plain = make(name).eval()
    torch.manual_seed(0)
    model = make(name, **{argument: 0.5}).eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain(x))
    for module in model.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    assert not torch.equal(model(x), model(x))


def test_convolutions_start_by_their_fan_out_and_an_attention_as_it_brings_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet20_conam")
    for conv in (net.layer1[1].conv1, net.layer2[0].conv1, net.layer3[1].conv2):
        expected = (2 / (conv.out_channels * 9)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.06)

    class Zero(torch.nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(channels, 1, 1)
            torch.nn.init.zeros_(self.conv.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.conv(x).sigmoid()

    monkeypatch.setitem(registry.FACTORIES, "zero_of_a_test", lambda channels, *_, **__: Zero(channels))
    net = timm.create_model("resnet20_conam", attn_layer="zero_of_a_test")
    assert all((m.conv.weight == 0).all() for m in net.modules() if isinstance(m, Zero))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
def test_a_feature_net_does_not_carry_its_weights_twice(feature_cls: str) -> None:
    net = timm.create_model("resnet20_conam.cifar10", pretrained=True, features_only=True, feature_cls=feature_cls)
    assert all("state_dict" not in (getattr(m, "pretrained_cfg", None) or {}) for m in net.modules())


@pytest.mark.parametrize("name", EACH)
def test_parameter_groups_follow_the_depth(name: str) -> None:
    model = on_meta(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        names = [n for n, _ in model.named_parameters()]
        assert sorted(groups) == sorted(names)
        order = [groups[n] for n in names]
        assert order == sorted(order), "parameters are listed in order of execution"
        assert groups["conv1.weight"] == 0
        head = {n for n, group in groups.items() if group == max(order)}
        assert {"fc.weight", "fc.bias"} <= head <= {"fc.weight", "fc.bias", "bn1.weight", "bn1.bias"}
        if coarse:
            assert max(order) == len(model.feature_info), "stem, stages, head"
        else:
            assert head == {"fc.weight", "fc.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAGGED)
def test_data_config_of_every_tag(name: str) -> None:
    model = on_meta(name)
    config = resolve_model_data_config(model)
    mean, std, classes = {
        "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159), 10),
        "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615), 100),
    }[name.partition(".")[2]]
    assert config["mean"] == pytest.approx(mean, abs=6e-6)
    assert config["std"] == pytest.approx(std, abs=6e-6)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert model.num_classes == classes
    assert len(set(model.pretrained_cfg["label_names"])) == classes


def test_transform_leaves_a_small_image_whole() -> None:
    config = resolve_model_data_config(on_meta("resnet20_conam.cifar100"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    plain = Compose([ToTensor(), Normalize(config["mean"], config["std"])])
    torch.testing.assert_close(create_transform(**config)(picture), plain(picture), rtol=0, atol=1e-6)


# Folders


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"attn_layer": "se"},
        {"attn_placement": "block", "patch_sizes": (4, 8, 2)},
        {"attn_layer": "none"},
        {"attn_layer": "conam_variant", "attn_args": {"shortcut": False}},
        {"attn_site": "after_last_norm"},
        {"num_classes": 5, "in_chans": 1},
        {"num_classes": 0, "global_pool": ""},
    ],
    ids=str,
)
def test_exported_folder_makes_the_same_model(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = make("resnet20_conam.cifar100", **arguments)
    export_model(model, tmp_path, tag="cifar100")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(arguments.get("in_chans", 3)).float()
    assert torch.equal(run(loaded, x), run(model, x))
    for attribute in ("attn_layer", "attn_placement", "patch_sizes", "attn_args", "attn_site", "num_classes"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    if "in_chans" not in arguments:  # else timm averages the statistics over the colours
        told, expected = resolve_model_data_config(loaded), resolve_model_data_config(model)
        assert (*told["mean"], *told["std"]) == (*expected["mean"], *expected["std"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_layer": "mine", "attn_args": {"heads": 10_000}},
        {"attn_layer": "mine", "attn_args": {"scales": [1, 2, 4]}},
        {"attn_layer": "mine", "attn_args": {"kind": "gelu-tanh"}},
        {"attn_layer": "mine", "attn_args": {"kind": torch.float32}},
        {"widths": (16, 32, 48)},
    ],
    ids=str,
)
def test_a_net_that_no_load_would_take_is_not_saved(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.FACTORIES, "mine", lambda channels, patch_size, **_: nn.Identity())
    model = make("resnet20_conam", **arguments)
    with pytest.raises(UserError, match=r"cannot be saved, since its config\.json would be refused"):
        export_model(model, tmp_path / "net", tag=None)
    assert not (tmp_path / "net").exists()


def test_a_scripted_net_takes_the_tensors_of_another() -> None:
    scripted, other = torch.jit.script(timm.create_model("resnet20_conam")), timm.create_model("resnet20_conam")
    scripted.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in scripted.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18_conam", "resnet50_conam"])
def test_widths_are_those_asked_for(name: str) -> None:
    net = timm.create_model(name, widths=(8, 16, 32, 64), device="meta")
    assert net.num_features == 64 * (4 if name == "resnet50_conam" else 1)


def test_the_manifests_arguments_come_before_the_builders_own(monkeypatch: pytest.MonkeyPatch) -> None:
    name, sides = "resnet18_conam.cifar10", (4, 4, 2, 0)
    entry = SimpleNamespace(model_args={"patch_sizes": list(sides)})
    monkeypatch.setattr(builder, "load_manifest", lambda: SimpleNamespace(entries={name: entry}))
    state = make(name).state_dict()
    monkeypatch.setattr(builder, "_state_dict", lambda *_: (state, None))
    net = timm.create_model(name, pretrained=True)
    assert net.patch_sizes == sides
    assert get_model_args(net)["patch_sizes"] == list(sides)  # what timm rebuilds it from
    assert timm.create_model(name, pretrained=True, patch_sizes=(8, 8, 2, 0)).patch_sizes == (8, 8, 2, 0)
    assert timm.create_model(name).patch_sizes == (8, 8, 4, 0)


@pytest.mark.parametrize("name", ["wide_resnet16_4_conam", "densenetbc100_12_conam"])
def test_exported_folder_of_the_other_families(name: str, tmp_path: Path) -> None:
    model = make(name, attn_placement="block")
    export_model(model.to(memory_format=torch.channels_last), tmp_path, tag=None)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert conam_sites(loaded) == conam_sites(model)


@pytest.mark.parametrize("name", SMALL)
def test_timm_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = make(name, attn_layer="eca", patch_sizes=(8, 0, 4))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}, "no pickle"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(run(loaded, image().float()), run(model, image().float()))


# Names


@pytest.fixture(scope="module")
def fresh_process() -> dict[str, Any]:
    """What a new interpreter sees when it imports timm, and then this package."""
    client = """
import json, sys, warnings
import timm
before = timm.list_models() + list(timm.models.get_deprecated_models())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import conam_zoo
print(json.dumps({
    "before": before,
    "registered": sorted(set(timm.list_models()) - set(before)),
    "warnings": [str(w.message) for w in caught],
    "modules": sorted(sys.modules),
}))
"""
    result = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_names_are_free_in_timm(fresh_process: dict[str, Any]) -> None:
    assert set(NAMES).isdisjoint(fresh_process["before"])
    assert fresh_process["registered"] == sorted(NAMES)
    assert fresh_process["warnings"] == []


def test_import_brings_neither_training_nor_analysis(fresh_process: dict[str, Any]) -> None:
    unwanted = ("conam_zoo.training", "conam_zoo.visualize", "conam_zoo.cli", "matplotlib")
    assert [name for name in fresh_process["modules"] if name.startswith(unwanted)] == []
    assert "conam_zoo.models.conam_resnet" in fresh_process["modules"]


def test_wrong_tag_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("resnet20_conam.cifar1000")


# Compilers


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_export_with_dynamic_batch(name: str) -> None:
    model = make(name)
    batch = torch.export.Dim("batch")
    example = torch.cat([image(), -image()]).float()
    program = torch.export.export(model, (example,), dynamic_shapes={"x": {0: batch}}).module()
    for x in (example[:1], torch.cat([example, example])):
        torch.testing.assert_close(run(program, x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    model, x = make(name), image().float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [np.int64(7), np.uint8(7), np.array([3, 6]).max() + 1])
def test_whole_numbers_of_numpy_are_whole_numbers(number: int, tmp_path: Path) -> None:
    model = timm.create_model("resnet20_conam", num_classes=number)
    assert type(model.num_classes) is int
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    export_model(model, tmp_path, tag=None)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 7
    for wrong in (7.0, True, -1):
        with pytest.raises(ValueError, match="must be a whole number"):
            timm.create_model("resnet20_conam", num_classes=wrong)
    patched = timm.create_model("resnet20_conam", patch_sizes=np.array([8, 4, 2]), in_chans=np.int64(1))
    assert patched.patch_sizes == (8, 4, 2)
    assert {type(size) for size in (*patched.patch_sizes, patched.in_chans)} == {int}
    for chans in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"in_chans is .* must be a positive whole number"):
            timm.create_model("resnet20_conam", in_chans=chans)
