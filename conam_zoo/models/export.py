"""A model as a folder in timm's Hub layout, with the hash of its weights beside them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor

from conam_zoo.files import write_atomically, write_text
from conam_zoo.models import StagedClassifier
from conam_zoo.weights.folder import WEIGHTS_FILE
from conam_zoo.weights.verify import INDEX_SUFFIX, Shard, make_index

__all__ = ["export_model", "for_transformers"]

INDEX_FILE = WEIGHTS_FILE.replace(".safetensors", INDEX_SUFFIX)


def export_model(
    model: StagedClassifier,
    folder: Path,
    *,
    tag: str | None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> str:
    """Write ``model.safetensors`` and ``config.json``; ``timm.create_model("local-dir:FOLDER")`` loads them.

    ``config.json`` records the attention arguments of the net and the SHA-256 of the weights, which a load checks.

    Args:
        model: A model of this package, made by timm.
        folder: Where to write; it is made if need be.
        tag: Tag of published weights, None for weights of one's own.
        dtype: Type in which floating-point tensors are stored.
        max_shard_bytes: Tensors that take more are written as several files, each with at most so many bytes of them,
            and an index; None for one file in any case.

    Returns:
        The SHA-256 of ``model.safetensors``, or of ``model.safetensors.index.json``, in hexadecimal.
    """
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

    model_args = model.attention_arguments()
    config_path = folder / "config.json"
    own |= {"sha256": sha256, "pretrained_cfg": {"tag": tag}}

    def write_config(path: Path) -> None:
        save_config_for_hf(model, str(path), model_config=own, model_args=model_args)
        path.write_text(for_transformers(path.read_text(encoding="utf-8")), encoding="utf-8")

    write_atomically(config_path, write_config)
    return sha256


def for_transformers(text: str) -> str:
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
