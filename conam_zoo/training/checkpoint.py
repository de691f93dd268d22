"""Training state in one safetensors file: the tensors as they are, all the rest as JSON in its header.

No pickle is involved, and the file is replaced atomically, so that a killed run keeps its last whole checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor in nested dicts and lists by a reference, and put it into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, _flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    return {"value": value}


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "items" in node:
        return {key: _unflatten(item, tensors) for key, item in node["items"]}
    if "list" in node:
        return [_unflatten(item, tensors) for item in node["list"]]
    return node["value"]


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> None:
    """Write the state of a training; ``facts`` are plain values (epoch, recipe, log)."""
    tensors: dict[str, Tensor] = {}
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict() if ema is not None else None,
        "optimizer": optimizer.state_dict(),
        "facts": facts,
    }
    skeleton = json.dumps(_flatten(state, "state", tensors))
    # clone: tensors that share memory are refused by safetensors
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"state": skeleton}))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state that ``save_checkpoint`` wrote: ``model``, ``ema``, ``optimizer`` and ``facts``.

    Raises:
        UserError: If the file is missing or is no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path} to resume from: leave --resume out to start anew.")
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return _unflatten(skeleton, tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of a training ({error}): remove it and start anew.") from error
