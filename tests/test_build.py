"""Which weights a call gets: sources of the caller's own, and weights that do not fit."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.models.registry import count_params_and_macs, export_model, model_names
from conam_zoo.weights import WeightsError

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
