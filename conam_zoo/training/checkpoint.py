"""Training state in one safetensors file: the tensors as they are, all the rest as JSON in its header.

No pickle is involved. The header holds a hash of all bytes of the file, its own digits taken as zeros. A state is
written to a file of its own, then the checkpoint before it is renamed to ``checkpoint.previous.safetensors``, then the
new one takes its place: whenever the process dies, one of them is whole.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically

__all__ = [
    "CHECKPOINT",
    "PREVIOUS",
    "OtherTrainingError",
    "has_checkpoint",
    "load_checkpoint",
    "load_latest",
    "save_checkpoint",
]

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
# In the header. The quotes of the state within it are escaped, so it cannot look like this.
HASH = re.compile(rb'"sha256":"([0-9a-f]{64})"')


class OtherTrainingError(UserError):
    """A checkpoint is whole, but of a training with another recipe or on other data."""


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
    data = safetensors.torch.save(tensors, metadata={"state": skeleton, "sha256": "0" * 64})
    place = _place_of_hash(data)
    assert place is not None
    sealed = data[: place[0]], hashlib.sha256(data).hexdigest().encode(), data[place[1] :]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(sealed)
            file.flush()
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


def _place_of_hash(data: bytes) -> tuple[int, int] | None:
    """Where the digits of the hash stand in a file; None in files of the first versions."""
    found = HASH.search(data, 8, 8 + int.from_bytes(data[:8], "little"))
    return found.span(1) if found else None


def has_checkpoint(folder: Path) -> bool:
    """Whether a training has left its state in a run folder."""
    return (folder / CHECKPOINT).exists() or (folder / PREVIOUS).exists()


def load_latest(
    folder: Path, check: Callable[[dict[str, Any]], object], tell: Callable[[str], object]
) -> dict[str, Any]:
    """Read the newest good state of a run folder.

    Args:
        folder: The run folder.
        check: Raises an exception if a state is not what it should be; ``OtherTrainingError`` ends the search.
        tell: Gets one sentence if the newest checkpoint is damaged or missing and the one before is taken.

    Raises:
        UserError: If there is no good checkpoint.
    """
    newest, previous = folder / CHECKPOINT, folder / PREVIOUS
    try:
        return load_checkpoint(newest, check)
    except OtherTrainingError:
        raise
    except UserError:
        if not previous.exists():
            raise
        there = newest.exists()
        state = load_checkpoint(previous, check)
    tell(f"{newest} is {'damaged' if there else 'missing'}: the checkpoint before it is taken.")
    newest.unlink(missing_ok=True)  # or the next state would push the good one out
    return state


def load_checkpoint(path: Path, check: Callable[[dict[str, Any]], object] = lambda state: None) -> dict[str, Any]:
    """Read a state that ``save_checkpoint`` wrote: ``model``, ``ema``, ``optimizer`` and ``facts``.

    ``check`` raises an exception if the state is not what it should be.

    Raises:
        UserError: If the file is missing, damaged or no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path} to resume from: leave --resume out to start anew.")
    try:
        data = path.read_bytes()
        if place := _place_of_hash(data):
            begin, end = place
            digest = hashlib.sha256(data[:begin])
            digest.update(b"0" * 64)
            digest.update(memoryview(data)[end:])
            if digest.hexdigest().encode() != data[begin:end]:
                raise ValueError("its bytes do not have the hash that it states")
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if set(header["__metadata__"]) != ({"state", "sha256"} if place else {"state"}):
            raise ValueError("its header is damaged")
        state: dict[str, Any] = _unflatten(json.loads(header["__metadata__"]["state"]), tensors)
        if missing := {"model", "ema", "optimizer", "facts"} - set(state):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        check(state)
    except OtherTrainingError:
        raise
    except (
        SafetensorError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ) as error:  # RuntimeError: nested too deeply, or tensors of another net
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{path} is not a checkpoint of this training, or damaged ({reason}): start anew in another folder."
        ) from error
    return state
