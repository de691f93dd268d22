"""Everything the manifest says is held against the files, the nets and the real test images."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from conftest import CHECKOUT
from hatchling.build import build_wheel
from small_entry import Bomb

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.data import read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.models.registry import count_params_and_macs
from conam_zoo.release.documents import generated_files
from conam_zoo.training.evaluate import evaluate, evaluate_on
from conam_zoo.training.recipe import load_recipe
from conam_zoo.weights import WeightsError, check_copies, load_manifest, read_verified
from conam_zoo.weights.verify import read_parts
from experiments.tables import WRITTEN_BY, generated_tables

NAMES = sorted(load_manifest().entries)
LARGEST_FILE_BYTES = 16 * 2**20


def test_there_are_weights_and_timm_lists_them() -> None:
    assert "resnet20_conam.cifar10" in NAMES
    assert timm.list_models("*conam*", pretrained=True) == NAMES
    assert {path.name for path in (CHECKOUT / "weights").iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_agrees_with_file_net_data_set_and_recipe(name: str) -> None:
    entry = load_manifest().entry(name)
    folder = CHECKOUT / "weights" / name
    data = (folder / entry.file).read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.size_bytes)
    files = [part.path for part in read_parts(folder / entry.file, entry)]
    assert {*folder.glob("*.safetensors*")} == {*files}
    assert sum(path.stat().st_size for path in files) == entry.weights_bytes
    assert max(path.stat().st_size for path in files) <= LARGEST_FILE_BYTES
    tensors = read_verified(folder / entry.file, entry).values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {getattr(torch, entry.dtype)}
    assert count_params_and_macs(name, **entry.model_args) == (entry.params, entry.macs)
    facts = DATASETS[entry.dataset]
    assert (entry.classes, entry.mean, entry.std) == (facts.classes, facts.mean, facts.std)
    recipe = load_recipe(entry.recipe)
    assert (recipe.model, recipe.dataset) == (entry.arch, entry.dataset)
    assert (recipe.epochs, recipe.seed) == (entry.epochs, entry.seed)
    config = json.loads((folder / "config.json").read_text())
    assert config["sha256"] == entry.sha256
    assert config["architecture"] == entry.arch
    assert config["pretrained_cfg"]["tag"] == entry.tag
    assert config["model_args"]["attn_layer"] == "conam"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pretrained_loads_agree_whichever_way_they_are_asked_for(name: str, tmp_path: Path) -> None:
    entry = load_manifest().entry(name)
    folder = CHECKOUT / "weights" / name
    image = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    file_overlay = {"file": str(folder / entry.file)}
    models = [
        timm.create_model(name, pretrained=True),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file_overlay),
    ]
    with torch.inference_mode():
        first, *others = (model.eval()(image) for model in models)
    assert first.shape == (2, entry.num_classes)
    assert all(torch.equal(first, other) for other in others)
    cfg = models[0].pretrained_cfg
    assert "file" not in cfg
    assert "state_dict" not in cfg
    assert cfg["tag"] == entry.tag
    assert next(models[0].parameters()).dtype == torch.float32


@pytest.mark.slow
def test_timms_adaptations_keep_the_pretrained_body() -> None:
    whole = timm.create_model("resnet20_conam.cifar10", pretrained=True)
    other_head = timm.create_model("resnet20_conam.cifar10", pretrained=True, num_classes=7)
    grey = timm.create_model("resnet20_conam.cifar10", pretrained=True, in_chans=1)
    features = timm.create_model("resnet20_conam.cifar10", pretrained=True, features_only=True, out_indices=(1, 3))
    assert other_head.fc.out_features == 7
    assert torch.equal(other_head.layer3[2].conv2.weight, whole.layer3[2].conv2.weight)
    torch.testing.assert_close(grey.conv1.weight, whole.conv1.weight.sum(1, keepdim=True))
    image = torch.randn(2, 3, 32, 32)
    maps = features.eval()(image)
    _, expected = whole.eval().forward_intermediates(image, indices=[1, 3])
    assert [m.shape[1] for m in maps] == [16, 64]
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_wrong_file_is_refused_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "resnet20_conam.cifar10"
    folder = tmp_path / name
    shutil.copytree(CHECKOUT / "weights" / name, folder)
    spoilt = bytearray((folder / "model.safetensors").read_bytes())
    spoilt[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(spoilt)
    found = hashlib.sha256(spoilt).hexdigest()
    expected = load_manifest().entry(name).sha256
    overlay = {"file": str(folder / "model.safetensors")}
    for refused in (
        lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay),
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
    ):
        with pytest.raises(WeightsError) as error:
            refused()
        assert all(part in str(error.value) for part in (str(folder), expected, found))
    monkeypatch.setenv("CONAM_ZOO_MIRROR", str(tmp_path))
    (mirror, checkout, _) = check_copies(load_manifest().entry(name))
    assert (mirror.status, checkout.status) == ("wrong", "good")
    timm.create_model(name, pretrained=True)  # the next place has a good one


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "weights.pth")
    for name, why in (
        ("resnet20_conam.cifar10", "is not the published file"),
        ("resnet110_conam.cifar10", r"does not end in \.safetensors"),  # without an entry in the manifest
    ):
        with pytest.raises(WeightsError, match=why):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
    assert not (tmp_path / "exploded").exists()


def test_the_generated_files_are_up_to_date() -> None:
    for path, text in generated_files(CHECKOUT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run 'conam tables'"
    for path, text in generated_tables(CHECKOUT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run '{WRITTEN_BY}'"


def test_the_card_passes_the_hubs_own_validation_of_its_metadata() -> None:
    from huggingface_hub import ModelCard

    for name in NAMES:
        card = ModelCard.load(CHECKOUT / "weights" / name / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.library_name == "timm"
        assert name in card.text


@pytest.mark.slow
def test_weights_load_from_an_installed_wheel_only_through_a_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_python: str
) -> None:
    """The wheel ships the manifest and no weights."""
    monkeypatch.chdir(CHECKOUT)
    site = tmp_path / "site"
    shutil.unpack_archive(tmp_path / build_wheel(str(tmp_path)), site, format="zip")
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert "conam_zoo/weights_manifest.json" in files
    assert "conam_zoo/training/recipes/resnet20_conam.cifar10.toml" in files
    assert not [file for file in files if file.endswith(".safetensors") or file.startswith(("tests/", "weights/"))]
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import conam_zoo, timm\n"
        "assert conam_zoo.__file__.startswith(sys.argv[1]), conam_zoo.__file__\n"
        "timm.create_model('resnet20_conam.cifar10', pretrained=True)\n"
        "print('loaded')\n"
    )

    def load(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [warm_python, "-I", "-c", script, str(site)],
            env={"PATH": "/usr/bin", "HOME": str(tmp_path), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert load(CONAM_ZOO_MIRROR=str(CHECKOUT / "weights")).stdout == "loaded\n"
    nowhere = load()
    assert nowhere.returncode != 0
    assert "set CONAM_ZOO_MIRROR to a directory" in nowhere.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_right_answers_on_a_sample_of_test_images_are_those_that_were_recorded(name: str, cifar_root: Path) -> None:
    """For all weights; all of their images are evaluated below for two, and by 'python -m experiments shipped'."""
    entry = load_manifest().entry(name)
    assert entry.correct_of_1000 is not None
    split = read_split(cifar_root, "test", entry.dataset).spread(1000)
    scores = evaluate_on(timm.create_model(name, pretrained=True).eval(), split)
    assert scores.top1_percent * 10 == pytest.approx(entry.correct_of_1000, abs=0.2)
    assert scores.nll == pytest.approx(entry.nll_of_1000, abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["resnet20_conam.cifar10", "resnet20_conam.cifar100"])
def test_the_published_accuracy_is_reproduced_on_the_real_test_images(name: str, cifar_root: Path) -> None:
    entry = load_manifest().entry(name)
    if not (cifar_root / entry.dataset).is_dir():
        pytest.fail(f"CONAM_DATA holds no {entry.dataset}/, which {name} is measured on")
    done = evaluate(timm.create_model(name, pretrained=True).eval(), cifar_root, entry.dataset)
    scores = done.scores
    assert (done.part, len(done.split)) == ("test", 10_000)
    assert scores.top1_percent == pytest.approx(entry.metrics.top1_percent, abs=0.02)
    assert scores.top5_percent == pytest.approx(entry.metrics.top5_percent, abs=0.02)
    assert scores.nll == pytest.approx(entry.metrics.nll, abs=1e-3)
    assert scores.ece == pytest.approx(entry.metrics.ece, abs=1e-3)
