"""Distillation: the loss against its definition, the teacher's part in a training, and what is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import PLAIN_RECIPE, write_arrays

from conam_zoo.errors import UserError
from conam_zoo.models.registry import export_model
from conam_zoo.training.distillation import Renormalized, distillation_loss, open_teacher
from conam_zoo.training.distributed import ranks
from conam_zoo.training.recipe import Recipe, load_recipe
from conam_zoo.training.train import assemble, train
from conam_zoo.training.train_state import TrainState

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_curves")]

SETTINGS = ["epochs=1", "warmup_epochs=0", "batch_size=16", "precision=fp32"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from conam_zoo.datasets import DATASETS

    write_arrays(tmp_path / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 32, "test": 20})
    return tmp_path / "data"


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    torch.manual_seed(7)
    export_model(timm.create_model("resnet32_conam.cifar10"), tmp_path / "teacher", tag=None)
    return f"local-dir:{tmp_path / 'teacher'}"


@pytest.fixture
def recipe(teacher: str) -> Recipe:
    return replace(load_recipe(PLAIN_RECIPE, SETTINGS), teacher=teacher)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_step_weighs_labels_and_teacher(weight: float, recipe: Recipe, data: Path) -> None:
    recipe = replace(recipe, distill_weight=weight, distill_temperature=2.0)
    parts = assemble(recipe, data, ranks())
    state = TrainState(parts.model, recipe, parts.batches.steps, teacher=parts.teacher)
    images, labels = next(parts.batches.epoch(0))
    state.train()
    loss, _ = state.accumulate([(images, labels)], len(labels))
    parts.model.train()
    with torch.no_grad():
        student, guide = parts.model(images), parts.teacher(images)
        own = torch.nn.functional.cross_entropy(student, labels)
        expected = (1 - weight) * own + weight * distillation_loss(student, guide, 2.0)
    assert loss.item() / len(labels) == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_is_named_in_the_record_and_stays_as_it_was(
    conam, recipe: Recipe, teacher: str, data: Path, tmp_path: Path
) -> None:
    weights = Path(teacher.removeprefix("local-dir:")) / "model.safetensors"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [PLAIN_RECIPE, "--teacher", teacher, "--data", data]
    code, _, err = conam("distill", *command, "--output", tmp_path / "command", *settings)
    assert code == 0, err
    run = json.loads((tmp_path / "command" / "run.json").read_text())
    assert run["teacher"] == {"name": teacher, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert run["recipe"]["teacher"] == teacher
    # The same in Python; without the teacher, something else is learnt.
    again = train(recipe, data, tmp_path / "function")
    assert again["sha256"] == run["sha256"]
    assert train(replace(recipe, teacher=""), data, tmp_path / "alone")["sha256"] != run["sha256"]
    assert load_recipe(str(tmp_path / "command" / "recipe.toml")) == recipe


def test_a_teacher_is_in_evaluation_mode_and_without_gradients(recipe: Recipe, data: Path) -> None:
    parts = assemble(recipe, data, ranks())
    before = {name: tensor.clone() for name, tensor in parts.teacher.state_dict().items()}
    state = TrainState(parts.model, recipe, parts.batches.steps, teacher=parts.teacher)
    state.train()
    state.accumulate([next(parts.batches.epoch(0))], 16)
    assert not any(module.training for module in parts.teacher.modules())
    assert all(parameter.grad is None for parameter in parts.teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.teacher.state_dict().items())


def test_a_teacher_with_other_statistics_gets_images_normalised_its_way(teacher: str) -> None:
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    student = timm.create_model(
        "resnet20_conam.cifar10", pretrained_cfg_overlay={"mean": tuple(mean), "std": tuple(std)}
    )
    net, _ = open_teacher(teacher, student, student.pretrained_cfg["label_names"])
    assert isinstance(net, Renormalized)
    pixels = torch.rand(2, 3, 32, 32)
    own = net.net.pretrained_cfg

    def normalized(by_mean, by_std):
        return (pixels - torch.as_tensor(by_mean).view(-1, 1, 1)) / torch.as_tensor(by_std).view(-1, 1, 1)

    expected = net.net(normalized(own["mean"], own["std"]))
    torch.testing.assert_close(net(normalized(mean, std)), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_other_classes_is_refused(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    export_model(timm.create_model("resnet20_conam.cifar100"), tmp_path / "hundred", tag=None)
    with pytest.raises(UserError, match="trained for other classes"):
        train(replace(recipe, teacher=f"local-dir:{tmp_path / 'hundred'}"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_size_is_refused(teacher: str) -> None:
    student = timm.create_model("resnet20_conam.cifar10", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    with pytest.raises(UserError, match="takes images of 3x32x32, the student of 3x64x64"):
        open_teacher(teacher, student, student.pretrained_cfg["label_names"])


def test_a_teacher_without_weights_is_refused(conam, data: Path, tmp_path: Path) -> None:
    command = ["distill", "resnet20_conam.cifar10", "--data", data, "--output", tmp_path / "run", "--teacher"]
    for name, sentence in (
        ("resnet21_conam", "did you mean"),
        ("resnet110_conam.cifar100", "no pretrained weights"),
        ("local-dir:/nowhere/\N{GRINNING FACE}", "/nowhere/\N{GRINNING FACE}"),
    ):
        code, _, err = conam(*command, name)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert sentence in err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(conam, teacher: str, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["resnet20_conam.cifar10", "--data", data, "--output", tmp_path / "run", *settings, "--dry-run"]
    for words in (["train", *command], ["distill", *command, "--teacher", teacher]):
        code, out, _ = conam(*words)
        assert code == 0
        for part in ("275,674 parameters", "32 of 10 classes", "1 epochs x 2 = 2", "MiB", "minutes", "checkpoint.safe"):
            assert part in out
    assert sorted(tmp_path.rglob("*")) == before
