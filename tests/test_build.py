"""Which weights a call gets: sources of the caller's own, and weights that do not fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.models.conam_densenet import ConAMDenseNet
from conam_zoo.models.conam_resnet import ConAMResNet
from conam_zoo.models.conam_wide_resnet import ConAMWideResNet
from conam_zoo.models.registry import count_params_and_macs, export_model, model_names
from conam_zoo.weights import WeightsError, load_manifest
from conam_zoo.weights.folder import read_folder

NAME = "resnet32_conam"  # a net without an entry in the manifest


@pytest.fixture
def mine(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of weights of one's own, and what is in it."""
    torch.manual_seed(3)
    state = {key: value.contiguous() for key, value in timm.create_model(NAME).state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors", state


def test_a_file_or_state_dict_of_ones_own_is_loaded_and_leaves_no_trace_of_tensors(mine) -> None:
    path, state = mine
    for overlay in ({"file": str(path)}, {"state_dict": dict(state)}):
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert "state_dict" not in model.pretrained_cfg
    assert timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=4)


def test_weights_of_another_net_are_refused_even_where_timm_would_not_be_strict(mine) -> None:
    overlay = {"file": str(mine[0])}
    for name, kwargs in (
        (NAME, {"attn_layer": "none"}),
        (NAME, {"attn_layer": "se", "num_classes": 5}),
        (NAME, {"widths": (16, 32, 48), "num_classes": 5}),
        ("resnet44_conam", {"num_classes": 5}),
        ("wide_resnet16_8_conam", {"num_classes": 5}),
    ):
        with pytest.raises(WeightsError, match="do not fit"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_the_state_dict_of_a_wrapper_is_loaded_and_a_whole_checkpoint_is_one_sentence(mine) -> None:
    state = mine[1]
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": wrapped})
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    checkpoint = {"state_dict": state, "epoch": 3}
    with pytest.raises(WeightsError, match="its entry state_dict is no tensor"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": checkpoint})


@pytest.mark.parametrize(
    ("trained", "asked"),
    [
        ({"patch_sizes": (4, 4, 2)}, {}),
        ({"attn_layer": "simam"}, {"attn_layer": "none"}),
        ({"attn_layer": "eca", "attn_site": "after_last_norm"}, {"attn_layer": "eca"}),
        ({"attn_layer": "eca"}, {"attn_layer": "eca", "attn_site": "after_last_norm"}),
    ],
)
@pytest.mark.parametrize("source", ["file", "checkpoint_path", "hf_hub_id"])
def test_weights_of_another_attention_are_refused_whose_tensors_fit(
    trained: dict, asked: dict, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("0" * 40)
    export_model(timm.create_model(NAME, **trained), folder, tag=None)
    monkeypatch.setattr("conam_zoo.models._builder.fetch_config", lambda *_: folder / "config.json")
    monkeypatch.setattr("conam_zoo.models._builder.read_hub_folder", lambda *_: read_folder(folder))

    def load(**arguments: Any) -> torch.nn.Module:
        if source == "checkpoint_path":
            return timm.create_model(NAME, checkpoint_path=str(folder / "model.safetensors"), **arguments)
        place = str(folder / "model.safetensors") if source == "file" else "someone/net"
        return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={source: place}, **arguments)

    with pytest.raises(WeightsError, match="were trained with"):
        load(**asked)
    image = torch.randn(1, 3, 32, 32)
    wanted = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(image)
    assert torch.equal(load(**trained).eval()(image), wanted)


def test_the_manifests_arguments_are_not_those_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(timm.create_model("resnet20_conam", attn_layer="eca"), tmp_path / "run", tag="cifar10")
    manifest = load_manifest()
    entry = replace(manifest.entry("resnet20_conam.cifar10"), model_args={"attn_site": "after_last_norm"})
    changed = replace(manifest, entries={**manifest.entries, entry.name: entry})
    monkeypatch.setattr("conam_zoo.models._builder.load_manifest", lambda: changed)
    assert timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).attn_site == "before_first_conv"


def test_arguments_that_no_net_has_are_refused() -> None:
    with pytest.raises(ValueError, match="block is 'bottlneck'"):
        ConAMResNet("bottlneck")
    with pytest.raises(ValueError, match="depth is 18, but it must be 4 more than a multiple of 6"):
        ConAMWideResNet(18)
    with pytest.raises(ValueError, match="depth is 41, but it must be 4 more than a multiple of 3"):
        ConAMDenseNet(41)
    with pytest.raises(ValueError, match=r"num_classes is 2\.7"):
        timm.create_model(NAME).reset_classifier(2.7)


def test_a_net_without_weights_says_which_have_some() -> None:
    with pytest.raises(WeightsError, match=rf"no pretrained weights for {NAME}\.cifar10: choose one that has them"):
        timm.create_model(NAME, pretrained=True)


@pytest.mark.parametrize("name", model_names())
def test_the_size_in_a_builders_docstring_is_its_size(name: str) -> None:
    stated = re.search(r"([\d.]+) M parameters", timm.model_entrypoint(name).__doc__)
    decimals = len(stated[1].partition(".")[2])
    assert stated[1] == f"{count_params_and_macs(name)[0] / 1e6:.{decimals}f}"


def test_a_file_of_a_repository_cannot_be_chosen_past_its_config() -> None:
    overlay = {"hf_hub_id": "someone/net", "hf_hub_filename": "best.safetensors", "tag": None}
    with pytest.raises(WeightsError, match=r"hf_hub_filename is 'best\.safetensors'.*leave it out"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_folder_of_pickled_weights_says_how_to_save_it(tmp_path: Path) -> None:
    save_for_hf(timm.create_model(NAME), str(tmp_path), safe_serialization=False)
    with pytest.raises(WeightsError, match="safe_serialization=True"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_url_is_not_read() -> None:
    with pytest.raises(WeightsError, match="not read from a URL"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"url": "https://example.org/x.pth"})


def test_a_folder_is_held_to_the_hash_in_its_config(tmp_path: Path) -> None:
    model = timm.create_model(NAME, attn_placement="block", num_classes=6).eval()
    export_model(model, tmp_path / "run", tag=None)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image), model(image))
    (tmp_path / "run" / "config.json").write_text(
        (tmp_path / "run" / "config.json").read_text().replace('"sha256": "', '"sha256": "0')
    )
    with pytest.raises(WeightsError, match="not the file that its config"):
        timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no readable model"):
        timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
