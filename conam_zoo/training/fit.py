"""Training a net on batches, whatever they come from: the loop over epochs, with everything that makes it resumable."""

import json
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from conam_zoo.data import Batches, ImageSplit, normalize
from conam_zoo.errors import UserError
from conam_zoo.files import make_folder
from conam_zoo.layers.confidence import liveness
from conam_zoo.models import StagedClassifier
from conam_zoo.training.checkpoint import CHECKPOINT, clear_half_written, has_checkpoint, load_latest, save_checkpoint
from conam_zoo.training.distributed import all_reduce_max, broadcast_weights, ranks, run_on_primary
from conam_zoo.training.engine import EpochSums, Wish, train_one_epoch
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.recipe import Recipe, recipe_from_dict
from conam_zoo.training.run_folder import LIVENESS, RunLog
from conam_zoo.training.stopping import StopRequest, TrainingStopped
from conam_zoo.training.train_state import TrainState

__all__ = ["FitResult", "check_free", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a training ends in.

    Attributes:
        final: The net whose weights the recipe ships, ``raw`` or ``ema``.
        raw: The net as the optimiser left it.
        ema: The moving average over the steps, or None.
        log: One row for each epoch, as ``run_folder.RunLog`` takes it.
        train_minutes: Time that the epochs took, over all interruptions.
        compile_seconds: Time of the first step, most of it compilation; None without ``compile``.
    """

    final: StagedClassifier
    raw: StagedClassifier
    ema: StagedClassifier | None
    log: list[dict[str, Any]]
    train_minutes: float
    compile_seconds: float | None


def check_free(output: Path, resume: bool) -> None:
    """Refuse a run folder that holds a training already, unless that is to be continued; and the other way round.

    Raises:
        UserError: With the remedy.
    """
    if has_checkpoint(output) and not resume:
        raise UserError(f"{output} holds a training already: add --resume to continue it, or choose another --output.")
    if resume and not has_checkpoint(output):
        raise UserError(
            f"There is no checkpoint {output / CHECKPOINT} to resume from: leave --resume out to start anew."
        )


def fit(
    model: StagedClassifier,
    recipe: Recipe,
    batches: Batches,
    output: Path,
    *,
    holdout: ImageSplit | None = None,
    monitor: ImageSplit | None = None,
    teacher: nn.Module | None = None,
    param_groups: Iterable[dict[str, Any]] | None = None,
    resume: bool = False,
    record: dict[str, Any] | None = None,
    compile: bool = False,
    checkpoint_minutes: float = 10.0,
) -> FitResult:
    """Train a net, and keep its state in the run folder so that the training can go on after any interruption.

    The folder gets ``log.csv``, TensorBoard events, ``checkpoint.safetensors`` and the one before it. On the same CPU a
    resumed training ends in the bits that an uninterrupted one ends in. In a process group all ranks call this, and
    rank 0 writes.

    Args:
        model: The net. It is moved to the training device and trained in place; parameters that need no gradient, and
            batch norms all of whose parameters are so, stay as they are.
        recipe: How to train. Its ``model``, ``dataset``, ``holdout`` and augmentation are not looked at: they are in
            the model and the batches.
        batches: Augmented images and targets.
        output: The run folder.
        holdout: Images to evaluate on after every epoch; nothing is chosen by them.
        monitor: Images that the liveness of each ConAM is measured on after every epoch.
        teacher: A net to learn from as well, on the same images; see ``open_teacher``.
        param_groups: Groups for the optimiser, with ``lr_scale`` where a group learns slower; None for timm's.
        resume: Continue from the newest checkpoint in the folder.
        record: Plain facts that a resumed training must share, such as where the data came from.
        compile: Run the net through ``torch.compile``.
        checkpoint_minutes: Time after which the state is saved within an epoch, too; 0 for every step.

    Raises:
        UserError: If the run folder or the checkpoint is not what it should be.
        NonFiniteLossError: If the training diverges; the last good checkpoint is kept.
        TrainingStopped: On SIGTERM or SIGINT, once the state is saved.
    """
    here = ranks()
    console = Console(quiet=not here.first)
    facts = json.loads(json.dumps(record or {}))
    state = run_on_primary(lambda: _saved_state(output, recipe, facts, resume, console))
    model.to(here.device).to(memory_format=torch.channels_last)
    if teacher is not None:
        teacher.to(here.device).to(memory_format=torch.channels_last)
    learner = TrainState(model, recipe, batches.steps, param_groups=param_groups, teacher=teacher, compile=compile)
    epoch, step, sums, rows = 0, 0, EpochSums(), []
    steps = -(-batches.steps // recipe.grad_accumulation)
    if state is not None:
        rows = state["facts"]["log"]
        epoch, step = state["facts"].get("epoch", len(rows)), state["facts"].get("step", 0)
        sums = EpochSums(**state["facts"].get("sums", {}))
        learner.load(state, epoch * steps + step)
        console.print(f"going on in epoch {epoch + 1}" + (f", after step {step} of {steps}" if step else ""))
    keeper = _Keeper(output, learner, {"recipe": recipe.to_dict(), "record": facts}, rows, checkpoint_minutes)
    final: StagedClassifier = learner.ema.module if learner.ema and recipe.final_weights == "ema" else model
    holdout = holdout.to(here.device) if holdout is not None else None
    watched: Tensor | None = None
    if monitor is not None and here.first:
        cfg = model.pretrained_cfg
        watched = normalize(monitor.images.to(here.device), cfg["mean"], cfg["std"])
    progress = Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not here.first,
    )
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True))
        log = stack.enter_context(RunLog(output, rows)) if here.first else None
        stack.enter_context(progress)
        stack.enter_context(keeper)
        for current in range(epoch, recipe.epochs):
            task = progress.add_task("", total=steps, epoch=f"{current + 1}/{recipe.epochs}")
            keeper.epoch = current
            sums = train_one_epoch(
                learner,
                batches,
                epoch=current,
                seed=recipe.seed,
                first_step=step,
                sums=sums,
                on_step=lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
                interruption=keeper,
            )
            started, scores = time.perf_counter(), None
            if holdout is not None:
                broadcast_weights(final)
                scores = evaluate_on(final, holdout, sharded=True)
            row: dict[str, Any] = {
                "epoch": current + 1,
                "lr": learner.optimizer.param_groups[0]["lr"],
                "loss": sums.loss / sums.seen,
                "train_top1_percent": 100 * sums.hits / sums.seen,
                "holdout_top1_percent": scores.top1_percent if scores else None,
            }
            if watched is not None:
                row |= {LIVENESS + site: value for site, value in liveness(final, watched).items()}
            row["seconds"] = sums.seconds + time.perf_counter() - started
            rows.append(row)
            if log is not None:
                log.write()
            step, sums = 0, EpochSums()
            keeper.epoch = current + 1
            keeper.save(step, sums)
            progress.remove_task(task)
            if current == epoch and learner.compile_seconds is not None:
                console.print(f"torch.compile took {learner.compile_seconds:.0f} s, the first step included")
            console.print(
                f"epoch {row['epoch']:3d}  loss {row['loss']:.4f}  train {row['train_top1_percent']:.2f} %"
                + (f"  held out {row['holdout_top1_percent']:.2f} %" if scores else "")
                + f"  {row['seconds']:.0f} s"
            )
            (stop,) = all_reduce_max([keeper.wish().stop])
            keeper.stop(int(stop))
    broadcast_weights(final)
    minutes = sum(row["seconds"] for row in rows) / 60
    ema = learner.ema.module if learner.ema else None
    return FitResult(final, model, ema, rows, minutes, learner.compile_seconds)


def _saved_state(
    output: Path, recipe: Recipe, record: dict[str, Any], resume: bool, console: Console
) -> dict[str, Any] | None:
    """The state to go on from, or None for a training from the start, for which the folder is made.

    Raises:
        UserError: If the state is one of another training.
    """
    check_free(output, resume)
    if not resume:
        clear_half_written(make_folder(output))
        return None
    state = load_latest(output, console.print)
    before, now = recipe_from_dict(state["facts"]["recipe"], str(output)).to_dict(), recipe.to_dict()
    if changed := sorted(key for key in now if before[key] != now[key]):
        raise UserError(f"{output} was begun with another recipe ({', '.join(changed)} differ): resume it unchanged.")
    begun = state["facts"].get("record", record)
    # A run of an earlier version did not record every fact.
    if changed := sorted(key for key in begun if begun[key] != record.get(key)):
        raise UserError(f"{output} was begun on other data ({', '.join(changed)} differ): resume it unchanged.")
    return state


class _Keeper(StopRequest):
    """Keeps the state of a training: on time, when the process is asked to stop, and at every epoch's end."""

    def __init__(
        self, output: Path, learner: TrainState, facts: dict[str, Any], rows: list[dict[str, Any]], minutes: float
    ) -> None:
        super().__init__()
        self.path, self.learner, self.facts, self.rows, self.seconds = (
            output / CHECKPOINT,
            learner,
            facts,
            rows,
            60 * minutes,
        )
        self.epoch, self.step = 0, 0
        self.saved_at = time.monotonic()

    def wish(self) -> Wish:
        due = ranks().first and time.monotonic() - self.saved_at >= self.seconds
        return Wish(due, self.signal_number)

    def save(self, step: int, sums: EpochSums) -> None:
        """Write the state after ``step`` steps of the present epoch."""
        self.step = step
        if ranks().first:
            position = {"epoch": self.epoch, "step": step, "sums": asdict(sums), "log": self.rows}
            ema = self.learner.ema.module if self.learner.ema else None
            save_checkpoint(
                self.path,
                model=self.learner.model,
                ema=ema,
                optimizer=self.learner.optimizer,
                facts={**self.facts, **position},
            )
        self.saved_at = time.monotonic()

    def stop(self, signal_number: int) -> None:
        """End the training if a signal asked for it; the state has been saved."""
        if signal_number:
            place = f"in epoch {self.epoch + 1} after step {self.step}" if self.step else f"after epoch {self.epoch}"
            raise TrainingStopped(
                f"{signal.Signals(signal_number).name} stopped the training {place}: "
                "its state is saved, so the same command with --resume goes on.",
                signal_number,
            )
