"""The state of a training: when it is saved, how it is written, and how a training takes it up again.

It is one safetensors file: the tensors as they are, the rest as JSON in its header, with a hash of all bytes of the
file, its own digits taken as zeros. A state is written to a file of its own, the checkpoint before it is renamed to
``checkpoint.previous.safetensors``, and the new one takes its place: whenever the process dies, one of them is whole.
"""

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from conam_zoo.errors import UserError, is_out_of_memory
from conam_zoo.files import write_atomically
from conam_zoo.training.distributed import is_lost_peer, ranks, run_on_primary
from conam_zoo.training.recipe import recipe_from_dict
from conam_zoo.training.train_state import TrainState

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
# In the header. The quotes of the state within it are escaped, so it cannot look like this.
HASH = re.compile(rb'"sha256":"([0-9a-f]{64})"')
# What a damaged state leads to; RuntimeError where it is nested too deeply, or has the tensors of another net.
DAMAGE = (SafetensorError, OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(Exception):  # noqa: N818 (it was asked for, so it is no error)
    """A signal stopped the training, whose state is saved; the message is one sentence that says how to go on."""

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.exit_code = 128 + signal_number  # as shells have it


def stop_for(signal_number: int, what: str) -> None:
    """End if a signal, whose number is not 0, asked for it; ``what`` is stopped, and says how to go on."""
    if signal_number:
        raise TrainingStopped(f"{signal.Signals(signal_number).name} stopped {what}", signal_number)


class OtherTrainingError(UserError):
    """A checkpoint is whole, but of a training with another recipe or on other data."""


@dataclass(frozen=True)
class EpochSums:
    """Sums over the augmented training images of an epoch so far, measured while the weights changed."""

    loss: float = 0.0
    correct: int = 0  # images whose most probable class was the right one, or the larger share of a mixed one
    seen: int = 0
    seconds: float = 0.0


class StopRequest:
    """While it is entered, a SIGTERM or the first SIGINT is noted in ``signal_number`` and does nothing else.

    A second SIGINT acts as it would have before; several SIGTERMs come from supervisors that signal parent and child.
    Outside of the main thread, where Python has no handlers, none is noted.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        if any(map(is_lost_peer, error)):  # torchrun sends SIGTERM then, which must not come before what is to be said
            self._handlers |= dict.fromkeys(self._handlers.keys() & {signal.SIGTERM}, signal.SIG_IGN)
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        if number == signal.SIGINT:
            before = self._handlers.pop(signal.SIGINT)
            signal.signal(number, before if before is not None else signal.SIG_DFL)


@dataclass
class Checkpointer(StopRequest):
    """Saves the state of a training in its run folder, and takes it up again, if recipe and ``record`` are the same.

    Entered, it notes a signal, for the loop to save and stop at its next step. Every rank has one, and rank 0 writes.
    """

    folder: Path
    state: TrainState
    record: dict[str, Any]  # plain facts, such as where the data came from
    minutes: float = 10.0  # after which the state is saved within an epoch, too; 0 for every step
    epoch: int = 0  # epochs that are done
    step: int = 0  # steps of the present epoch that are done
    sums: EpochSums = EpochSums()  # of these steps
    rows: list[dict[str, Any]] = field(default_factory=list)  # the log, one for each epoch that is done
    # Where the training ran: facts such as its hardware, and ``begun_in_epoch``, for each process with others
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._saved_at = time.monotonic()

    def requests(self) -> tuple[bool, int]:
        """Whether this rank finds that the state should be saved, and the number of the signal to stop for, or 0."""
        return ranks().first and time.monotonic() - self._saved_at >= 60 * self.minutes, self.signal_number

    def note(self, environment: dict[str, Any]) -> None:
        """Keep where this process trains, from the present epoch on, unless the one before trained in the same."""
        if not self.history or {**self.history[-1], **environment} != self.history[-1]:
            self.history.append({"begun_in_epoch": self.epoch + 1, **environment})

    def end_epoch(self) -> None:
        """Save the state at an epoch's end, once its row is in ``rows``."""
        self.epoch += 1
        self.save(0, EpochSums())

    def save(self, step: int, sums: EpochSums) -> None:
        """Save the state after ``step`` steps of the present epoch; called on every rank, with the sums over all."""
        self.step, self.sums = step, sums
        if ranks().first:
            position = {"epoch": self.epoch, "step": step, "sums": asdict(sums), "log": self.rows}
            save_checkpoint(
                self.folder / CHECKPOINT,
                model=self.state.model,
                ema=self.state.ema.module if self.state.ema else None,
                optimizer=self.state.optimizer,
                facts={
                    "recipe": self.state.recipe.to_dict(),
                    "record": self.record,
                    "history": self.history,
                    **position,
                },
            )
        self._saved_at = time.monotonic()

    def stop(self, signal_number: int) -> None:
        """End the training if a signal, whose number is not 0, asked for it; the state has been saved."""
        place = f"in epoch {self.epoch + 1} after step {self.step}" if self.step else f"after epoch {self.epoch}"
        stop_for(signal_number, f"the training {place}: its state is saved, so the same command with --resume goes on.")

    def resume(self, tell: Callable[[str], object]) -> None:
        """Take up the newest good state of the run folder, which rank 0 reads; ``tell`` gets a warning."""
        saved = run_on_primary(lambda: self._newest_good(tell))
        if not ranks().first:
            self._take_up(saved)

    def _newest_good(self, tell: Callable[[str], object]) -> dict[str, Any]:
        newest, previous = self.folder / CHECKPOINT, self.folder / PREVIOUS
        try:
            return load_checkpoint(newest, self._take_up)
        except OtherTrainingError:
            raise
        except UserError as error:
            unreadable = isinstance(error.__cause__, OSError) and newest.exists()  # it may be whole
            if unreadable or not previous.exists():
                raise
        state = load_checkpoint(previous, self._take_up)
        tell(f"{newest} is {'damaged' if newest.exists() else 'missing'}: the checkpoint before it is taken.")
        newest.unlink(missing_ok=True)  # or the next state would push the good one out
        return state

    def _take_up(self, saved: dict[str, Any]) -> None:
        """Put a state into the net and what changes it, all of it checked, whatever wrote it."""
        facts, recipe, steps = saved["facts"], self.state.recipe, self.state.steps_per_epoch
        rows = facts["log"]
        before = recipe_from_dict(facts["recipe"], "in it").to_dict()
        _check_same(f"{self.folder} was begun with another recipe", before, recipe.to_dict())
        _check_same(f"{self.folder} was begun on other data", facts["record"], self.record)
        epoch, step = facts["epoch"], facts["step"]
        numbered = [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
        if not numbered or epoch != len(rows) or epoch > recipe.epochs:
            raise ValueError(f"its epoch is {epoch!r}, but its log has {len(rows)} rows")
        if step not in range(steps + 1 if epoch < recipe.epochs else 1):
            raise ValueError(f"its step is {step!r}")
        totals = EpochSums(**facts["sums"])
        good = math.isfinite(totals.loss + totals.seconds) and 0 <= totals.correct <= totals.seen
        if not good or (totals.seen == 0) != (step == 0):
            raise ValueError("its epoch totals do not match its steps")
        self.state.load(saved, epoch * steps + step)
        self.epoch, self.step, self.sums, self.rows = epoch, step, totals, rows
        self.history = [dict(part) for part in facts["history"]]


def _check_same(begun: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        names = ", ".join("pixels or labels" if key == "data_sha256" else key for key in changed)
        raise OtherTrainingError(f"{begun} ({names} differ): resume it unchanged.")


def has_checkpoint(folder: Path) -> bool:
    """Whether a training has left its state in a run folder."""
    return (folder / CHECKPOINT).exists() or (folder / PREVIOUS).exists()


def save_checkpoint(
    path: Path, *, model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write the state of a training, and keep the one before as ``PREVIOUS``; after a ``UserError`` all is as it was.

    ``facts`` are plain values that JSON can hold: recipe, epoch, step, log.
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
    begin, end = _place_of_hash(data)
    sealed = data[:begin], hashlib.sha256(data).hexdigest().encode(), data[end:]

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


def load_checkpoint(path: Path, check: Callable[[dict[str, Any]], object] = lambda state: None) -> dict[str, Any]:
    """Read a state that ``save_checkpoint`` wrote, ``model``, ``ema``, ``optimizer`` and ``facts``, or refuse the file.

    ``check`` raises an exception if the state is not what it should be.
    """
    try:
        data = path.read_bytes()
        begin, end = _place_of_hash(data)
        digest = hashlib.sha256(data[:begin])
        digest.update(b"0" * 64)
        digest.update(memoryview(data)[end:])
        if digest.hexdigest().encode() != data[begin:end]:
            raise ValueError("its bytes do not have the hash that it states")
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state: dict[str, Any] = _unflatten(json.loads(header["__metadata__"]["state"]), tensors)
        check(state)
    except OtherTrainingError:
        raise
    except DAMAGE as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise UserError(f"{path} cannot be read ({error.strerror}): see to its disk and rights.") from error
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{path} is not a checkpoint of this training, or damaged ({reason}): start anew in another folder."
        ) from error
    return state


def _place_of_hash(data: bytes) -> tuple[int, int]:
    """Where the digits of the hash stand in a file."""
    found = HASH.search(data, 8, 8 + int.from_bytes(data[:8], "little"))
    if found is None:
        raise ValueError("it states no hash")
    return found.span(1)


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor in nested dicts, lists and tuples by a reference, and put it into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, _flatten(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"value": value}


def _unflatten(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "items" in node:
        return {key: _unflatten(item, tensors) for key, item in node["items"]}
    if "list" in node:
        return [_unflatten(item, tensors) for item in node["list"]]
    if "tuple" in node:
        return tuple(_unflatten(item, tensors) for item in node["tuple"])
    return getattr(torch, node["dtype"]) if "dtype" in node else node["value"]
