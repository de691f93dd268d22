"""The ONNX files beside weights: what is measured of them, and when none are published."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from small_entry import entry_for

import conam_zoo  # noqa: F401 (registers the models)
import conam_zoo.release.publish as publish_module
from conam_zoo.datasets import DATASETS
from conam_zoo.deploy.runtime import open_classifier
from conam_zoo.errors import UserError
from conam_zoo.models.registry import export_model
from conam_zoo.release.publish import make_onnx, write_onnx
from conam_zoo.training.evaluate import evaluate
from conam_zoo.weights import ONNX_FILES, Manifest, WeightEntry
from experiments.speed import onnx_files as benchmark
from experiments.speed.onnx_files import add_accuracy, benchmark_onnx, onnx_table

NAME = "resnet20_conam.cifar10"
FACTS = DATASETS["cifar10"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, WeightEntry]:
    """A folder of weights, a folder of data sets with 60 test images, and the entry with the net's score on them."""
    root = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    model = timm.create_model(NAME.partition(".")[0])
    export_model(model, root / NAME, tag="cifar10")
    (root / "data" / "cifar10").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(root / "data" / "cifar10" / f"{split}_images.npy", drawn.integers(0, 256, (60, 32, 32, 3), np.uint8))
        np.save(root / "data" / "cifar10" / f"{split}_labels.npy", np.arange(60) % 10)
    (root / "data" / "cifar10" / "classes.txt").write_text("\n".join(FACTS.classes) + "\n")
    data = (root / NAME / "model.safetensors").read_bytes()
    scores = evaluate(timm.create_model(f"local-dir:{root / NAME}", pretrained=True).eval(), root / "data", "cifar10")
    entry = entry_for(NAME, data, num_classes=10, classes=FACTS.classes, mean=FACTS.mean, std=FACTS.std)
    return root / NAME, root / "data", replace(entry, metrics=scores.scores)


@pytest.fixture(scope="module")
def exported(packed: tuple[Path, Path, WeightEntry], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ONNX files of those weights, which take many seconds to make."""
    folder, data, entry = packed
    root = tmp_path_factory.mktemp("exported")
    assert [path.relative_to(root).as_posix() for path in write_onnx(entry, folder, data, root)] == list(ONNX_FILES)
    return root


@pytest.fixture
def written_once(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for the files of those weights gets these."""

    def written(entry: WeightEntry, weights: Path, data: Path, folder: Path) -> Iterator[Path]:
        for path in ONNX_FILES:
            (folder / path).parent.mkdir(exist_ok=True)
            yield Path(shutil.copy(exported / path, folder / path))

    for module in (publish_module, benchmark):
        monkeypatch.setattr(module, "write_onnx", written)


@pytest.mark.slow
@pytest.mark.usefixtures("written_once")
def test_each_file_is_measured_itself(
    packed: tuple[Path, Path, WeightEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, entry = packed
    monkeypatch.setitem(DATASETS, "cifar10", replace(FACTS, test_images=60))
    made = make_onnx(entry, folder, data)
    assert tuple(made) == ONNX_FILES
    for path, precision in zip(ONNX_FILES, ("float32", "int8"), strict=True):
        known, content = made[path]
        assert (known.sha256, known.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        facts = {prop.key: prop.value for prop in onnx.load_from_string(content).metadata_props}
        assert (facts["precision"], facts["name"], facts["sha256"]) == (precision, NAME, entry.sha256)
        (tmp_path / "net.onnx").write_bytes(content)
        scores = evaluate(open_classifier(str(tmp_path / "net.onnx")), data, "cifar10").scores
        assert known.top1_percent == pytest.approx(scores.top1_percent, abs=1e-4)
    assert made[ONNX_FILES[0]][0].top1_percent == pytest.approx(entry.metrics.top1_percent)
    assert [p.name for p in folder.iterdir() if p.suffix == ".onnx"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("written_once")
@pytest.mark.parametrize(("images", "top1", "says"), [(10_000, None, "of 60 test images"), (60, 99.0, "says 99.00 %")])
def test_other_images_than_those_of_the_manifest_are_refused(
    packed: tuple[Path, Path, WeightEntry], monkeypatch: pytest.MonkeyPatch, images: int, top1: float | None, says: str
) -> None:
    folder, data, entry = packed
    monkeypatch.setitem(DATASETS, "cifar10", replace(FACTS, test_images=images))
    if top1 is not None:
        entry = replace(entry, metrics=replace(entry.metrics, top1_percent=top1))
    with pytest.raises(UserError, match=says):
        make_onnx(entry, folder, data)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say where the images are with --data, or leave these files out with --no-onnx"),
        (["--data", ".", "--no-onnx"], "--data is for the ONNX files that --no-onnx leaves out"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_the_command_publishes_nothing_that_is_not_measured(conam, arguments: list[str], sentence: str) -> None:
    code, out, err = conam("publish", NAME, "--namespace", "some-lab", "--dry-run", *arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_without_the_extra_that_is_said_at_once(conam, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else real(name, *rest))
    code, _, err = conam("publish", NAME, "--namespace", "some-lab", "--dry-run", "--data", ".")
    assert code == 2
    assert "pip install onnx onnxruntime onnxscript" in err
    assert "--no-onnx" in err


def test_nothing_is_published_whose_card_could_not_say_where_the_code_is(conam) -> None:
    code, out, err = conam("publish", NAME, "--namespace", "some-lab", "--no-onnx")
    assert (code, out) == (2, "")
    assert "set code_repository in" in err


def test_without_onnx_files_a_dry_run_shows_the_others(conam) -> None:
    code, out, err = conam("publish", NAME, "--namespace", "some-lab", "--dry-run", "--no-onnx")
    assert code == 0, err
    assert "model.safetensors" in out
    assert "onnx/" not in out


@pytest.fixture
def shipped(packed: tuple[Path, Path, WeightEntry], written_once: None, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A manifest of those weights, in the benchmark's eyes the only one."""
    manifest = Manifest({NAME: packed[2]})
    monkeypatch.setitem(DATASETS, "cifar10", replace(FACTS, test_images=60))
    monkeypatch.setattr(benchmark, "load_manifest", lambda: manifest)
    return manifest


@pytest.mark.slow
def test_top1_of_every_form_is_kept_by_name_and_shown_for_these_weights_alone(
    packed: tuple[Path, Path, WeightEntry], shipped: Manifest, tmp_path: Path
) -> None:
    folder, data, entry = packed
    path, speed = tmp_path / "accuracy.json", tmp_path / "speed.json"
    other = {"sha256": "ab" * 32, "top1_percent": {}}
    path.write_text(json.dumps({"weights": {"other.cifar10": other}}))
    row = add_accuracy(path, NAME, data, folder.parent)
    assert json.loads(path.read_text()) == {"weights": {"other.cifar10": other, NAME: row}}
    assert row["images"] == 60
    assert row["top1_percent"]["eager fp32"] == pytest.approx(entry.metrics.top1_percent, abs=1e-4)
    assert row["top1_percent"]["onnx fp32"] == pytest.approx(entry.metrics.top1_percent, abs=1e-4)
    table = onnx_table(shipped, path, speed)
    shown = " | ".join(f"{value:.2f} %" for value in row["top1_percent"].values())
    assert f"| `{NAME}` | {shown} |" in table
    assert "other.cifar10" not in table
    assert "Speed is not measured yet" in table
    retrained = Manifest({NAME: replace(entry, sha256="cd" * 32)})
    assert f"| `{NAME}` | not measured | not measured | not measured |" in onnx_table(retrained, path, speed)


@pytest.mark.slow
def test_speed_stands_beside_eager_pytorch_of_the_same_run(
    packed: tuple[Path, Path, WeightEntry], shipped: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, _ = packed
    seconds = {"eager fp32": 8.0, "onnx fp32": 2.0, "onnx int8": 1.0}
    monkeypatch.setattr(benchmark, "time_in_turns", lambda calls, **_: {name: [seconds[name]] for name in calls})
    threads = torch.get_num_threads()
    try:
        record = benchmark_onnx([NAME], data, batch=[1, 64], threads=1, repeats=1, weights=folder.parent)
    finally:
        torch.set_num_threads(threads)
    assert {row.name: row.ratio for row in record.rows if row.group["batch"] == 64} == {
        "eager fp32": 1.0,
        "onnx fp32": 0.25,
        "onnx int8": 0.125,
    }
    assert record.rows[-1].facts["images_per_second"] == 64
    (tmp_path / "speed.json").write_text(json.dumps(record.to_dict()))
    table = onnx_table(shipped, tmp_path / "accuracy.json", tmp_path / "speed.json")
    assert f"| `{NAME}` | not measured | not measured | not measured | 4.00 | 8.00 | 4.00 | 8.00 |" in table


@pytest.mark.slow
def test_every_form_that_is_timed_gives_about_the_same_logits(
    packed: tuple[Path, Path, WeightEntry], shipped: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data, _ = packed
    logits = {}

    def keep(calls, **_):
        logits.update({name: torch.as_tensor(call()) for name, call in calls.items()})
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(benchmark, "time_in_turns", keep)
    benchmark_onnx([NAME], data, threads=torch.get_num_threads(), quick=True, weights=folder.parent)
    eager = logits["eager fp32"]
    torch.testing.assert_close(logits["onnx fp32"], eager, rtol=1e-3, atol=1e-4)
    assert 0 < (logits["onnx int8"] - eager).abs().mean() < 0.1 * eager.std()
