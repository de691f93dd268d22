"""What a training would do and cost, found out by a few of its steps, with nothing written."""

import itertools
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from conam_zoo.data import Batches
from conam_zoo.inputs import expand_path
from conam_zoo.models.registry import count_params_and_macs
from conam_zoo.training.checkpoint import CHECKPOINT, PREVIOUS
from conam_zoo.training.distributed import process_group
from conam_zoo.training.hardware import precision_on
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.run_folder import check_free
from conam_zoo.training.train import assemble
from conam_zoo.training.train_state import TrainState

__all__ = ["DryRun", "dry_run"]

WARM_UP_STEPS, TIMED_STEPS = 2, 5


@dataclass(frozen=True)
class DryRun:
    """What ``train`` would do.

    Attributes:
        model: Builder and data set.
        source: Where the training images are.
        loading: Whether they stay on the device as a whole, and why.
        images: Training images of one epoch.
        held_out: Training images kept out of it.
        classes: Number of classes.
        epochs: Passes over the training images.
        steps_per_epoch: Changes of the weights in one epoch.
        total_steps: In all epochs.
        batch_size: Images of a step.
        parameters: Of the net.
        macs: Multiply-accumulates of one image in the forward pass.
        device: What it would run on, and in which precision.
        seconds_per_step: Median of a few real steps on whole images.
        estimated_minutes: Time of all steps; evaluations and compilation come on top.
        compile_seconds: Time of the first compiled step; None without ``compile``.
        peak_memory_bytes: Of the device's memory on a GPU; of the whole process on a CPU, libraries and data included.
        output: The run folder.
        files: What would be in it.
    """

    model: str
    source: str
    loading: str
    images: int
    held_out: int
    classes: int
    epochs: int
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    parameters: int
    macs: int
    device: str
    seconds_per_step: float
    estimated_minutes: float
    compile_seconds: float | None
    peak_memory_bytes: int
    output: str
    files: tuple[str, ...]


def dry_run(
    recipe: Recipe,
    data: str | Path,
    output: Path,
    *,
    teacher_bank: Path | None = None,
    resume: bool = False,
    compile: bool = False,
) -> DryRun:
    """Find out what ``train`` with the same arguments would do, and try a few steps on a net that is thrown away.

    Nothing is written and the test split is not opened. ``cifar10`` and ``cifar100`` as ``data`` are downloaded if they
    are not there yet, as ``train`` would do.

    Raises:
        UserError: Whatever ``train`` would refuse before its first step.
    """
    output, teacher_bank = expand_path(output), teacher_bank and expand_path(teacher_bank)
    with process_group() as here:
        check_free(output, resume)
        parts = assemble(recipe, data, here, teacher_bank)
        model = parts.model.to(here.device).to(memory_format=torch.channels_last)
        teacher = parts.teacher
        if teacher is not None:
            teacher = teacher.to(here.device).to(memory_format=torch.channels_last)
        state = TrainState(model, recipe, parts.batches.steps, teacher=teacher, compile=compile)
        steps = state.steps_per_epoch
        early = _time_steps(state, parts.batches, 0) if recipe.early_epochs else 0.0
        seconds = _time_steps(state, parts.batches, recipe.early_epochs)
        total_seconds = steps * (recipe.early_epochs * early + (recipe.epochs - recipe.early_epochs) * seconds)
        name = f"{recipe.model}.{recipe.dataset}"
        params, macs = count_params_and_macs(name, pretrained_cfg_overlay=recipe.cfg_overlay, **recipe.model_args)
        weights = ["final/"]
        if recipe.ema_decay:
            weights.append("raw/" if recipe.final_weights == "ema" else "ema/")
        return DryRun(
            model=name,
            source=parts.batches.source,
            loading=parts.note,
            images=parts.batches.num_images,
            held_out=len(parts.holdout) if parts.holdout else 0,
            classes=len(parts.batches.classes),
            epochs=recipe.epochs,
            steps_per_epoch=steps,
            total_steps=recipe.epochs * steps,
            batch_size=recipe.batch_size,
            parameters=params,
            macs=macs,
            device=f"{here.world_size} x {here.device.type}, {precision_on(here.device, recipe.precision)}",
            seconds_per_step=seconds,
            estimated_minutes=total_seconds / 60,
            compile_seconds=state.compile_seconds,
            peak_memory_bytes=_peak_memory_bytes(here.device),
            output=str(output),
            files=(*weights, CHECKPOINT, PREVIOUS, "curves.png", "log.csv", "recipe.toml", "run.json", "tensorboard/"),
        )


def _time_steps(state: TrainState, batches: Batches, first_epoch: int) -> float:
    """Median seconds of a few full steps on the images of an epoch, after some to warm up."""
    times = []
    state.train()
    stream = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count(first_epoch))
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        group = list(itertools.islice(stream, state.grad_accumulation))
        loss, _ = state.accumulate(group, sum(len(targets) for _, targets, *_ in group))
        state.step(step + 1)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP_STEPS:])


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB
