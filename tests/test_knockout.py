"""Replacing the confidences of trained modules: what each change leaves, and what is written down of it."""

import json
from pathlib import Path

import pytest
import timm
import torch

import conam_zoo
from conam_zoo.data import ImageSplit
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.weights import load_manifest
from experiments.accuracy import knockout
from experiments.accuracy.knockout import CHANGES, EVERY_SITE, knocked_out, knockout_table, measure_knockout

NAME = "resnet20_conam.cifar10"


def sharp_module(side: int = 12, patch_size: int = 4) -> tuple[conam_zoo.ConAM, torch.Tensor]:
    """A module whose confidences are far from even, and a map."""
    torch.manual_seed(0)
    module = conam_zoo.ConAM(8, patch_size)
    for parameter in module.parameters():
        parameter.data.mul_(4)
    return module.eval(), torch.randn(5, 8, side, side)


def scales(module: conam_zoo.ConAM, x: torch.Tensor, change: str) -> torch.Tensor:
    """What the module multiplies each pixel by under a change, less one: (N, H, W)."""
    net = torch.nn.Sequential(module)
    with knocked_out(net, ["0"], change):
        y = net(x)
    assert torch.equal(net(x), module(x))  # the change ends with the block
    return (y / x).mean(1) - 1


@pytest.mark.parametrize("side", [12, 10])
def test_each_change_leaves_what_it_says(side: int) -> None:
    module, x = sharp_module(side)
    own = scales_of = module.confidence(x)
    assert own.flatten(1).amax(1).min() > 0.2
    for dimension in (1, 2):
        scales_of = scales_of.repeat_interleave(4, dimension)
    own_scales = scales_of[:, :side, :side]
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(scales(module, x, "even"), torch.full((5, side, side), 1 / 9), **close)
    torch.testing.assert_close(scales(module, x, "removed"), torch.zeros(5, side, side), **close)
    torch.testing.assert_close(scales(module, x, "exchanged"), own_scales.roll(1, 0), **close)
    shuffled = scales(module, x, "shuffled")[:, ::4, ::4].flatten(1)
    torch.testing.assert_close(shuffled.sort(1).values, own.flatten(1).sort(1).values, **close)
    assert (shuffled - own.flatten(1)).abs().amax(1).max() > 0.1


def test_every_site_and_each_alone_are_measured() -> None:
    torch.manual_seed(0)
    net = timm.create_model(NAME)
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    split = ImageSplit(images, torch.arange(40) % 10, DATASETS["cifar10"].classes, "noise")
    found = measure_knockout(net, split)
    assert [row["site"] for row in found["sites"]] == [EVERY_SITE, "layer1.0.attn", "layer2.0.attn", "layer3.0.attn"]
    every, *single = found["sites"]
    assert every["largest_percent"] is None
    assert all(6.25 <= row["largest_percent"] <= 100 for row in single)
    for row in found["sites"]:
        assert set(row) == {"site", "largest_percent", *CHANGES}
        assert row["removed"]["nll"] != found["unchanged"]["nll"]
        for change in CHANGES:
            moved = row[change]["gained"] - row[change]["lost"]
            assert row[change]["top1_percent"] == pytest.approx(found["unchanged"]["top1_percent"] + 100 * moved / 40)
    with pytest.raises(UserError, match="has no ConAM"):
        measure_knockout(timm.create_model(NAME, attn_layer="none"), split)


def test_confidences_are_exchanged_within_a_class_or_across_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = timm.create_model(NAME)
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    split = ImageSplit(images, torch.arange(40) % 10, DATASETS["cifar10"].classes, "noise")
    seen: list[torch.Tensor] = []
    logits_on = knockout.logits_on
    monkeypatch.setattr(knockout, "logits_on", lambda net, split: seen.append(split.labels) or logits_on(net, split))
    measure_knockout(net, split)
    orders = dict(zip(["unchanged", *CHANGES], seen, strict=False))
    for change, labels in orders.items():
        same = (labels == labels.roll(1)).float().mean()
        assert same == 0 if change == "across" else same > 0.5


def test_an_interval_follows_from_the_answers_that_changed() -> None:
    found = {"top1_percent": 92.0, "nll": 0.3, "lost": 160, "gained": 60}
    assert knockout._cell(found, 93.0, 10_000) == "92.00 (-1.00 ± 0.29)"
    del found["lost"], found["gained"]
    assert knockout._cell(found, 93.0, 10_000) == "92.00 (-1.00)"


def test_the_command_writes_what_the_table_is_made_from(experiments, small_data: Path, tmp_path: Path) -> None:
    code, out, err = experiments("knockout", NAME, "--data", small_data, "--json", tmp_path / "knockout.json")
    assert code == 0, err
    document = json.loads((tmp_path / "knockout.json").read_text())
    assert document["what"] == "knockout"
    assert document["models"][0]["images"] == 60
    table = knockout_table(document)
    assert len(table.splitlines()) == 4 + 4
    assert f"| `{NAME}` |" in table
    assert document["models"][0]["sha256"] == load_manifest().entry(NAME).sha256
    assert f"| `{NAME}`, earlier weights |" in knockout_table(document, {NAME})
    assert "`layer1.0`" in table
    assert "every site" in out
