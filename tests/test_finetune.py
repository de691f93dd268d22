"""Fine-tuning from real images to a report, on small parts of three sets that are not downloaded."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import conam_zoo  # noqa: F401 (registers the models)
import experiments.accuracy.finetune as finetune_module
from conam_zoo.data import ImageData, ImageSplit, open_images, read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.finetuning.net import finetune_recipe, freeze_layers, net_for_data, train_on
from conam_zoo.finetuning.run import finetune
from conam_zoo.layers.confidence import confidence_maps
from conam_zoo.models.registry import open_model
from conam_zoo.training.checkpoint import TrainingStopped
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.visualize.predict import predict
from experiments.accuracy.finetune import benchmark_finetune, digits, faces, few_of_cifar100, finetune_table

pytestmark = pytest.mark.slow

PRETRAINED = "resnet20_conam.cifar10"


def write_digits(root: Path, classes: int = 3, train: int = 16, test: int = 8) -> Path:
    """scikit-learn's digits as grey PNG files of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    for label in range(classes):
        for rank, index in enumerate(np.flatnonzero(loaded.target == label)[: train + test]):
            path = root / ("train" if rank < train else "test") / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(loaded.images[index] / 16 * 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """A finished run on digits: data, run folder, report."""
    folder = tmp_path_factory.mktemp("digits")
    data = write_digits(folder / "data")
    report = finetune(
        data,
        model=PRETRAINED,
        output=folder / "run",
        epochs=5,
        lr=0.02,
        flip=False,
        batch_size=8,
        quiet=True,
    )
    return data, folder / "run", report


def test_digits_are_learnt_and_the_run_folder_is_whole(finished: tuple[Path, Path, dict]) -> None:
    _, run, report = finished
    assert report["top1_percent"] > 60  # chance is 33
    assert (report["split"], report["images"]) == ("test", 24)
    assert json.loads((run / "report.json").read_text()) == report
    for name in ("report.md", "confusion.png", "curves.png", "log.csv", "run.json", "final/model.safetensors"):
        assert (run / name).is_file(), name
    facts = json.loads((run / "run.json").read_text())
    assert set(facts) >= {"recipe", "choices", "command", "hardware", "library_versions", "code_commit", "sha256"}
    assert facts["classes"] == {"0": 14, "1": 14, "2": 14}
    assert facts["scores"]["top1_percent"] == pytest.approx(report["top1_percent"])
    assert facts["recipe"]["flip"] is False
    log = (run / "log.csv").read_text().splitlines()
    columns = [number for number, name in enumerate(log[0].split(",")) if name.startswith("liveness ")]
    assert len(columns) == 3
    assert all(float(row.split(",")[column]) >= 0 for row in log[1:] for column in columns)


def test_the_weights_load_through_timm_and_carry_what_a_user_needs(finished: tuple[Path, Path, dict]) -> None:
    data, run, report = finished
    model = timm.create_model(f"local-dir:{run / 'final'}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert tuple(cfg["label_names"]) == ("0", "1", "2")
    assert (cfg["num_classes"], tuple(cfg["input_size"])) == (3, (3, 32, 32))
    assert tuple(cfg["mean"]) == open_model(PRETRAINED, pretrained=False).pretrained_cfg["mean"]
    scores = evaluate_on(model, read_split(data, "test", image_size=32))
    assert scores.top1_percent == pytest.approx(report["top1_percent"])
    paths = sorted((data / "test").glob("*/*.png"))
    said = [prediction.top[0][0] for prediction in predict(model, paths)]
    right = sum(path.parent.name == name for path, name in zip(paths, said, strict=True))
    assert 100 * right / len(paths) == pytest.approx(report["top1_percent"])


def test_a_run_continues_where_it_was_and_nowhere_else(
    finished: tuple[Path, Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run, report = finished
    same = {
        "model": PRETRAINED,
        "output": run,
        "epochs": 5,
        "lr": 0.02,
        "flip": False,
        "batch_size": 8,
        "quiet": True,
    }
    with pytest.raises(UserError, match="add --resume"):
        finetune(data, **same)
    facts = json.loads((run / "run.json").read_text())
    elsewhere = {"hardware": "another", "library_versions": {}, "code_commit": None}
    monkeypatch.setattr("conam_zoo.finetuning.run.describe_environment", lambda: elsewhere)
    assert finetune(data, **same, resume=True) == report
    assert json.loads((run / "run.json").read_text()) == facts  # of where it was trained
    assert finetune(f"{data.parent}/./{data.name}/", **same, resume=True)["top1_percent"] == report["top1_percent"]
    assert facts["precision"] == "fp32"
    with pytest.raises(UserError, match="freeze differ"):
        finetune(data, **same, resume=True, freeze="stem")


def test_an_interrupted_run_goes_on_to_the_same_weights(
    finished: tuple[Path, Path, dict], tmp_path: Path, stop_after
) -> None:
    same = {"model": PRETRAINED, "epochs": 2, "batch_size": 8, "layer_decay": 0.5, "quiet": True}
    finetune(finished[0], **same, output=tmp_path / "whole")
    stop_after(8, lambda: os.kill(os.getpid(), signal.SIGTERM))  # in the second epoch
    with pytest.raises(TrainingStopped, match="in epoch 2 after step"):
        finetune(finished[0], **same, output=tmp_path / "cut")
    finetune(finished[0], **same, output=tmp_path / "cut", resume=True)
    whole, cut = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    assert cut["sha256"] == whole["sha256"]


def made_up(count: int = 12, size: int = 32, classes: int = 2) -> ImageData:
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    split = ImageSplit(images, labels, tuple("abcdefghij"[:classes]), "made up")
    return ImageData(split, None, split, split.classes, (count // classes,) * classes, size, size, "made up")


def recipe_for(data: ImageData, **choices):
    return finetune_recipe(PRETRAINED, "made up", data.image_size, images=12, **{"epochs": 1, **choices})


def test_batch_and_learning_rate_follow_from_the_number_of_images() -> None:
    def chosen(images: int, settings: list[str] | None = None, **choices) -> tuple[int, float]:
        recipe = finetune_recipe(PRETRAINED, "made up", 32, settings, images=images, **choices)
        return recipe.batch_size, recipe.lr

    assert chosen(5000)[0] == chosen(320)[0] == 32
    assert chosen(319)[0] == chosen(160)[0] == 16
    assert chosen(20)[0] == 8
    assert chosen(100)[1] == pytest.approx(chosen(5000)[1] / 4)
    assert chosen(100, lr=0.5) == (8, 0.5)
    assert chosen(100, ["lr=0.5", "batch_size=4"], lr=0.1) == (4, 0.5)
    with pytest.raises(UserError, match="must be a whole number"):
        chosen(100, ["batch_size=many"])


@pytest.mark.parametrize(("freeze", "moved"), [("stem", "layer1"), ("layer2", "layer3"), ("backbone", "fc")])
def test_frozen_layers_stay_as_they_are(tmp_path: Path, freeze: str, moved: str) -> None:
    data = made_up()
    recipe = recipe_for(data, lr=0.1)
    net = net_for_data(PRETRAINED, data, recipe)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    left = freeze_layers(net.model, freeze)
    assert left == sum(p.numel() for p in net.model.parameters() if p.requires_grad)
    after = train_on(net, data, recipe, tmp_path / "run", quiet=True).model.state_dict()
    order = ("conv1", "bn1", "layer1", "layer2", "layer3", "fc")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name].cpu())}
    assert changed == set(order[order.index(moved) :])


def test_an_unknown_layer_is_refused() -> None:
    data = made_up()
    with pytest.raises(UserError, match=r"no layer 'layer9' to freeze: choose one of none, stem, layer1, .*backbone"):
        freeze_layers(net_for_data(PRETRAINED, data, recipe_for(data)).model, "layer9")


def test_layer_decay_moves_early_layers_less(tmp_path: Path) -> None:
    data = made_up()
    recipe = recipe_for(data, lr=0.05)
    shifts, rates = [], []
    for decay in (1.0, 0.3):
        net = net_for_data(PRETRAINED, data, recipe)
        before = net.model.conv1.weight.detach().clone()
        tuned = train_on(net, data, recipe, tmp_path / str(decay), layer_decay=decay, quiet=True)
        shifts.append(float((tuned.model.conv1.weight.detach().cpu() - before).norm()))
        rates.append([row["lr"] for row in tuned.log])
    assert shifts[1] < 0.01 * shifts[0]
    assert rates[1] == pytest.approx(rates[0])
    with pytest.raises(UserError, match="layer decay is 2"):
        train_on(net, data, recipe, tmp_path / "other", layer_decay=2)


def test_weight_decay_spares_attention_with_and_without_layer_decay(tmp_path: Path) -> None:
    """With a decay far beyond any use, weights of convolutions vanish in a few steps; those of ConAM stay."""
    data = made_up()
    recipe = recipe_for(data, lr=1e-3, weight_decay=100.0, momentum=0.1, batch_size=4)
    for decay in (1.0, 0.9):
        net = net_for_data(PRETRAINED, data, recipe)
        before = {name: tensor.norm().item() for name, tensor in net.model.named_parameters()}
        tuned = train_on(net, data, recipe, tmp_path / str(decay), layer_decay=decay, quiet=True)
        left = {name: tensor.norm().item() / before[name] for name, tensor in tuned.model.named_parameters()}
        assert left["layer3.2.conv2.weight"] < 0.9
        attention = {name: share for name, share in left.items() if ".attn." in name}
        assert len(attention) > 6
        assert all(share > 0.99 for share in attention.values()), attention


@pytest.mark.parametrize("size", [32, 64, 96])
def test_patches_grow_with_the_images(size: int) -> None:
    data = made_up(2, size)
    net = net_for_data(PRETRAINED, data, recipe_for(data)).model
    assert net.patch_sizes == (8 * size // 32, 8 * size // 32, 4 * size // 32)
    assert net.pretrained_cfg["input_size"] == (3, size, size)
    _, maps = confidence_maps(net.eval(), torch.zeros(1, 3, size, size))
    assert [tuple(map_.shape) for map_ in maps.values()] == [(1, 4, 4)] * 3


def test_a_net_from_scratch_takes_the_statistics_of_the_images() -> None:
    data = made_up()
    net = net_for_data(PRETRAINED, data, recipe_for(data), from_scratch=True)
    pixels = data.train.images.double() / 255
    np.testing.assert_allclose(net.model.pretrained_cfg["mean"], pixels.mean((0, 1, 2)), atol=1e-9)
    np.testing.assert_allclose(net.model.pretrained_cfg["std"], pixels.std((0, 1, 2), correction=0), atol=1e-9)
    assert net.started_from == "random numbers"


def test_the_head_is_new_for_as_many_other_classes_and_kept_for_the_same() -> None:
    head = open_model(PRETRAINED).fc.weight
    data = made_up(20, classes=10)
    first, again, other = (net_for_data(PRETRAINED, data, recipe_for(data, seed=seed)) for seed in (0, 0, 1))
    assert first.new_head
    assert not torch.equal(first.model.fc.weight, head)
    assert torch.equal(first.model.fc.weight, again.model.fc.weight)
    assert not torch.equal(first.model.fc.weight, other.model.fc.weight)
    same = replace(data, classes=DATASETS["cifar10"].classes)
    kept = net_for_data(PRETRAINED, same, recipe_for(data))
    assert not kept.new_head
    assert torch.equal(kept.model.fc.weight, head)
    assert net_for_data(PRETRAINED, same, recipe_for(data), from_scratch=True).new_head


def test_mixed_targets_and_balance_train(tmp_path: Path) -> None:
    data = made_up()
    recipe = recipe_for(data, mixup=0.2, cutmix=1.0, cutout=8)
    tuned = train_on(
        net_for_data(PRETRAINED, data, recipe),
        data,
        recipe,
        tmp_path / "run",
        balance=True,
        quiet=True,
    )
    assert torch.isfinite(tuned.logits).all()


def test_balance_changes_what_is_learnt(tmp_path: Path) -> None:
    data = made_up()
    few = torch.cat([torch.nonzero(data.train.labels == 0)[:2, 0], torch.nonzero(data.train.labels == 1)[:, 0]])
    data = replace(data, train=data.train.select(few), counts=(2, len(few) - 2))
    recipe = recipe_for(data, epochs=1)
    hashes = set()
    for balance in (False, True):
        net = net_for_data(PRETRAINED, data, recipe)
        hashes.add(train_on(net, data, recipe, tmp_path / f"{balance}", balance=balance, quiet=True).sha256)
    assert len(hashes) == 2


def test_the_command_hands_balance_on(tmp_path: Path, conam, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr("conam_zoo.finetuning.run.finetune", lambda **arguments: given.update(arguments))
    assert conam("finetune", tmp_path, "--model", PRETRAINED, "--output", tmp_path / "run", "--balance")[0] == 0
    assert given["balance"] is True


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", train=4, test=2)
    run = tmp_path / "run"
    for wrong, sentence in (
        ({"model": "resnet21_conam"}, "no model 'resnet21_conam'"),
        ({"settings": ["epohcs=3"]}, "no setting 'epohcs'"),
        ({"settings": ["epochs"]}, "has no '='"),
        ({"settings": ["image_size=16"]}, "image_size is 16, but fine-tuning has none: give --image-size"),
        ({"settings": ["teacher=resnet20_conam"]}, "fine-tuning has none: learn from a teacher with conam distill"),
        ({"freeze": "everything"}, "no layer 'everything'"),
        ({"image_size": 30}, "multiple of 8"),
        ({"image_size": 100_000}, "The image size is 100000, but it must be a multiple of 8 up to 1024"),
        ({"settings": ["model_args={drop=1}"]}, "model_args has 'drop', which no model takes"),
        ({"settings": ["model_args={num_classes=4}"]}, "holds num_classes"),
        ({"layer_decay": 0.0}, "layer decay is 0"),
        ({"layer_decay": 0.5, "settings": ["attn_lr_scale=0.1"]}, "attn_lr_scale is 0.1, but the layer decay, 0.5"),
        ({"settings": ["dkd_alpha=2"]}, "fine-tuning has none: learn from a teacher with conam distill"),
        ({"settings": ["model_args={patch_sizes=[8,8]}"]}, "which resnet20_conam.cifar10 refuses"),
        ({"model": "densenet40_12_conam", "from_scratch": True, "image_size": 40}, "need a multiple of 16"),
    ):
        with pytest.raises(UserError, match=sentence):
            finetune(data, **{"model": PRETRAINED, "output": run, "quiet": True, **wrong})
        assert not run.exists()
    (data / "test").rename(data / "elsewhere")
    (data / "elsewhere").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="neither test nor validation images"):
        finetune(data, model=PRETRAINED, output=run, val_share=0.0, quiet=True)


def test_the_command_says_its_choices_and_a_mistake_is_one_sentence(
    tmp_path: Path, conam: Callable[..., tuple[int, str, str]]
) -> None:
    data = write_digits(tmp_path / "data", classes=2, train=6, test=2)
    arguments = ("--model", PRETRAINED, "--output", tmp_path / "run", "--epochs", 1, "--no-flip")
    code, out, err = conam("finetune", data, *arguments)
    assert (code, err) == (0, "")
    for part in ("2: 0, 1", "32 px; the median short side is 8 px", "stays on the", "test images", "report.md"):
        assert part in out
    assert "conam finetune" in json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    (data / "train" / "0" / "broken.png").write_bytes(b"x")
    code, out, err = conam("finetune", data, *arguments[:3], tmp_path / "other")
    assert code == 2
    assert err.count("\n") == 1
    assert "broken.png" in err
    assert "--corrupt skip" in err
    assert not (tmp_path / "other").exists()


def test_few_images_of_new_classes(cifar_root: Path) -> None:
    few = few_of_cifar100(cifar_root, per_class=20)
    data = few.draw(0)
    assert (len(data.train), len(data.test), data.classes[0]) == (200, 1000, "bed")
    assert not set(data.classes) & set(read_split(cifar_root, "test", "cifar10").classes)
    assert torch.equal(few.draw(0).train.images, data.train.images)
    assert not torch.equal(few.draw(1).train.images, data.train.images)


def test_few_images_are_learnt_from_our_weights(cifar_root: Path, tmp_path: Path) -> None:
    data = few_of_cifar100(cifar_root, per_class=20).draw(0)
    data = replace(data, test=data.test.select(torch.arange(0, 1000, 5)))
    recipe = recipe_for(data, epochs=8, batch_size=16, lr=0.02)
    tuned = train_on(net_for_data(PRETRAINED, data, recipe), data, recipe, tmp_path / "run", quiet=True)
    assert 100 * (tuned.logits.argmax(1) == tuned.report_on.labels).double().mean() > 30  # chance is 10


def test_faces_are_told_from_other_patches(tmp_path: Path) -> None:
    data = faces(per_class=10).draw(0)
    assert (data.classes, len(data.train), len(data.test)) == (("face", "other"), 20, 180)
    data = replace(data, test=data.test.select(torch.arange(0, 180, 3)))
    recipe = recipe_for(data, epochs=8, batch_size=8, lr=0.02)
    tuned = train_on(net_for_data(PRETRAINED, data, recipe), data, recipe, tmp_path / "run", quiet=True)
    assert 100 * (tuned.logits.argmax(1) == tuned.report_on.labels).double().mean() > 75  # chance is 50


def test_the_benchmark_keeps_training_and_test_images_apart() -> None:
    data = digits(per_class=2).draw(3)
    assert isinstance(data.train, ImageSplit)
    assert (len(data.train), len(data.test)) == (20, 500)
    assert np.bincount(data.train.labels).tolist() == [2] * 10
    assert not {image.tobytes() for image in data.train.images.numpy()} & {
        i.tobytes() for i in data.test.images.numpy()
    }


def test_the_benchmark_records_every_seed_and_the_table_sums_it_up() -> None:
    few = faces(per_class=2)
    lines: list[str] = []
    record = benchmark_finetune([few], seeds=2, epochs=1, say=lines.append)
    (row,) = record["rows"]
    assert (len(row["pretrained"]), len(row["scratch"]), len(lines)) == (2, 2, 4)
    assert json.loads(json.dumps(record)) == record
    assert {"hardware", "library_versions", "minutes"} <= set(record)
    row["pretrained"], row["scratch"] = [80.0, 90.0], [70.0, 70.0]
    assert "| 85.0 ± 7.1 % | 70.0 ± 0.0 % | 15.0 ± 7.1 |" in finetune_table(record)


def test_the_command_measures_the_sets_of_the_table(
    experiments, cifar_root: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((checkout / "experiments" / "results" / "finetune.json").read_text())
    asked: list[list[str]] = []

    def benchmark_finetune(sets, *, say):  # the trainings take half an hour and are tested above
        asked.append([few.title for few in sets])
        return record

    monkeypatch.setattr(finetune_module, "benchmark_finetune", benchmark_finetune)
    code, out, err = experiments("finetune", "--data", cifar_root, "--json", tmp_path / "finetune.json")
    assert code == 0, err
    assert asked == [[row["set"] for row in record["rows"]]]
    assert json.loads((tmp_path / "finetune.json").read_text()) == record
    assert "from scratch" in out


def test_the_table_in_the_docs_is_that_of_the_committed_record(checkout: Path) -> None:
    record = json.loads((checkout / "experiments" / "results" / "finetune.json").read_text())
    text = (checkout / "docs" / "finetuning.md").read_text()
    assert finetune_table(record) in text
    few = record["rows"][0]
    assert np.mean(few["pretrained"]) - np.mean(few["scratch"]) > np.std(few["pretrained"], ddof=1)


def test_a_set_that_does_not_fit_into_memory_trains_the_same_bits(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", classes=2, train=8, test=2)
    hashes = []
    for name, free in (("here", None), ("there", 1)):
        images = open_images(data, free=free)
        assert isinstance(images.train, ImageSplit) == (free is None)
        recipe = recipe_for(images)
        net = net_for_data(PRETRAINED, images, recipe)
        hashes.append(train_on(net, images, recipe, tmp_path / name, workers=0, quiet=True).sha256)
    assert hashes[0] == hashes[1]
