"""A bank of a teacher's logits: the online teacher's bits, interruption and damage, students that do not fit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import PLAIN_RECIPE, write_arrays
from safetensors.torch import load_file
from torch import nn

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.models.registry import export_model
from conam_zoo.training import train as training
from conam_zoo.training.checkpoint import TrainingStopped
from conam_zoo.training.distributed import precision_on, ranks
from conam_zoo.training.recipe import Recipe, load_recipe
from conam_zoo.training.teacher_bank import epoch_file, read_epoch, to_float16, write_epoch
from conam_zoo.training.train import assemble, record_teacher, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]

SETTINGS = [
    "epochs=3", "warmup_epochs=0", "batch_size=16", "image_size=8", "crop_padding=2", "alternate_flip=true", "cutmix=1",
    "mix_share=0.5", "cutout=4", "lr=0.05", "ema_decay=0.9", "final_weights=ema", "min_lr=0", "early_epochs=0",
    "early_size=0", "distill_loss=kd",
]  # fmt: skip


class Rounded(nn.Module):
    """A teacher whose logits are those that a bank keeps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images).half()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_arrays(tmp_path / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 40, "test": 20})
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    torch.manual_seed(7)
    overlay = {"input_size": (3, 8, 8)}
    export_model(
        timm.create_model("resnet20_conam.cifar10", pretrained_cfg_overlay=overlay), tmp_path / "teacher", tag=None
    )
    return load_recipe(PLAIN_RECIPE, [*SETTINGS, f'teacher="local-dir:{tmp_path / "teacher"}"'])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_bank_gives_the_bits_of_the_online_teacher(
    precision: str, recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, precision=precision)
    assert record_teacher(recipe, data, tmp_path / "bank") == 3
    banked = train(recipe, data, tmp_path / "banked", teacher_bank=tmp_path / "bank")
    online = assemble(recipe, data, ranks())
    monkeypatch.setattr(training, "assemble", lambda *_: replace(online, teacher=Rounded(online.teacher).eval()))
    direct = train(recipe, data, tmp_path / "direct")
    assert banked["sha256"] == direct["sha256"]
    assert banked["other_sha256"] == direct["other_sha256"]
    assert banked["teacher"] == direct["teacher"]
    assert banked["teacher_bank"]["epochs"] == 3
    assert "teacher_bank" not in direct


def test_a_student_stopped_within_an_epoch_resumes_to_the_same_bits(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = tmp_path / "bank"
    recipe = replace(recipe, epochs=5, distill_loss="dkd", dkd_warmup_epochs=2.0)
    assert record_teacher(recipe, data, bank, epochs=2) == 2  # which the student passes two and a half times
    whole = train(recipe, data, tmp_path / "whole", teacher_bank=bank)
    step = training.fit.__globals__["TrainState"].step

    def stop_in_epoch_4(self: object, updates: int) -> None:
        step(self, updates)
        if updates == 3 * 3 + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training.fit.__globals__["TrainState"], "step", stop_in_epoch_4)
        with pytest.raises(TrainingStopped, match="in epoch 4 after step"):
            train(recipe, data, tmp_path / "run", teacher_bank=bank)
    resumed = train(recipe, data, tmp_path / "run", teacher_bank=bank, resume=True)
    assert resumed["sha256"] == whole["sha256"]
    # Where the bank has grown meanwhile, a second pass would be another: the training is not continued.
    record_teacher(recipe, data, bank, epochs=4)
    with pytest.raises(UserError, match="teacher_bank differ"):
        train(recipe, data, tmp_path / "run", teacher_bank=bank, resume=True)


def test_a_second_pass_shows_the_images_of_the_first(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    record_teacher(recipe, data, tmp_path / "bank", epochs=2)
    batches = assemble(recipe, data, ranks(), tmp_path / "bank").batches
    for first, second in zip(batches.epoch(1), batches.epoch(3), strict=True):
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    ((images, _, logits),) = list(batches.epoch(2, 2))  # the last, smaller batch alone
    assert len(images) == len(logits) == 8
    teacher = assemble(replace(recipe, precision="fp32"), data, ranks()).teacher
    assert logits.argmax(1).float().sub(teacher(images).argmax(1)).ne(0).sum() <= 1


def test_recording_goes_on_after_a_signal_mends_damage_and_makes_a_bank_longer(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, whole = tmp_path / "bank", tmp_path / "whole"
    record_teacher(recipe, data, whole)
    write = training.write_epoch

    def write_and_stop(*arguments: object) -> None:
        write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_epoch", write_and_stop)
        with pytest.raises(TrainingStopped, match="in epoch 2: the epochs before it are kept"):
            record_teacher(recipe, data, bank)
    with pytest.raises(UserError, match="holds 1 of 3 epochs"):
        assemble(recipe, data, ranks(), bank)
    killed = bank / ".conam-tmp-1-abcdefgh~"  # what a process that was killed leaves
    killed.mkdir()
    (killed / "file.safetensors").write_bytes(b"half")
    assert record_teacher(recipe, data, bank) == 2
    assert sorted(path.name for path in bank.iterdir()) == [epoch_file(bank, epoch).name for epoch in range(3)]
    for epoch in range(3):
        assert read_epoch(bank, epoch)[1:] == read_epoch(whole, epoch)[1:]  # facts, and the hash of the logits
    for position in (200, -1):  # the header, the logits
        damaged = bytearray(epoch_file(whole, 1).read_bytes())
        damaged[position] ^= 1
        epoch_file(bank, 1).write_bytes(damaged)
        with pytest.raises(UserError, match=r"epoch-0001.safetensors is damaged: let conam record-teacher"):
            assemble(recipe, data, ranks(), bank)
        assert record_teacher(recipe, data, bank) == 1
    assert record_teacher(recipe, data, bank, epochs=4) == 1
    assert assemble(recipe, data, ranks(), bank).facts == assemble(recipe, data, ranks(), whole).facts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed = 0, but the recipe has 1"),
        ({"batch_size": 8}, "batch_size = 16, but the recipe has 8"),
        ({"cutmix": 0.5}, "cutmix = 1.0, but the recipe has 0.5"),
        ({"mix_share": 1.0}, "mix_share"),
        ({"cutout": 0}, "cutout"),
        ({"crop_padding": 3}, "crop_padding"),
        ({"alternate_flip": False}, "alternate_flip"),
        ({"holdout": 4}, "holdout"),
        ({"precision": "fp32"}, "precision"),
        ({"teacher": "resnet110_conam.cifar10"}, "teacher"),
        ({"grad_accumulation": 2}, "grad_accumulation"),
        ({"teacher": ""}, "The recipe has no teacher"),
        ({"epochs": 9}, "takes an even number"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(
    changes: dict, sentence: str, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    record_teacher(replace(recipe, epochs=1), data, tmp_path / "bank")
    with pytest.raises(UserError) as refused:
        assemble(replace(recipe, **({"epochs": 1} | changes)), data, ranks(), tmp_path / "bank")
    assert sentence in str(refused.value)


def test_other_images_and_other_weights_are_refused(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    record_teacher(recipe, data, bank)
    write_arrays(tmp_path / "other" / "cifar10", DATASETS["cifar10"].classes, {"train": 40, "test": 20}, seed=1)
    with pytest.raises(UserError, match="recorded on other training images"):
        assemble(recipe, tmp_path / "other", ranks(), bank)
    with pytest.raises(UserError, match="holds the logits of another recording"):
        record_teacher(replace(recipe, seed=1), data, bank)
    torch.manual_seed(8)
    overlay = {"input_size": (3, 8, 8)}
    export_model(
        timm.create_model("resnet20_conam.cifar10", pretrained_cfg_overlay=overlay), tmp_path / "teacher", tag=None
    )
    with pytest.raises(UserError, match="recorded with other weights of local-dir"):
        assemble(recipe, data, ranks(), bank)
    with pytest.raises(UserError, match="holds no recorded teacher logits"):
        assemble(recipe, data, ranks(), tmp_path)


def test_a_student_tells_in_which_precision_its_bank_was_computed(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    record_teacher(recipe, data, tmp_path / "bank", epochs=2)
    computed = precision_on(ranks().device, recipe.precision)
    assert read_epoch(tmp_path / "bank", 1)[1]["computed_in"] == computed
    assert assemble(recipe, data, ranks(), tmp_path / "bank").facts["teacher_precision"] == [computed]
    logits, facts, _ = read_epoch(tmp_path / "bank", 1)
    write_epoch(tmp_path / "bank", 1, logits, {key: facts[key] for key in ("recipe", "teacher", "epochs")})
    with pytest.raises(UserError, match="is damaged: let conam record-teacher write it again"):
        assemble(recipe, data, ranks(), tmp_path / "bank")
    assert record_teacher(recipe, data, tmp_path / "bank", epochs=2) == 1  # which writes what is not whole


def test_logits_that_float16_does_not_hold_are_refused() -> None:
    assert to_float16(torch.tensor([[65504.0, -3.0]]), "big").dtype == torch.float16
    for value in (7e4, float("nan")):
        with pytest.raises(UserError, match="float16 does not hold"):
            to_float16(torch.tensor([[value, 0.0]]), "big")


def test_the_commands(conam, recipe: Recipe, data: Path, tmp_path: Path) -> None:
    settings = [part for setting in [*SETTINGS, "epochs=1"] for part in ("--set", setting)]
    name, bank = "resnet20_conam.cifar10", tmp_path / "bank"
    code, _, err = conam("record-teacher", name, "--data", data, "--output", bank, *settings, "--set", "teacher=")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "no teacher to record" in err
    settings += ["--set", f"teacher={json.dumps(recipe.teacher)}"]
    assert conam("record-teacher", name, "--data", data, "--output", bank, *settings)[0] == 0
    logits, facts, _ = read_epoch(bank, 0)
    assert logits.shape == (40, 10)
    assert logits.dtype == torch.float16
    assert facts["recipe"]["seed"] == 0
    assert facts["teacher"]["name"] == recipe.teacher
    assert list(load_file(epoch_file(bank, 0))) == ["logits"]
    common = [name, "--data", data, "--output", tmp_path / "run", "--teacher-bank", bank, *settings]
    assert conam("train", *common, "--dry-run")[0] == 0
    assert conam("train", *common)[0] == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["teacher"]["name"] == recipe.teacher
    assert len(run["teacher_bank"]["sha256"]) == 64
