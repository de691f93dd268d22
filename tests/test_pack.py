"""From a run to a folder of weights and a manifest entry."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import CHECKOUT
from small_entry import entry_for

import conam_zoo.release.pack as pack_module
from conam_zoo.errors import UserError
from conam_zoo.models.registry import open_model, weights_sha256
from conam_zoo.release.documents import generated_files
from conam_zoo.release.pack import PACKED, pack
from conam_zoo.training.evaluate import evaluate
from conam_zoo.training.recipe import load_recipe
from conam_zoo.training.train import train
from conam_zoo.weights import Manifest, dump_manifest, load_manifest, read_verified

pytestmark = pytest.mark.slow

NAME = "resnet20_conam.cifar10"
SHORT = ("epochs=1", "warmup_epochs=0", "batch_size=32")
EMPTY = {"schema_version": 1, "hub_namespace": None, "code_repository": None, "entries": {}}


@pytest.fixture
def empty_checkout(tmp_path: Path) -> Path:
    """A checkout without weights."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "weights_manifest.json").write_text(json.dumps(EMPTY))
    shutil.copyfile(CHECKOUT / "README.md", folder / "README.md")
    return folder


def _run(small_data: Path, output: Path, *settings: str) -> Path:
    """A run of one epoch on a few images, after which a site may be even or not, as rounding has it."""
    train(load_recipe(NAME, [*SHORT, *settings]), small_data, output)
    return output


@pytest.fixture
def short_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the short settings were those of the packaged recipe."""
    monkeypatch.setattr(pack_module, "load_recipe", lambda name: load_recipe(name, list(SHORT)))


@pytest.mark.usefixtures("short_recipe")
def test_a_run_becomes_verified_weights(small_data: Path, empty_checkout: Path, tmp_path: Path) -> None:
    run = _run(small_data, tmp_path / "run", "seed=5")
    entry = pack(run, small_data, empty_checkout, allow_even_sites=True)
    assert load_manifest(empty_checkout / "weights_manifest.json").entries == {NAME: entry}
    assert (run / PACKED).read_text() == json.loads((run / "run.json").read_text())["sha256"]  # for conam queue
    folder = empty_checkout / "weights" / NAME
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "log.csv",
        "curves.png",
    }
    data = (folder / "model.safetensors").read_bytes()
    assert (entry.sha256, entry.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (entry.seed, entry.epochs, entry.dtype) == (5, 1, "float16")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert next(model.parameters()).dtype == torch.float32
    scores = evaluate(model, small_data, "cifar10").scores
    assert scores.top1_percent == pytest.approx(entry.metrics.top1_percent, abs=1e-3)
    assert scores.nll == pytest.approx(entry.metrics.nll, abs=1e-3)
    exact = json.loads((run / "run.json").read_text())["scores"]["top1_percent"]
    assert abs(entry.metrics.top1_percent - exact) <= 0.02
    assert [p.name for p in empty_checkout.iterdir() if p.name.startswith(".packing")] == []
    table = generated_files(empty_checkout)[empty_checkout / "README.md"]
    assert f"| `{NAME}` | {entry.metrics.top1_percent:.2f} % |" in table
    assert f"{entry.metrics.top1_percent:.2f} %" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("short_recipe")
def test_packing_again_replaces_the_weights_and_keeps_other_entries(
    small_data: Path, empty_checkout: Path, tmp_path: Path
) -> None:
    manifest = empty_checkout / "weights_manifest.json"
    other = entry_for("resnet32_conam.cifar10", b"weights", revision=None)
    dump_manifest(Manifest({other.name: other}), manifest)
    first = pack(_run(small_data, tmp_path / "a", "seed=1"), small_data, empty_checkout, allow_even_sites=True)
    second = pack(_run(small_data, tmp_path / "b", "seed=2"), small_data, empty_checkout, allow_even_sites=True)
    assert first.sha256 != second.sha256
    assert load_manifest(manifest).entries == {NAME: second, other.name: other}
    assert weights_sha256(f"local-dir:{empty_checkout / 'weights' / NAME}") == second.sha256


@pytest.mark.usefixtures("short_recipe")
@pytest.mark.parametrize("had_weights", [False, True])
def test_weights_come_back_if_the_manifest_cannot_be_written(
    had_weights: bool, small_data: Path, empty_checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(small_data, tmp_path / "run")
    if had_weights:
        pack(run, small_data, empty_checkout, allow_even_sites=True)
        (empty_checkout / "weights" / NAME / "log.csv").write_text("the former ones")
    before = {p: p.read_bytes() for p in empty_checkout.rglob("*") if p.is_file()}

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pack_module, "dump_manifest", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pack(run, small_data, empty_checkout, allow_even_sites=True)
    assert {p: p.read_bytes() for p in empty_checkout.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("short_recipe")
def test_weights_too_large_for_one_file_are_packed_as_shards(
    small_data: Path, empty_checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "MAX_SHARD_BYTES", 200_000)
    entry = pack(_run(small_data, tmp_path / "run"), small_data, empty_checkout, allow_even_sites=True)
    folder = empty_checkout / "weights" / NAME
    assert entry.file == "model.safetensors.index.json"
    assert entry.sha256 == hashlib.sha256((folder / entry.file).read_bytes()).hexdigest()
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    assert entry.weights_bytes == sum(path.stat().st_size for path in folder.glob("model*"))
    assert set(read_verified(folder / entry.file, entry)) == set(timm.create_model(NAME).state_dict())
    scores = evaluate(open_model(f"local-dir:{folder}"), small_data, "cifar10").scores
    assert scores.top1_percent == pytest.approx(entry.metrics.top1_percent, abs=1e-4)


@pytest.mark.usefixtures("short_recipe")
def test_weights_that_half_precision_would_spoil_stay_float32(
    small_data: Path, empty_checkout: Path, tmp_path: Path
) -> None:
    run = _run(small_data, tmp_path / "run")
    model = timm.create_model(f"local-dir:{run / 'final'}", pretrained=True)
    with torch.no_grad():  # a scale that float16 rounds to zero, undone by one that it cannot hold
        model.bn1.weight.mul_(1e-9)
        model.bn1.bias.mul_(1e-9)
        model.layer1[0].conv1.weight.mul_(1e9)
    from conam_zoo.models.registry import export_model

    sha256 = export_model(model, run / "final", tag=None)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "sha256": sha256}))
    assert pack(run, small_data, empty_checkout, allow_even_sites=True).dtype == "float32"


def test_what_must_not_be_shipped_is_refused_and_nothing_changes(
    small_data: Path, empty_checkout: Path, tmp_path: Path
) -> None:
    run = _run(small_data, tmp_path / "run", "holdout=40")
    with pytest.raises(UserError, match="held out 40 training images"):
        pack(run, small_data, empty_checkout)
    other = _run(small_data, tmp_path / "other")
    with pytest.raises(UserError, match=r"\(batch_size, epochs, warmup_epochs differ\)"):
        pack(other, small_data, empty_checkout)
    with pytest.raises(UserError, match="not a finished run"):
        pack(tmp_path, small_data, empty_checkout)
    assert json.loads((empty_checkout / "weights_manifest.json").read_text()) == EMPTY
    assert not (empty_checkout / "weights").exists()
