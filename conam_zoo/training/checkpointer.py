"""When the state of a training is saved: on time, at every epoch's end, and when the process is asked to stop."""

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from conam_zoo.training.checkpoint import CHECKPOINT, OtherTrainingError, load_latest, save_checkpoint
from conam_zoo.training.distributed import ranks, run_on_primary
from conam_zoo.training.recipe import Recipe, recipe_from_dict
from conam_zoo.training.train_state import TrainState

__all__ = ["Checkpointer", "EpochSums", "StopRequest", "TrainingStopped"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LATER_FACTS = {"data_sha256"}  # runs that were begun before they were recorded go on without them


class TrainingStopped(Exception):  # noqa: N818 (it was asked for, so it is no error)
    """The training was asked to stop, and its state is saved. Its message is one sentence that says how to go on.

    Attributes:
        exit_code: What the process should end with, 128 plus the signal's number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.exit_code = 128 + signal_number


@dataclass(frozen=True)
class EpochSums:
    """Sums over the augmented training images of an epoch so far, measured while the weights changed.

    Attributes:
        loss: Sum of the loss over the images.
        correct: Images whose most probable class was the right one, or the larger share of a mixed one.
        seen: Images.
        seconds: Time that went into them.
    """

    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is noted in ``signal_number`` and does nothing else.

    A second one acts as it would have before, for the impatient. Outside of the main thread, where Python has no signal
    handlers, nothing is ever noted.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore_handlers()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}


@dataclass
class Checkpointer(StopRequest):
    """Saves the state of a training in its run folder, and takes it up again.

    Entered, it notes a signal, for the loop to save and stop at its next step. In a process group every rank has one,
    and rank 0 writes.

    Attributes:
        folder: The run folder.
        state: What is saved.
        recipe: How it is trained; a resumed training must have the same.
        record: Plain facts that a resumed training must share, such as where the data came from.
        minutes: Time after which the state is saved within an epoch, too; 0 for every step.
        epoch: Epochs that are done.
        step: Steps of the present epoch that are done.
        sums: Of these steps.
        rows: The log, one row for each epoch that is done.
    """

    folder: Path
    state: TrainState
    recipe: Recipe
    record: dict[str, Any]
    minutes: float = 10.0
    epoch: int = 0
    step: int = 0
    sums: EpochSums = EpochSums()
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._saved_at = time.monotonic()

    def requests(self) -> tuple[bool, int]:
        """Whether this rank finds that the state should be saved, and the number of the signal to stop for, or 0."""
        return ranks().first and time.monotonic() - self._saved_at >= 60 * self.minutes, self.signal_number

    def end_epoch(self) -> None:
        """Save the state at an epoch's end, once its row is in ``rows``."""
        self.epoch += 1
        self.save(0, EpochSums())

    def save(self, step: int, sums: EpochSums) -> None:
        """Save the state after ``step`` steps of the present epoch; called on every rank, with the sums over all."""
        self.step, self.sums = step, sums
        if ranks().first:
            facts = asdict(sums)
            facts["hits"] = facts.pop("correct")  # as it was called in the first files
            position = {"epoch": self.epoch, "step": step, "sums": facts, "log": self.rows}
            save_checkpoint(
                self.folder / CHECKPOINT,
                model=self.state.model,
                ema=self.state.ema.module if self.state.ema else None,
                optimizer=self.state.optimizer,
                facts={"recipe": self.recipe.to_dict(), "record": self.record, **position},
            )
        self._saved_at = time.monotonic()

    def stop(self, signal_number: int) -> None:
        """End the training if a signal asked for it; the state has been saved.

        Raises:
            TrainingStopped: If the number is not 0.
        """
        if signal_number:
            place = f"in epoch {self.epoch + 1} after step {self.step}" if self.step else f"after epoch {self.epoch}"
            raise TrainingStopped(
                f"{signal.Signals(signal_number).name} stopped the training {place}: "
                "its state is saved, so the same command with --resume goes on.",
                signal_number,
            )

    def resume(self, tell: Callable[[str], object]) -> None:
        """Take up the newest good state of the run folder; every rank gets what rank 0 reads.

        Args:
            tell: Gets a sentence if the newest is damaged and the one before is taken.

        Raises:
            UserError: If there is no good state, or it is one of another training.
        """
        saved = run_on_primary(lambda: load_latest(self.folder, self._take_up, tell))
        if not ranks().first:
            self._take_up(saved)

    def _take_up(self, saved: dict[str, Any]) -> None:
        """Put a state into the net and what changes it, all of it checked, whatever wrote it.

        Raises:
            OtherTrainingError: If it was begun with another recipe or on other data.
            ValueError, RuntimeError, KeyError, TypeError: If it is damaged.
        """
        facts, rows, steps = saved["facts"], saved["facts"]["log"], self.state.steps_per_epoch
        record = facts.get("record", self.record)
        before = recipe_from_dict(facts["recipe"], "in it").to_dict()
        if not isinstance(record, dict):
            raise ValueError("its record is no table")
        _check_rows(rows)
        _check_same(f"{self.folder} was begun with another recipe", before, self.recipe.to_dict())
        known = {key: value for key, value in self.record.items() if key in record or key not in LATER_FACTS}
        _check_same(f"{self.folder} was begun on other data", record, known)
        epoch = _whole("epoch", facts.get("epoch", len(rows)), self.recipe.epochs)
        step = _whole("step", facts.get("step", 0), steps if epoch < self.recipe.epochs else 0)
        if epoch != len(rows):
            raise ValueError(f"it is in epoch {epoch + 1}, but its log has {len(rows)} rows")
        sums = dict(facts.get("sums", {}))
        if "hits" in sums:
            sums["correct"] = sums.pop("hits")
        totals = EpochSums(**sums)
        _whole("correct", totals.correct, _whole("seen", totals.seen, 2**53))
        if not (_is_number(totals.loss) and _is_number(totals.seconds)) or (totals.seen == 0) != (step == 0):
            raise ValueError("the sums of its epoch are no sums of its steps")
        self.state.load(saved, epoch * steps + step)
        self.epoch, self.step, self.sums, self.rows = epoch, step, totals, rows


def _check_same(begun: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        names = ", ".join("pixels or labels" if key == "data_sha256" else key for key in changed)
        raise OtherTrainingError(f"{begun} ({names} differ): resume it unchanged.")


def _whole(name: str, value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"its {name} is {value!r}, which is no whole number from 0 to {most}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, list):
        raise ValueError("its log is no list")
    needed = ("epoch", "lr", "loss", "train_top1_percent", "seconds")
    for number, row in enumerate(rows, 1):
        good = isinstance(row, dict) and all(_is_number(row[key]) for key in needed) and row["epoch"] == number
        if not good or not all(value is None or type(value) in (int, float) for value in row.values()):
            raise ValueError(f"row {number} of its log is damaged")
