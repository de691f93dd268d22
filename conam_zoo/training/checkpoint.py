"""Training state in one safetensors file: the tensors as they are, all the rest as JSON in its header.

No pickle is involved. A state is written to a file of its own, then the checkpoint before it is renamed to
``checkpoint.previous.safetensors``, then the new one takes its place: whenever the process dies, one of them is whole.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically

__all__ = [
    "CHECKPOINT",
    "PREVIOUS",
    "clear_half_written",
    "has_checkpoint",
    "load_checkpoint",
    "load_latest",
    "save_checkpoint",
]

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
# What ``write_atomically`` and safetensors call a file before they rename it.
HALF_WRITTEN = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?|\.tmp\w{6}")


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
    """Write the state of a training; the state before it is kept beside it as ``PREVIOUS``.

    Args:
        path: The file; ``PREVIOUS`` stands in the same folder.
        model: The net.
        ema: The moving average of its weights, if there is one.
        optimizer: With its momenta and learning rates.
        facts: Plain values that JSON can hold: recipe, epoch, step, log.

    Raises:
        UserError: If it cannot be written, as on a full disk; the checkpoints that there were are still there.
    """
    tensors: dict[str, Tensor] = {}
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict() if ema is not None else None,
        "optimizer": optimizer.state_dict(),
        "facts": facts,
    }
    skeleton = json.dumps(_flatten(state, "state", tensors))
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata={"state": skeleton})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file under a good name
        if path.exists():
            os.replace(path, path.with_name(PREVIOUS))

    try:
        write_atomically(path, write)
    except UserError as error:
        sentence = str(error).rpartition(": ")[0]
        raise UserError(
            f"{sentence}: the checkpoints before are kept, so make room and continue with --resume."
        ) from error


def has_checkpoint(folder: Path) -> bool:
    """Whether a training has left its state in a run folder."""
    return (folder / CHECKPOINT).exists() or (folder / PREVIOUS).exists()


def clear_half_written(folder: Path) -> None:
    """Remove what a killed process left half-written in a run folder."""
    for path in folder.rglob(".*"):
        if HALF_WRITTEN.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def load_latest(folder: Path, tell: Callable[[str], object]) -> dict[str, Any]:
    """Read the newest whole state of a run folder, and remove what a killed process left half-written there.

    Args:
        folder: The run folder.
        tell: Gets one sentence if the newest checkpoint is damaged or missing and the one before is taken.

    Raises:
        UserError: If there is no whole checkpoint.
    """
    clear_half_written(folder)
    newest, previous = folder / CHECKPOINT, folder / PREVIOUS
    if not previous.exists():
        return load_checkpoint(newest)
    try:
        return load_checkpoint(newest)
    except UserError:
        state = load_checkpoint(previous)
    tell(f"{newest} is {'damaged' if newest.exists() else 'missing'}: the checkpoint before it is taken.")
    newest.unlink(missing_ok=True)  # or the next state would push the whole one out
    return state


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
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of a training ({error}): remove it and start anew.") from error
