"""A whole training on small synthetic images: what it writes, that it learns, what it refuses."""

import csv
import itertools
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import PLAIN_RECIPE
from PIL import Image
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import conam_zoo.training.distributed as distributed
import conam_zoo.training.engine as engine_module
import conam_zoo.training.fit as fit_module
from conam_zoo.data import ImageSplit
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.models.registry import count_params_and_macs
from conam_zoo.training.checkpoint import load_checkpoint, save_checkpoint
from conam_zoo.training.distributed import precision_on, ranks
from conam_zoo.training.engine import NonFiniteLossError, score
from conam_zoo.training.evaluate import evaluate
from conam_zoo.training.fit import fit
from conam_zoo.training.recipe import Recipe, list_recipes, load_recipe, recipe_from_dict
from conam_zoo.training.run_folder import describe_environment
from conam_zoo.training.train import assemble, dry_run, train
from conam_zoo.training.train_state import MovingAverage, TrainState

pytestmark = pytest.mark.slow

TINY = [
    *("epochs=2", "warmup_epochs=0.5", "batch_size=32", "lr=0.05", "ema_decay=0.5", "precision=fp32", "image_size=16"),
    "model_args={patch_sizes=[4, 4, 2]}",  # an image of a quarter of the size has as many patches
]

LOCK_FILES = {".conam-lock", ".conam-holder"}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(PLAIN_RECIPE, TINY)


def test_a_run_learns_and_writes_what_it_promises(recipe: Recipe, small_data: Path, tmp_path: Path) -> None:
    run = train(replace(recipe, epochs=6), small_data, tmp_path / "run", command="conam train ...")
    assert run["scores"]["top1_percent"] > 30  # chance is 10
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == run
    assert set(run) >= {"recipe", "command", "scores", "hardware", "library_versions", "code_commit", "sha256"}
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'final'}", pretrained=True)
    assert model.pretrained_cfg["label_names"][0] == "airplane"
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    raw = load_file(tmp_path / "run" / "raw" / "model.safetensors")
    state = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    for stored, kept in ((final, state["ema"]), (raw, state["model"])):
        assert all(torch.equal(stored[name], kept[name].to(stored[name].dtype)) for name in stored)
    assert not torch.equal(final["conv1.weight"], raw["conv1.weight"])
    assert not (tmp_path / "run" / "ema").exists()  # it is final/
    timm.create_model(f"local-dir:{tmp_path / 'run' / 'raw'}", pretrained=True)
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")) == replace(recipe, epochs=6)


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_shows_every_epoch_once_after_a_resume(recipe: Recipe, small_data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe, small_data, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()  # as if the second epoch's end had been lost
    train(recipe, small_data, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    for name in ("loss", "lr", "train_top1_percent"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in rows]


@pytest.mark.usefixtures("no_curves")
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    hashes = [
        train(replace(recipe, epochs=1, warmup_epochs=0.0, seed=seed), small_data, tmp_path / name)["sha256"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.usefixtures("no_curves")
def test_the_test_split_is_not_opened_before_the_last_epoch_is_done(
    recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load, epoch = np.load, fit_module.train_one_epoch

    def recording_load(path, *args, **kwargs):
        events.append(Path(path).name)
        return load(path, *args, **kwargs)

    def recording_epoch(*args, **kwargs):
        events.append("epoch")
        return epoch(*args, **kwargs)

    monkeypatch.setattr(np, "load", recording_load)
    monkeypatch.setattr(fit_module, "train_one_epoch", recording_epoch)
    train(recipe, small_data, tmp_path / "run")
    assert events[:4] == ["train_images.npy", "train_labels.npy", "epoch", "epoch"]
    assert {"test_images.npy", "test_labels.npy"} <= set(events[4:])  # the training images' range of values serves both
    assert "epoch" not in events[4:]


@pytest.mark.usefixtures("no_curves")
def test_a_choosing_run_never_opens_the_test_split(recipe: Recipe, small_data: Path, tmp_path: Path) -> None:
    for name in ("test_images.npy", "test_labels.npy"):
        (small_data / "cifar10" / name).unlink()
    run = train(replace(recipe, holdout=40), small_data, tmp_path / "run")
    assert run["evaluated_on"] == "held-out training images"
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert all(0 <= float(row["holdout_top1_percent"]) <= 100 for row in rows)


@pytest.mark.usefixtures("no_curves")
def test_images_can_be_averaged_down_for_a_cheap_comparison(recipe: Recipe, small_data: Path, tmp_path: Path) -> None:
    small = replace(recipe, image_size=16, model_args={"patch_sizes": [4, 4, 2]}, holdout=40)
    assert assemble(small, small_data, ranks()).holdout.images.shape == (40, 16, 16, 3)
    plan = dry_run(small, small_data, tmp_path / "run")
    assert 4 * plan["macs"] == pytest.approx(count_params_and_macs("resnet20_conam.cifar10")[1], rel=0.01)
    for holdout, on in ((40, "held-out training images"), (0, "test images")):
        run = train(replace(small, holdout=holdout), small_data, tmp_path / f"run{holdout}")
        assert run["evaluated_on"] == on
        model = timm.create_model(f"local-dir:{tmp_path / f'run{holdout}' / 'final'}", pretrained=True)
        assert model.pretrained_cfg["input_size"] == (3, 16, 16)
    scores = evaluate(model.eval(), small_data, "cifar10", run=tmp_path / "run0").scores
    assert vars(scores) == pytest.approx(run["scores"], abs=1e-5)
    with pytest.raises(UserError, match=r"image_size is 12, but the images of .* have 32 x 32 pixels: set it to a div"):
        train(replace(small, image_size=12), small_data, tmp_path / "bad")


def test_a_recipe_as_json_has_it_is_the_same_whether_made_of_tuples_or_lists(recipe: Recipe) -> None:
    given = replace(recipe, model_args={"patch_sizes": (4, 4, 2)}).to_dict()
    assert given["model_args"] == {"patch_sizes": [4, 4, 2]}
    assert recipe_from_dict(given, "here").to_dict() == given


def test_a_pixel_averaged_down_is_the_mean_of_its_square() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    split = ImageSplit(images, torch.arange(3), ("a", "b", "c"), "it", ("x", "y", "z"))
    small = split.averaged_down(4)
    assert (small.images.shape, small.images.dtype) == ((3, 4, 4, 3), torch.uint8)
    for index, row, column, channel in ((0, 0, 0, 0), (2, 3, 1, 2), (1, 2, 3, 1)):
        square = images[index, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, channel].double()
        assert abs(float(small.images[index, row, column, channel]) - float(square.mean())) <= 0.5
    assert (small.classes, small.names, small.source) == (split.classes, split.names, split.source)
    assert torch.equal(split.averaged_down(8).images, images)
    with pytest.raises(UserError, match="image_size is 4, but the images of it have 8 x 6 pixels"):
        replace(split, images=images[:, :, :6]).averaged_down(4)


@pytest.mark.parametrize("supported", [True, False, None])
def test_bf16_is_for_devices_that_multiply_in_it(
    supported: bool | None, recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(distributed, "has_bf16", lambda device: supported)
    assert precision_on(torch.device("cpu")) == ("bf16" if supported else "fp32")
    assert precision_on(torch.device("cpu"), "fp32") == "fp32"
    seen = []
    forward = torch.nn.Conv2d.forward

    def watched(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(conv, x)

    asked = replace(recipe, precision="bf16", epochs=1, warmup_epochs=0.0)
    assert dry_run(asked, small_data, tmp_path / "run")["device"].endswith("bf16" if supported else "fp32")
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    state = TrainState(timm.create_model("resnet20_conam"), asked, 1)
    state.accumulate([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))], 2)
    assert set(seen) == {bool(supported)}
    monkeypatch.undo()
    monkeypatch.setattr(distributed, "has_bf16", lambda device: supported)
    run = train(replace(asked, holdout=130), small_data, tmp_path / "run")
    assert run["precision"] == ("bf16" if supported else "fp32")
    assert run["recipe"]["precision"] == "bf16"
    out = " ".join(capsys.readouterr().out.split())
    assert ("bf16 is left out" in out) is not bool(supported)
    assert ("this cpu has no instructions for it" in out) is (supported is False)
    assert ("PyTorch does not say whether this CPU has bfloat16 instructions" in out) is (supported is None)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(NonFiniteLossError, match=r"epoch \d, step \d of 5, at learning rate"):
        train(replace(recipe, lr=1e30, epochs=3), small_data, output, checkpoint_minutes=0)
    assert not (output / "final").exists()
    state = load_checkpoint(output / "checkpoint.safetensors")
    assert state["facts"]["step"] >= 1
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


@pytest.mark.parametrize("every", [1, 20])
def test_a_non_finite_loss_names_its_step_however_late_it_is_looked_at(
    every: int, recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the losses are looked at every 20 steps; here the CPU does so, too."""
    monkeypatch.setattr(engine_module, "steps_between_checks", lambda device: every)
    accumulate, calls = TrainState.accumulate, []

    def fails_at_the_eighth_step(self, *args):
        calls.append(1)
        loss, hits = accumulate(self, *args)
        return (loss * float("inf") if len(calls) == 8 else loss), hits

    monkeypatch.setattr(TrainState, "accumulate", fails_at_the_eighth_step)
    with pytest.raises(NonFiniteLossError, match=r"The loss is inf in epoch 2, step 3 of 5, at learning rate 0.0\d+:"):
        train(recipe, small_data, tmp_path / "run", checkpoint_minutes=0)
    facts = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["facts"]
    assert (facts["epoch"], facts["step"]) == (1, 2)
    assert len(calls) == 8


def test_a_second_run_into_the_same_folder_is_refused(recipe: Recipe, small_data: Path, tmp_path: Path) -> None:
    train(replace(recipe, epochs=1, warmup_epochs=0.0), small_data, tmp_path / "run")
    with pytest.raises(UserError, match="add --resume"):
        train(recipe, small_data, tmp_path / "run")
    with pytest.raises(UserError, match="another recipe"):
        train(recipe, small_data, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="no checkpoint"):
        train(recipe, small_data, tmp_path / "other", resume=True)


def test_data_of_another_kind_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    from conftest import write_arrays

    write_arrays(tmp_path / "data", ("ant", "bee"), {"train": 8, "test": 4})
    with pytest.raises(UserError, match="does not hold the classes of CIFAR-10"):
        train(recipe, tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, model=model, ema=None, optimizer=optimizer, facts={"log": [{"epoch": 1, "x": None}]})
    state = load_checkpoint(path)
    assert state["facts"] == {"log": [{"epoch": 1, "x": None}]}
    assert state["ema"] is None
    other = torch.optim.SGD(model.parameters(), lr=0.5)
    other.load_state_dict(state["optimizer"])
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for key, buffers in optimizer.state_dict()["state"].items():
        assert torch.equal(other.state_dict()["state"][key]["momentum_buffer"], buffers["momentum_buffer"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", list_recipes())
def test_every_packaged_recipe_is_whole_and_opens_with_its_facts(name: str, checkout: Path) -> None:
    recipe = load_recipe(name)
    assert name.split(".")[:2] == [recipe.model, recipe.dataset]  # a third part tells recipes of the same net apart
    assert recipe.holdout == 0
    head = (checkout / "conam_zoo" / "training" / "recipes" / f"{name}.toml").read_text().splitlines()[:4]
    assert [line.split()[1] for line in head] == ["Command", "Hardware", "Time", "Result"]
    assert f"conam train {name} " in head[0]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("epochs", "has no '='"),
        ("epohcs=3", "no setting 'epohcs'"),
        ("epochs=many", "must be a whole number"),
        ("epochs=1.5", "must be a whole number"),
        ("flip=1", "must be true or false"),
        ("lr=fast", "must be a number"),
        ("lr=-1", "out of its range"),
        ("precision=fp8", "out of its range"),
        ("ema_decay=0", "final_weights is 'ema'"),
        ("model_args=3", "must be a table"),
        ("grad_accumulation=0", "out of its range"),
        ("distill_weight=1.5", "out of its range"),
        ("distill_temperature=0", "out of its range"),
        ("clip_grad=-1", "out of its range"),
        ("early_size=24", "early_size is 24 and early_epochs 0: set both, or none"),
        ("early_epochs=1000", "out of its range"),
        ("image_size=4", "out of its range"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(PLAIN_RECIPE, [setting])


def test_settings_replace_values_and_unknown_recipes_are_refused(tmp_path: Path) -> None:
    assert load_recipe(PLAIN_RECIPE, ["lr=1", "opt=adamw"]).lr == 1.0
    with pytest.raises(UserError, match=r"There is no recipe 'nonsense': did you mean resnet20_conam\.cifar10\?"):
        load_recipe("nonsense")
    with pytest.raises(UserError, match=r"There is no recipe 'wide_resnet16_4': did you mean wide_resnet16_4_conam\."):
        load_recipe("wide_resnet16_4")
    (tmp_path / "mine.toml").write_text("epochs = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_a_recipe_survives_being_written(tmp_path: Path) -> None:
    recipe = load_recipe(PLAIN_RECIPE, ["lr=1e-7", "mixup=0.2", 'teacher=a "b" \\\\ c: é'])
    recipe = replace(recipe, model_args={"patch_sizes": [8, 4, 2], "drop_rate": 0.1, "attn_layer": "se"})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), "it") == recipe


def test_settings_that_came_later_may_be_absent() -> None:
    recipe = load_recipe(PLAIN_RECIPE)
    late = ("cutout", "mixup", "cutmix", "grad_accumulation", "clip_grad", "teacher")
    early = {key: value for key, value in recipe.to_dict().items() if key not in (*late, "distill_weight")}
    assert recipe_from_dict(early, "an old run") == recipe


def test_scores_agree_with_counting_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, generator=generator) * 3
    labels = torch.randint(8, (200,), generator=generator)
    scores = score(logits, labels)
    probabilities = logits.double().softmax(1).numpy()
    order = np.argsort(-probabilities, axis=1)
    assert scores.top1_percent == pytest.approx(100 * np.mean(order[:, 0] == labels.numpy()))
    assert scores.top5_percent == pytest.approx(
        100 * np.mean([t in o[:5] for t, o in zip(labels.numpy(), order, strict=True)])
    )
    assert scores.nll == pytest.approx(-np.mean(np.log(probabilities[np.arange(200), labels.numpy()])))
    confidence, correct = probabilities.max(1), order[:, 0] == labels.numpy()
    ece = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert scores.ece == pytest.approx(ece)


def test_accumulated_batches_give_the_step_of_one_large_batch(recipe: Recipe, small_data: Path) -> None:
    """With the batch norms in evaluation mode, where the batches do not see each other."""
    weights = []
    for accumulation in (1, 2):
        changed = replace(recipe, grad_accumulation=accumulation, opt="sgd")
        parts = assemble(changed, small_data, ranks())
        parts.model.requires_grad_(True).eval()
        state = TrainState(parts.model, changed, parts.batches.steps)
        stream = parts.batches.epoch(0)
        group = [next(stream) for _ in range(accumulation)]
        loss, _ = state.accumulate(group, sum(len(targets) for _, targets in group))
        state.step(1)
        weights.append((loss, parts.model.fc.weight.detach(), parts.model.conv1.weight.detach()))
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_long_gradient_is_clipped(recipe: Recipe, small_data: Path) -> None:
    parts = assemble(replace(recipe, clip_grad=1e-3), small_data, ranks())
    state = TrainState(parts.model, replace(recipe, clip_grad=1e-3), parts.batches.steps)
    state.train()
    batch = next(parts.batches.epoch(0))
    state.accumulate([batch], len(batch[1]))
    state.step(1)
    norm = torch.stack([p.grad.norm() for p in parts.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_frozen_layers_stay_as_they_were_and_groups_learn_at_their_own_rates(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    recipe = replace(recipe, epochs=1, warmup_epochs=0.0, weight_decay=0.1)
    parts = assemble(recipe, small_data, ranks())
    model = parts.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [{"params": [model.fc.weight], "lr_scale": 1.0}, {"params": [model.fc.bias], "lr_scale": 0.0}]
    result = fit(model, recipe, parts.batches, tmp_path / "run", param_groups=groups)
    changed = {name for name, tensor in result.raw.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight"}  # no batch norm's statistics either
    assert result.ema is result.final


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_a_fused_optimiser_does_what_the_plain_one_does(opt: str, recipe: Recipe, small_data: Path) -> None:
    weights = []
    for fused in (True, False):
        changed = replace(recipe, opt=opt, lr=1e-3, warmup_epochs=0.0)
        parts = assemble(changed, small_data, ranks())
        model = parts.model.to(memory_format=torch.channels_last if fused else torch.contiguous_format)
        state = TrainState(model, changed, parts.batches.steps)
        assert state.optimizer.defaults.get("fused") is (None if opt == "lamb" else True)
        if not fused:
            state.optimizer = create_optimizer_v2(
                model, opt=opt, lr=1e-3, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=False
            )
        for parameter in model.parameters():
            position = torch.arange(parameter.numel()).reshape(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(0.1 * torch.cos(0.37 * position))
        for _ in range(3):
            state.optimizer.step()
        weights.append(dict(model.named_parameters()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-5, atol=1e-6)


def test_the_moving_average_is_that_of_timm() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    ours, theirs = MovingAverage(net, 0.9), ModelEmaV3(net, decay=0.9, use_warmup=True)
    for step in range(1, 5):
        net(torch.randn(2, 3, 5, 5))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(net, step=step)
        theirs.update(net, step=step)
    for name, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], tensor), name
    assert ours.module[1].num_batches_tracked == 4
    whole = MovingAverage(net, 0.999)
    assert [whole.get_decay(step) for step in (1_000, 31_000, 32_000)] == pytest.approx(
        [1 - 1_000 ** (-2 / 3), 1 - 31_000 ** (-2 / 3), 0.999], abs=1e-5
    )


def test_the_commit_is_that_of_a_checkout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_environment()["code_commit"]
    monkeypatch.setattr("conam_zoo.training.run_folder.find_checkout", lambda: None)
    assert describe_environment()["code_commit"] is None


def test_records_and_documents_leave_the_commit_clean_and_code_and_weights_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    kept = ("conam_zoo/a.py", "weights_manifest.json", "docs/a.csv", "README.md", "experiments/results/a.json")
    for name in kept:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    git("init"), git("add", "."), git("commit", "-m", "all")
    monkeypatch.setattr("conam_zoo.training.run_folder.__file__", str(tmp_path / "conam_zoo" / "a.py"))
    clean = describe_environment()["code_commit"]
    assert clean
    assert "dirty" not in clean
    for name in kept[2:]:
        (tmp_path / name).write_text("after")
    assert describe_environment()["code_commit"] == clean
    for name in kept[:2]:
        (tmp_path / name).write_text("after")
        assert describe_environment()["code_commit"] == f"{clean}-dirty", name
        (tmp_path / name).write_text("before")


def test_the_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    recipe = load_recipe(PLAIN_RECIPE, ["epochs=10", "warmup_epochs=2", "lr=1", "min_lr=0.1", "precision=fp32"])
    state = TrainState(torch.nn.Linear(2, 2), recipe, 5)
    rates = []
    for update in range(50):
        rates.append(state.lr)
        state.scheduler.step_update(update + 1)
    rising = [0.01 + 0.099 * step for step in range(10)]
    falling = [0.1 + 0.45 * (1 + np.cos(np.pi * step / 50)) for step in range(10, 50)]
    np.testing.assert_allclose(rates, rising + falling)


def test_label_smoothing_reaches_the_loss() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    for smoothing in (0.0, 0.1):
        state = TrainState(net, load_recipe(PLAIN_RECIPE, [f"label_smoothing={smoothing}", "precision=fp32"]), 1)
        loss, _ = state.accumulate([(images, labels)], 4)
        expected = torch.nn.functional.cross_entropy(net(images), labels, label_smoothing=smoothing, reduction="sum")
        torch.testing.assert_close(loss, expected.double())


def test_a_compiled_net_learns_the_same(
    recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for a backend that runs the captured operations as they are, so that every bit has to agree."""
    recipe = replace(recipe, epochs=1, warmup_epochs=0.0, batch_size=48)  # the last batch of 16 is not compiled
    recipe = replace(recipe, model_args={"attn_layer": "none"})  # ConAM's own backward pass is not the compiled one
    real, modes, sizes = torch.compile, [], []

    def recording_compile(net, *, dynamic: bool, mode: str):
        modes.append(mode)
        compiled = real(net, dynamic=dynamic, backend="eager")
        return lambda images: sizes.append(len(images)) or compiled(images)

    monkeypatch.setattr(torch, "compile", recording_compile)
    compiled = train(recipe, small_data, tmp_path / "compiled", compile=True)
    eager = train(recipe, small_data, tmp_path / "eager")
    assert modes == ["default"]  # CUDA graphs are for GPUs
    assert sizes == [48, 48, 48]
    assert compiled["sha256"] == eager["sha256"]
    assert compiled["compile_seconds"] > 0
    assert eager["compile_seconds"] is None


def test_a_plan_says_what_a_training_then_does_and_writes_nothing(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    plan = dry_run(replace(recipe, holdout=30), small_data, output)
    assert sorted(tmp_path.rglob("*")) == before
    assert (plan["images"], plan["held_out"], plan["classes"]) == (130, 30, 10)
    assert (plan["steps_per_epoch"], plan["total_steps"]) == (5, 10)  # the last step has 2 images
    facts = count_params_and_macs(
        "resnet20_conam.cifar10", pretrained_cfg_overlay=recipe.cfg_overlay, **recipe.model_args
    )
    assert (plan["parameters"], plan["macs"]) == facts
    assert plan["estimated_minutes"] == pytest.approx(10 * plan["seconds_per_step"] / 60)
    assert plan["peak_memory_bytes"] > 2**24
    assert plan["compile_seconds"] is None
    train(replace(recipe, holdout=30), small_data, output)
    made = {f"{path.name}/" if path.is_dir() else path.name for path in output.iterdir()} - LOCK_FILES
    assert made == set(plan["files"])
    with pytest.raises(UserError, match="holds a training already"):
        dry_run(recipe, small_data, output)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("momentum=-1", "at least 0 and below 1"),
        ("min_lr=nan", "no more than lr"),
        ("lr=inf", "above 0 and finite"),
        ("weight_decay=inf", "at least 0 and finite"),
        ("seed=99999999999999999999999", "64 bits"),
        ("cutout=100000000000000000000000", "0 to 4096 pixels"),
        ("crop_padding=100000", "0 to 4096 pixels"),
        ("warmup_epochs=1000", "less than epochs, which is"),
        ("grad_accumulation=100000", "no more than batch_size, which is"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_range(setting: str, reason: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"The setting {key} is .*out of its range: it must .*{reason}"):
        load_recipe(PLAIN_RECIPE, [setting])


def test_the_warm_up_shrinks_with_the_epochs_but_one_that_was_asked_for_does_not(tmp_path: Path) -> None:
    name = "resnet56_conam.cifar100"
    whole, short = load_recipe(name), load_recipe(name, ["epochs=8"])
    assert short.warmup_epochs == pytest.approx(whole.warmup_epochs * 8 / whole.epochs)
    assert short.dkd_warmup_epochs == pytest.approx(whole.dkd_warmup_epochs * 8 / whole.epochs)
    assert load_recipe(name, ["epochs=8", "warmup_epochs=4"]).warmup_epochs == 4
    (tmp_path / "whole.toml").write_text(load_recipe("resnet20_conam.cifar10").to_toml())  # with what "kd" ignores
    assert load_recipe(str(tmp_path / "whole.toml"), ["epochs=7"]).dkd_warmup_epochs == pytest.approx(2)
    assert load_recipe(name, [f"epochs={2 * whole.epochs}"]).warmup_epochs == whole.warmup_epochs
    scheduler = TrainState(timm.create_model("resnet20_conam"), replace(short, precision="fp32"), 100).scheduler
    rates = [scheduler._get_lr(step)[0] for step in range(800)]
    # A warm-up of nearly all epochs would leave the cosine in its last part, at a fraction of the peak.
    assert max(abs(after - before) for before, after in itertools.pairwise(rates)) < 0.03 * short.lr
    with pytest.raises(UserError, match="less than epochs, which is 1"):
        load_recipe(PLAIN_RECIPE, ["epochs=1", "warmup_epochs=3"])


def test_an_unknown_setting_gets_the_nearest_names_and_a_broken_recipe_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no setting 'momentun': did you mean momentum"):
        load_recipe(PLAIN_RECIPE, ["momentun=0.5"])
    (tmp_path / "latin.toml").write_bytes("model = 'é'".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(tmp_path / "latin.toml"))
    (tmp_path / "huge.toml").touch()
    os.truncate(tmp_path / "huge.toml", 10**11)
    with pytest.raises(UserError, match="has more than"):
        load_recipe(str(tmp_path / "huge.toml"))
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="a pipe, a device or a socket"):
        load_recipe(str(tmp_path / "pipe.toml"))
    whole = load_recipe(PLAIN_RECIPE)
    (tmp_path / "marked.toml").write_text(whole.to_toml(), encoding="utf-8-sig")
    assert load_recipe(str(tmp_path / "marked.toml")) == whole
    with pytest.raises(UserError, match="nested too deeply"):
        load_recipe(PLAIN_RECIPE, ["model_args=" + "[" * 5000 + "]" * 5000])


def test_the_early_epochs_shrink_as_well_and_end_where_none_is_left() -> None:
    name = "wide_resnet16_4_conam.cifar10"
    whole, short, single = (load_recipe(name, settings) for settings in ([], ["epochs=5"], ["epochs=1"]))
    assert (short.early_size, short.early_epochs) == (whole.early_size, 5 * whole.early_epochs // whole.epochs)
    assert (single.early_size, single.early_epochs) == (0, 0)
    given = load_recipe(name, ["epochs=2", "early_epochs=1"])
    assert (given.early_size, given.early_epochs) == (whole.early_size, 1)
    assert load_recipe(name, ["epochs=1", "early_epochs=1"]).early_size == whole.early_size
    with pytest.raises(UserError, match="early_epochs is 9, which is out of its range"):
        load_recipe(name, ["epochs=5", "early_epochs=9"])


@pytest.mark.parametrize(
    ("dataset", "setting", "instead"),
    [("cifar100", "distill_weight=0.2", "dkd_alpha or dkd_beta"), ("cifar10", "dkd_beta=1", "distill_weight")],
)
def test_a_weight_of_the_other_loss_is_refused(dataset: str, setting: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"{setting.partition('=')[0]} has no effect, .*{instead}"):
        load_recipe(f"resnet20_conam.{dataset}", [setting])


def test_missing_test_images_are_missed_before_the_first_step(
    recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, folders, archive = tmp_path / "arrays", tmp_path / "folders", tmp_path / "set.npz"
    shutil.copytree(small_data, arrays, ignore=shutil.ignore_patterns("test*"))
    for name in DATASETS["cifar10"].classes:
        (folders / "train" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folders / "train" / name / "0.png")
    monkeypatch.setattr(TrainState, "step", lambda self, updates: pytest.fail("a step was made"))
    images, labels = (np.load(arrays / "cifar10" / f"train_{kind}.npy") for kind in ("images", "labels"))
    np.savez(archive, x_train=images, y_train=labels, classes=np.array(DATASETS["cifar10"].classes))
    for place in (arrays, folders, archive):
        with pytest.raises(UserError, match=r"neither test_images nor a folder test or val: .* --set holdout"):
            train(recipe, place, tmp_path / "run")
        with pytest.raises(UserError, match=r"neither test_images"):
            dry_run(recipe, place, tmp_path / "run")
        assert assemble(replace(recipe, holdout=2), place, ranks()).holdout is not None


def test_a_compiler_that_is_missing_is_told(
    recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_nothing(net, **_):
        def fail(images):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(UserError, match=r"torch.compile fails here \(.*no working C\+\+ compiler.*leave out --compile"):
        train(recipe, small_data, tmp_path / "run", compile=True)
