"""From what a person typed to a model, and from a model to a folder in timm's Hub layout."""

import difflib
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, list_models, split_model_name_tag
from timm.models._hub import save_config_for_hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.files import expand_path, write_atomically, write_text
from conam_zoo.models._base import StagedClassifier
from conam_zoo.models.config_schema import check_config, load_config
from conam_zoo.weights import load_manifest
from conam_zoo.weights.folder import WEIGHTS_FILE, at_commit_of, fetch_config, read_config, weights_file
from conam_zoo.weights.verify import INDEX_SUFFIX, Shard, make_index

INDEX_FILE = WEIGHTS_FILE.replace(".safetensors", INDEX_SUFFIX)


def model_names() -> list[str]:
    """All builders of this package, in timm's natural order."""
    return list_models("*_conam")


def check_model_name(name: str) -> None:
    """Refuse, by a UserError with what is near, a name that is not a model of this package, with or without tag."""
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
    """``timm.create_model`` for a name: ``arch``, ``arch.tag``, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``."""
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
        name = f"hf-hub:{at_commit_of(config, hub_id)}"
    elif name.lower().endswith((".onnx", ".pt2")):
        raise UserError(
            f"{name} is an exported file: 'conam predict', 'evaluate' and 'demo' take such, if it is .onnx."
        )
    else:
        check_model_name(name)
    try:
        model: StagedClassifier = timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except (TypeError, ValueError) as error:
        if ":" not in name or isinstance(error, UserError) or kwargs.keys() - {"cache_dir", "device"}:
            raise
        raise UserError(f"The config.json of {name} describes a net that cannot be built: {error}") from error
    return model


def check_takes_rgb(model: StagedClassifier) -> None:
    """Refuse (``UserError``) a net whose images have another number of channels than the three of pictures."""
    channels = getattr(model, "in_chans", model.pretrained_cfg["input_size"][0])
    if channels != 3:
        raise UserError(
            f"The net takes images with {channels} channels, but pictures are read with 3: name another net, or use "
            "this one in Python."
        )


def weights_sha256(name: str) -> str | None:
    """The SHA-256 of a model's weights, or of their index, by a name as ``open_model`` takes it; None if none is known.

    That of a folder is its file's, that of a Hub repository the one its config.json states, any other the manifest's.
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


def export_model(
    model: StagedClassifier,
    folder: Path,
    *,
    tag: str | None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> str:
    """Write ``model.safetensors`` and ``config.json``; ``timm.create_model("local-dir:FOLDER")`` loads them.

    ``config.json`` records the attention arguments of the net and the SHA-256 of the weights, which a load checks and
    which is returned. ``tag`` is that of published weights, ``dtype`` the type of floating-point tensors. Tensors that
    take more than ``max_shard_bytes`` are written as several files with at most so many bytes of them each, and an
    index, ``model.safetensors.index.json``, whose hash it then is. A net whose arguments no load would take is a
    ``UserError``, and nothing is written.
    """
    try:
        check_config(json.loads(_config_text(model, {"pretrained_cfg": {"tag": tag}})))
    except ValueError as error:  # a CheckError, or timm's, for what JSON cannot hold
        raise UserError(
            f"The net cannot be saved, since its config.json would be refused ({str(error).rstrip('.')}): build it "
            "with other arguments."
        ) from error
    tensors = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    if max_shard_bytes is not None and total > max_shard_bytes:
        sha256 = _write_shards(tensors, folder, max_shard_bytes)
        own: dict[str, Any] = {"weights_file": INDEX_FILE}
    else:
        sha256 = _write(tensors, folder / WEIGHTS_FILE)
        own = {}
    own |= {"sha256": sha256, "pretrained_cfg": {"tag": tag}}
    write_text(folder / "config.json", _config_text(model, own))
    return sha256


def _config_text(model: StagedClassifier, own: dict[str, Any]) -> str:
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.json"
        save_config_for_hf(model, str(path), model_config=own, model_args=model.attention_arguments())
        return _for_transformers(path.read_text(encoding="utf-8"))


def _for_transformers(text: str) -> str:
    """The text of timm's ``config.json`` as transformers reads it, too.

    transformers passes ``num_classes`` beside ``model_args``, so it must not stand in them as well, and takes its
    ``id2label`` from the ``label_names`` at the root. timm reads both from the root.
    """
    config = json.loads(text)
    config.get("model_args", {}).pop("num_classes", None)
    if names := config["pretrained_cfg"].get("label_names"):
        config["label_names"] = names
    return json.dumps(config, indent=2) + "\n"


def _write(tensors: dict[str, Tensor], path: Path) -> str:
    """Write one safetensors file; its SHA-256."""
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_shards(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> str:
    """Write several safetensors files, and last their index; the SHA-256 of the index."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    shards = []
    for file, names in sorted(split.filename_to_tensors.items()):
        sha256 = _write({name: tensors[name] for name in names}, folder / file)
        shards.append(Shard(file, sha256, (folder / file).stat().st_size))
    write_text(folder / INDEX_FILE, make_index(split.tensor_to_filename, tuple(shards)))
    return hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()
