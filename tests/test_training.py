"""A whole training on small synthetic images: what it writes, that it learns, that it resumes exactly."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import conam_zoo.training.train as train_module
from conam_zoo.errors import UserError
from conam_zoo.training.checkpoint import load_checkpoint, save_checkpoint
from conam_zoo.training.engine import NonFiniteLossError, score
from conam_zoo.training.recipe import Recipe, list_recipes, load_recipe
from conam_zoo.training.train import train

TINY = ["epochs=2", "warmup_epochs=0.5", "batch_size=32", "lr=0.05", "ema_decay=0.5", "precision=fp32"]


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("resnet20_conam.cifar10", TINY)


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
    ema = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["ema"]
    assert all(torch.equal(final[name], ema[name].to(final[name].dtype)) for name in final)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    hashes = [
        train(replace(recipe, epochs=1, warmup_epochs=0.0, seed=seed), small_data, tmp_path / name)["sha256"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_killed_between_epochs_resumes_to_bit_identical_weights(
    recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, model_args={"drop_rate": 0.2})  # dropout draws random numbers too
    whole = train(recipe, small_data, tmp_path / "whole")
    original = train_module.train_one_epoch

    def dies_in_the_second_epoch(*args, **kwargs):
        if kwargs["epoch"] == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(train_module, "train_one_epoch", dies_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, small_data, tmp_path / "cut")
    monkeypatch.setattr(train_module, "train_one_epoch", original)
    resumed = train(recipe, small_data, tmp_path / "cut", resume=True)
    assert resumed["sha256"] == whole["sha256"]
    assert resumed["scores"] == whole["scores"]


def test_the_test_split_is_not_opened_before_the_last_epoch_is_done(
    recipe: Recipe, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load, epoch = np.load, train_module.train_one_epoch

    def recording_load(path, *args, **kwargs):
        events.append(Path(path).name)
        return load(path, *args, **kwargs)

    def recording_epoch(*args, **kwargs):
        events.append("epoch")
        return epoch(*args, **kwargs)

    monkeypatch.setattr(np, "load", recording_load)
    monkeypatch.setattr(train_module, "train_one_epoch", recording_epoch)
    train(recipe, small_data, tmp_path / "run")
    assert events == [
        "train_images.npy",
        "train_labels.npy",
        "epoch",
        "epoch",
        "test_images.npy",
        "test_labels.npy",
    ]


def test_a_choosing_run_never_opens_the_test_split(recipe: Recipe, small_data: Path, tmp_path: Path) -> None:
    for name in ("test_images.npy", "test_labels.npy"):
        (small_data / "cifar10" / name).unlink()
    run = train(replace(recipe, holdout=40), small_data, tmp_path / "run")
    assert run["evaluated_on"] == "held-out training images"
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert all(0 <= float(row["holdout_top1_percent"]) <= 100 for row in rows)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteLossError, match=r"epoch \d, step \d of 5, at learning rate"):
        train(replace(recipe, lr=1e30, epochs=3), small_data, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()


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
    assert f"{recipe.model}.{recipe.dataset}" == name
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
    ],
)
def test_bad_settings_are_refused_in_a_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe("resnet20_conam.cifar10", [setting])


def test_settings_replace_values_and_unknown_recipes_are_refused(tmp_path: Path) -> None:
    assert load_recipe("resnet20_conam.cifar10", ["lr=1", "opt=adamw"]).lr == 1.0
    with pytest.raises(UserError, match="There is no recipe 'nonsense'"):
        load_recipe("nonsense")
    (tmp_path / "mine.toml").write_text("epochs = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(str(tmp_path / "mine.toml"))


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
