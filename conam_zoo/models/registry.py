"""From what a person typed to a model: known names, near misses, and counts."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, list_models, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.inputs import expand_path
from conam_zoo.models._base import StagedClassifier
from conam_zoo.models.config_schema import load_config
from conam_zoo.weights import load_manifest
from conam_zoo.weights.folder import fetch_config, read_config, weights_file

__all__ = ["check_model_name", "count_params_and_macs", "model_names", "open_model", "size_of", "weights_sha256"]


def model_names() -> list[str]:
    """All builders of this package, in timm's natural order."""
    return list_models("*_conam")


def check_model_name(name: str) -> None:
    """Refuse a name that is no model of this package, with or without tag.

    Raises:
        UserError: With the nearest names, or with the tags that there are.
    """
    builder, tag = split_model_name_tag(name)
    names = model_names()
    if builder not in names:
        near = difflib.get_close_matches(builder, names, n=3, cutoff=0.5) or names[:3]
        raise UserError(f"There is no model {builder!r}: did you mean {' or '.join(near)}? 'conam list' shows all.")
    if tag and tag not in DATASETS:
        raise UserError(f"{builder} has no tag {tag!r}: it has {', '.join(f'{builder}.{t}' for t in DATASETS)}.")


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose config.json names another package's net, or is not what it should be."""
    named = read_config(folder / "config.json").get("architecture")
    if isinstance(named, str):  # first of all: of a net that is not ours, nothing else is worth saying
        check_model_name(named)
    load_config(folder)


def open_model(name: str, *, pretrained: bool = True, **kwargs: Any) -> StagedClassifier:
    """``timm.create_model`` for a name as typed: ``arch``, ``arch.tag``, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Raises:
        UserError: If the name is unknown, or a folder is no model folder.
        WeightsError: If no verified weights can be had.
    """
    if name.startswith("local-dir:"):
        folder = expand_path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a model folder: it has no config.json.")
        _check_folder(folder)
        name = f"local-dir:{folder}"
    elif name.startswith("hf-hub:"):
        # timm would wait half a minute for a Hub that is away, believe what it says, and read a net of its own in its
        # own ways. Of a pinned commit that is in the cache it asks nothing.
        hub_id = name.removeprefix("hf-hub:")
        config = fetch_config(hub_id, kwargs.get("cache_dir"))
        _check_folder(config.parent)
        name = f"hf-hub:{hub_id.partition('@')[0]}@{config.parent.name}"
    else:
        check_model_name(name)
    try:
        model: StagedClassifier = timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except (TypeError, ValueError) as error:
        if ":" not in name or isinstance(error, UserError) or kwargs.keys() - {"cache_dir", "device"}:
            raise
        raise UserError(f"The config.json of {name} describes a net that cannot be built: {error}") from error
    return model


def weights_sha256(name: str) -> str | None:
    """The SHA-256 of a model's weights, or of their index, by a name as ``open_model`` takes it; None if none is known.

    That of a folder is its file's, that of a Hub repository the one its config.json states, any other the manifest's.

    Raises:
        WeightsError: If a config.json cannot be had.
    """
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        folder = expand_path(place)
        file = folder / weights_file(read_config(folder / "config.json"), folder)
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if kind == "hf-hub":
        stated = read_config(fetch_config(place)).get("sha256")
        return str(stated) if stated else None
    cfg = get_pretrained_cfg(name)
    entry = load_manifest().entries.get(f"{cfg.architecture}.{cfg.tag}") if cfg else None
    return entry.sha256 if entry else None


def size_of(name: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a builder for CIFAR-10, from ``sizes.json``, which a test recounts."""
    table = json.loads(Path(__file__).with_name("sizes.json").read_text(encoding="utf-8"))
    if name not in table:
        return count_params_and_macs(name)
    return table[name]["params"], table[name]["macs"]


def count_params_and_macs(name: str, **kwargs: Any) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of convolutions and matrix products for one image; nothing is allocated."""
    model = timm.create_model(name, device="meta", **kwargs).eval()
    image = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    with FlopCounterMode(display=False) as counter:
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
