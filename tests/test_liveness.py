"""Liveness: how much the confidences of each site differ between patches, measured while nets are trained."""

import copy
import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import PLAIN_RECIPE
from PIL import Image

from conam_zoo.data import ImageSplit
from conam_zoo.errors import UserError
from conam_zoo.layers.confidence import confidence_maps, liveness
from conam_zoo.training.recipe import load_recipe
from conam_zoo.training.run_folder import RunLog, draw_curves
from conam_zoo.training.train import train

SITES = ["layer1.0.attn", "layer2.0.attn", "layer3.0.attn"]


def test_it_is_deviation_over_mean_of_the_confidences_averaged_over_images() -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("resnet20_conam").eval(), torch.randn(5, 3, 32, 32)
    measured = liveness(model, images)
    assert list(measured) == SITES
    for site, maps in confidence_maps(model, images)[1].items():
        by_image = [np.std(eta) / np.mean(eta) for eta in maps.double().numpy().reshape(5, -1)]
        assert measured[site] == pytest.approx(np.mean(by_image), rel=1e-6)


def test_even_confidences_have_none_and_one_patch_that_takes_all_has_the_most() -> None:
    model, images = timm.create_model("resnet20_conam").eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.layer1[0].attn.fc2.weight.zero_()
        for layer in (model.layer2[0].attn.fc1, model.layer2[0].attn.fc2):
            layer.weight.mul_(200)
    measured = liveness(model, images)
    assert measured["layer1.0.attn"] == pytest.approx(0, abs=1e-6)
    assert measured["layer2.0.attn"] == pytest.approx(15**0.5, abs=1e-3)  # of 16 shares, one is 1


@pytest.mark.parametrize("attention", ["none", "se", "eca", "simam"])
def test_other_attentions_have_no_liveness(attention: str) -> None:
    assert liveness(timm.create_model("resnet20_conam", attn_layer=attention), torch.randn(1, 3, 32, 32)) == {}


def test_measuring_changes_nothing_of_the_net() -> None:
    model, images = timm.create_model("resnet20_conam").train(), torch.randn(4, 3, 32, 32)
    model.layer1[0].bn1.eval()  # as where a layer is frozen
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    liveness(model, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    model(images).sum().backward()  # nothing of inference mode is left behind


@pytest.mark.slow
def test_every_epoch_logs_it(small_data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = load_recipe(PLAIN_RECIPE, ["epochs=2", "warmup_epochs=0", "batch_size=32"])
    train(recipe, small_data, tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    columns = [f"liveness {site}" for site in SITES]
    assert [name for name in rows[0] if name.startswith("liveness")] == columns
    assert all(0 < float(row[column]) < 15**0.5 for row in rows for column in columns)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for site in SITES:
        logged = [event.value for event in events.Scalars(f"liveness/{site}")]
        assert logged == pytest.approx([float(row[f"liveness {site}"]) for row in rows])


@pytest.mark.slow
def test_logs_that_began_without_it_go_on(tmp_path: Path) -> None:
    plain = {"lr": 0.1, "loss": 2.0, "train_top1_percent": 20.0, "holdout_top1_percent": None, "seconds": 1.0}
    rows = [{"epoch": 1, **plain}, {"epoch": 2, **plain, "liveness layer1.0.attn": 0.25}]
    with RunLog(tmp_path, rows) as log:
        log.write()
    first, second = csv.DictReader((tmp_path / "log.csv").open())
    assert (first["liveness layer1.0.attn"], second["liveness layer1.0.attn"]) == ("", "0.25")
    for length in (1, 2):
        draw_curves(rows[:length], tmp_path / "curves.png", title="begun by an older version")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_events_that_cannot_be_written_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"epoch": 1, "lr": 0.1, "loss": 2.0, "train_top1_percent": 20.0, "holdout_top1_percent": None, "seconds": 1.0}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log_one() -> None:
        with RunLog(tmp_path, [row]) as log:
            for call in ("flush", "close"):
                monkeypatch.setattr(log._events, call, full)
            log.write()

    with pytest.raises(UserError, match=r"No space left on device.*continue with --resume"):
        log_one()


@pytest.mark.slow
def test_curves_of_a_single_epoch_show_a_point(tmp_path: Path) -> None:
    row = {"epoch": 1, "lr": 0.1, "loss": 2.0, "train_top1_percent": 20.0, "holdout_top1_percent": None}
    draw_curves([row], tmp_path / "curves.png", title="one epoch")
    with Image.open(tmp_path / "curves.png") as picture:
        loss = np.asarray(picture.convert("RGB"))[:, : picture.width // 3]  # the first of three panels, without legend
    assert (loss == (0x1F, 0x77, 0xB4)).all(2).sum() > 20


def test_monitored_images_are_spread_over_a_split_that_is_sorted_by_class() -> None:
    labels = torch.arange(10).repeat_interleave(50)
    split = ImageSplit(torch.zeros(500, 2, 2, 3, dtype=torch.uint8), labels, tuple("abcdefghij"), "made up")
    assert split.spread(20).labels.bincount().tolist() == [2] * 10
    assert torch.equal(split.spread(1000).labels, labels)
