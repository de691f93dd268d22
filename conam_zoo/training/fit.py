"""Training a net on batches, whatever they come from: the loop over epochs, with everything that makes it resumable."""

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from conam_zoo.data import Batches, ImageSplit, normalize
from conam_zoo.escape import PlainConsole
from conam_zoo.layers.confidence import liveness
from conam_zoo.models import StagedClassifier
from conam_zoo.training.checkpoint import Checkpointer
from conam_zoo.training.distributed import all_reduce_max, broadcast_weights, ranks
from conam_zoo.training.engine import train_one_epoch
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.run_folder import LIVENESS, FitResult, RunLog
from conam_zoo.training.train_state import TrainState


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
    environment: dict[str, Any] | None = None,
    compile: bool = False,
    checkpoint_minutes: float = 10.0,
) -> FitResult:
    """Train a net, and keep its state in the run folder so that the training can go on after any interruption.

    The folder, which the caller holds (``run_folder.hold``), gets ``log.csv``, TensorBoard events and the last two
    checkpoints. On the same CPU a resumed training ends in the bits that an uninterrupted one ends in. In a process
    group all ranks call this. ``model`` is moved to the training device, where ``teacher`` is, and trained in place; of
    ``recipe`` its model, data, ``holdout`` and augmentation do not count here. After every epoch the accuracy on
    ``holdout`` and the liveness of each ConAM on ``monitor`` are logged; nothing is chosen by them. ``record`` holds
    plain facts that a resumed training must share; ``environment`` those that it need not, such as its hardware, which
    the result's ``history`` keeps. For the other arguments see ``TrainState`` and ``train``.

    Raises:
        NonFiniteLossError: If the training diverges; the last good checkpoint is kept.
        TrainingStopped: On SIGTERM or SIGINT, once the state is saved.
    """
    here = ranks()
    console = PlainConsole(quiet=not here.first, soft_wrap=True)
    model.to(here.device).to(memory_format=torch.channels_last)
    state = TrainState(model, recipe, batches.steps, param_groups=param_groups, teacher=teacher, compile=compile)
    facts = json.loads(json.dumps(record or {}))  # as they will be read back, without tuples
    checkpointer = Checkpointer(output, state, facts, checkpoint_minutes)
    final: StagedClassifier = state.ema.module if state.ema and recipe.final_weights == "ema" else model
    holdout = holdout.to(here.device) if holdout is not None else None
    watched, cfg = None, model.pretrained_cfg
    if monitor is not None and here.first:
        watched = normalize(monitor.images.to(here.device), cfg["mean"], cfg["std"])
    with ExitStack() as stack:
        if resume:
            checkpointer.resume(console.print)
            after = f", after step {checkpointer.step} of {state.steps_per_epoch}" if checkpointer.step else ""
            console.print(f"going on in epoch {checkpointer.epoch + 1}{after}")
        if checkpointer.epoch < recipe.epochs:
            checkpointer.note(json.loads(json.dumps(environment or {})))
        first, rows = checkpointer.epoch, checkpointer.rows
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False))
        log = stack.enter_context(RunLog(output, rows)) if here.first else None
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        progress = stack.enter_context(Progress(*columns, *times, console=console, disable=not here.first))
        stack.enter_context(checkpointer)
        for epoch in range(first, recipe.epochs):
            task = progress.add_task("", total=state.steps_per_epoch, epoch=f"{epoch + 1}/{recipe.epochs}")
            sums = train_one_epoch(
                state,
                batches,
                epoch=epoch,
                first_step=checkpointer.step,
                on_step=lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
                checkpointer=checkpointer,
            )
            started, held_out = time.perf_counter(), None
            if holdout is not None:
                broadcast_weights(final)
                held_out = evaluate_on(final, holdout, sharded=True).top1_percent
            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "lr": state.lr,
                "loss": sums.loss / sums.seen,
                "train_top1_percent": 100 * sums.correct / sums.seen,
                "holdout_top1_percent": held_out,
            }
            if watched is not None:
                row |= {LIVENESS + site: value for site, value in liveness(final, watched).items()}
            row["seconds"] = sums.seconds + time.perf_counter() - started
            rows.append(row)
            if log is not None:
                log.write()
            checkpointer.end_epoch()
            progress.remove_task(task)
            if epoch == first and state.compile_seconds is not None:
                console.print(f"torch.compile took {state.compile_seconds:.0f} s, the first step included")
            console.print(
                f"epoch {row['epoch']:3d}  loss {row['loss']:.4f}  train {row['train_top1_percent']:.2f} %"
                + (f"  held out {held_out:.2f} %" if held_out is not None else "")
                + f"  {row['seconds']:.0f} s"
            )
            (stop,) = all_reduce_max([checkpointer.signal_number])
            checkpointer.stop(int(stop))
    broadcast_weights(final)
    minutes = sum(row["seconds"] for row in rows) / 60
    average = state.ema.module if state.ema else None
    return FitResult(final, model, average, rows, checkpointer.history, minutes, state.compile_seconds)
