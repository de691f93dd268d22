"""A model as a folder in timm's Hub layout, with the hash of its weights beside them."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from conam_zoo.files import write_atomically
from conam_zoo.models import StagedClassifier

__all__ = ["export_model"]


def export_model(model: StagedClassifier, folder: Path, *, tag: str | None, dtype: torch.dtype = torch.float32) -> str:
    """Write ``model.safetensors`` and ``config.json``; ``timm.create_model("local-dir:FOLDER")`` loads them.

    ``config.json`` records the attention arguments of the net and the SHA-256 of the weights, which a load checks.

    Args:
        model: A model of this package, made by timm.
        folder: Where to write; it is made if need be.
        tag: Tag of published weights, None for weights of one's own.
        dtype: Type in which floating-point tensors are stored.

    Returns:
        The SHA-256 of ``model.safetensors``, in hexadecimal.
    """
    tensors = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    weights_path = folder / "model.safetensors"
    write_atomically(weights_path, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    sha256 = hashlib.sha256(weights_path.read_bytes()).hexdigest()

    model_args = model.attention_arguments()
    config_path = folder / "config.json"
    own = {"sha256": sha256, "pretrained_cfg": {"tag": tag}}
    write_atomically(
        config_path, lambda path: save_config_for_hf(model, str(path), model_config=own, model_args=model_args)
    )
    return sha256
