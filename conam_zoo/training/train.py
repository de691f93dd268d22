"""A whole training: from a recipe and a data folder to a run folder; its dry run, and its teacher's outputs alone."""

import itertools
import json
import resource
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from conam_zoo.data import Batches, ImageSplit, create_loader, read_split
from conam_zoo.data.dataset import data_sha256, image_hashes
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole
from conam_zoo.files import clear_temporaries, expand_path, make_folder, write_text
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import check_model_name, count_params_and_macs, export_model
from conam_zoo.training.checkpoint import CHECKPOINT, PREVIOUS, StopRequest, TrainingStopped
from conam_zoo.training.distillation import open_teacher
from conam_zoo.training.distributed import Ranks, precision_on, process_group, ranks, run_on_primary, why_fp32
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.fit import FitResult, fit
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.run_folder import RECIPE, RUN, check_free, describe_environment, draw_curves, hold
from conam_zoo.training.teacher_bank import BankedBatches, TeacherBank, bank_facts, holds_epoch, to_float16, write_epoch
from conam_zoo.training.train_state import TrainState, batch_settings, check_optimizer

__all__ = ["MONITORED_IMAGES", "Assembly", "DryRun", "assemble", "dry_run", "export_run", "record_teacher", "train"]

MONITORED_IMAGES = 256  # whose patches' confidences are watched
WARM_UP_STEPS, TIMED_STEPS = 2, 5  # of a dry run


def train(
    recipe: Recipe,
    data: str | Path,
    output: Path,
    *,
    teacher_bank: Path | None = None,
    resume: bool = False,
    compile: bool = False,
    checkpoint_minutes: float = 10.0,
    command: str = "",
) -> dict[str, Any]:
    """Train, then evaluate once on the test split, and fill the run folder.

    The folder gets what ``fit`` writes, ``recipe.toml`` with every setting spelt out, ``curves.png``, ``final/`` with
    the weights in timm's Hub layout, beside it ``raw/`` or ``ema/`` with the other weights if there is a moving
    average, and last of all ``run.json``, which is returned: recipe, command, versions, hardware, results. With
    ``holdout`` in the recipe the kept-out training images are evaluated instead, and the test split is never opened.
    Under ``torchrun`` all processes call this, and all get the result.

    Args:
        recipe: What to train and how.
        data: Where the data set is; see ``conam_zoo.data.read_split``.
        output: The run folder.
        teacher_bank: Logits of the recipe's teacher that ``record_teacher`` kept; None to run the teacher.
        resume: Continue from the checkpoint in the run folder.
        compile: Run the net through ``torch.compile``.
        checkpoint_minutes: Time after which the state is saved within an epoch, too; 0 for every step.
        command: The command line, for the record.

    Raises:
        UserError: If the data or the run folder is not what it should be.
        NonFiniteLossError: If the training diverges.
        TrainingStopped: On SIGTERM or SIGINT, once the state is saved.
    """
    output, teacher_bank = expand_path(output), teacher_bank and expand_path(teacher_bank)
    with process_group() as here:
        run_on_primary(lambda: check_free(output, resume))
        environment = describe_environment()  # now: the checkout may have moved on when the training is done
        parts = assemble(recipe, data, here, teacher_bank)
        console = PlainConsole(quiet=not here.first, soft_wrap=True)
        precision = precision_on(here.device, recipe.precision)
        params = sum(p.numel() for p in parts.model.parameters())
        console.print(
            f"{recipe.model} ({params:,} parameters) on {parts.batches.num_images:,} images of {parts.batches.source}, "
            f"{recipe.epochs} epochs, {precision} on {here.world_size} x {here.device.type}"
        )
        if precision != recipe.precision:
            console.print(f"The recipe's {recipe.precision} is left out: {why_fp32(here.device)}.")
        console.print(parts.note)
        hashed = [part for part in (parts.split, parts.holdout) if part is not None]
        hashes = np.concatenate([image_hashes(part, part.images.shape[1]) for part in hashed])
        record = {
            "classes": list(parts.batches.classes),
            "images": len(parts.split),
            "data_sha256": data_sha256(hashes, np.concatenate([part.labels.cpu().numpy() for part in hashed])),
            **parts.facts,
        }
        with hold(output, resume):
            result = fit(
                parts.model,
                recipe,
                parts.batches,
                output,
                holdout=parts.holdout,
                monitor=parts.split.spread(MONITORED_IMAGES),
                teacher=parts.teacher,
                resume=resume,
                record=record,
                compile=compile,
                checkpoint_minutes=checkpoint_minutes,
            )
            split = parts.holdout or _of_size(read_split(data, "test", recipe.dataset), recipe)
            scores = evaluate_on(result.final, split, sharded=True)
            on = "held-out training images" if parts.holdout else "test images"
            console.print(
                f"top-1 {scores.top1_percent:.2f} %, top-5 {scores.top5_percent:.2f} % on {len(split):,} {on}"
            )
            run = {
                "recipe": recipe.to_dict(),
                "evaluated_on": on,
                "scores": asdict(scores),
                "train_minutes": result.train_minutes,
                "compile_seconds": result.compile_seconds,
                "world_size": here.world_size,
                "precision": precision,
                "command": command,
                **parts.facts,
                **environment,
            }
            run = run_on_primary(lambda: export_run(result, recipe, output, run))
        console.print(f"written: {output / RUN}, weights in {output / 'final'}")
        return run


def export_run(result: FitResult, recipe: Recipe, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Write what a finished training leaves: curves, recipe, weights, and ``run.json``, which is returned, at the end.

    It gets ``sha256`` of the weights in ``final/`` and, if there is a moving average, ``other_sha256`` of the others.
    """
    draw_curves(result.log, output / "curves.png", title=f"{recipe.model} on {recipe.dataset}")
    write_text(output / RECIPE, recipe.to_toml())
    run = {**run, "sha256": export_model(result.final, output / "final", tag=None)}
    if result.ema is not None:
        other, name = (result.raw, "raw") if result.final is result.ema else (result.ema, "ema")
        run["other_sha256"] = export_model(other, output / name, tag=None)
    write_text(output / RUN, json.dumps(run, indent=2) + "\n")
    return run


@dataclass(frozen=True)
class Assembly:
    """The parts of a training that a recipe names."""

    model: StagedClassifier  # initialised by the recipe's seed
    split: ImageSplit  # the training images; an epoch may leave some of them out
    batches: Batches  # augmented, for the training device
    note: str  # what a person should know about how the images were read, and where they are kept; a line each
    holdout: ImageSplit | None  # training images kept out for choosing
    teacher: nn.Module | None  # to learn from, on the device; None as well if the batches carry its logits
    facts: dict[str, Any]  # for the record: teacher, with name and hash, and teacher_bank


def assemble(recipe: Recipe, data: str | Path, here: Ranks, teacher_bank: Path | None = None) -> Assembly:
    """Read the training images, and make net and teacher; the test split is not opened."""
    # What can be refused is refused before anything is read.
    check_model_name(f"{recipe.model}.{recipe.dataset}")
    check_optimizer(recipe)
    if "num_classes" in recipe.model_args:
        raise UserError("The setting model_args holds num_classes, but the classes are those of the data set.")
    with torch.device("meta"):
        cfg = _model(recipe).pretrained_cfg
    settings = batch_settings(recipe, cfg["mean"], cfg["std"], here)
    split, holdout = _training_images(recipe, data)
    torch.manual_seed(recipe.seed)
    model = _model(recipe)
    teacher: nn.Module | None = None
    facts: dict[str, Any] = {}
    if recipe.teacher and teacher_bank is None:
        teacher, facts["teacher"] = open_teacher(recipe.teacher, model, split.classes)
        teacher = teacher.to(here.device).to(memory_format=torch.channels_last)
    batches: Batches
    batches, kept = create_loader(split, split.images.shape[1], settings, device=here.device)
    if teacher_bank is not None:
        bank = TeacherBank.open(teacher_bank, recipe, split, cfg)
        batches, facts = BankedBatches(batches, bank, settings.batch_size), bank.record
    return Assembly(model, split, batches, "\n".join((*split.notes, kept)), holdout, teacher, facts)


def _model(recipe: Recipe) -> StagedClassifier:
    try:
        model: StagedClassifier = timm.create_model(
            f"{recipe.model}.{recipe.dataset}", pretrained_cfg_overlay=recipe.cfg_overlay, **recipe.model_args
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The setting model_args is {recipe.model_args}, which {recipe.model} refuses: {error}"
        ) from error
    return model


def _training_images(recipe: Recipe, data: str | Path) -> tuple[ImageSplit, ImageSplit | None]:
    """The images to train on, and those held out from them."""
    split = _of_size(read_split(data, "train", recipe.dataset), recipe)
    facts = DATASETS.get(recipe.dataset)
    if facts is not None and split.classes != facts.classes:
        raise UserError(f"{split.source} does not hold the classes of {facts.title}: point --data at that data set.")
    if recipe.holdout == 0:
        return split, None
    if recipe.holdout >= len(split):
        raise UserError(f"The setting holdout is {recipe.holdout}, but there are only {len(split)} training images.")
    # The same images are held out whatever the seed of the training is.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    held, kept = order[: recipe.holdout], order[recipe.holdout :]
    return split.select(kept), replace(split.select(held), source=f"{split.source}, held out")


def _of_size(split: ImageSplit, recipe: Recipe) -> ImageSplit:
    return split.averaged_down(recipe.image_size) if recipe.image_size else split


@dataclass(frozen=True)
class DryRun:
    """What ``train`` would do."""

    model: str  # builder and data set
    source: str  # where the training images are
    loading: str  # how they were read, whether they stay on the device as a whole, and why
    images: int  # of one epoch
    held_out: int  # training images kept out of it
    classes: int
    epochs: int
    steps_per_epoch: int  # changes of the weights
    total_steps: int
    batch_size: int  # images of a step
    parameters: int
    macs: int  # multiply-accumulates of one image in the forward pass
    device: str  # with the precision
    seconds_per_step: float  # median of a few real steps on whole images
    estimated_minutes: float  # of all steps; evaluations and compilation come on top
    compile_seconds: float | None  # of the first compiled step; None without compile
    peak_memory_bytes: int  # of the device on a GPU; of the whole process on a CPU, libraries and data included
    output: str  # the run folder
    files: tuple[str, ...]  # what would be in it


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
    are not there yet. What ``train`` would refuse before its first step is refused.
    """
    output, teacher_bank = expand_path(output), teacher_bank and expand_path(teacher_bank)
    with process_group() as here:
        check_free(output, resume)
        parts = assemble(recipe, data, here, teacher_bank)
        model = parts.model.to(here.device).to(memory_format=torch.channels_last)
        state = TrainState(model, recipe, parts.batches.steps, teacher=parts.teacher, compile=compile)
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
        group = list(itertools.islice(stream, state.recipe.grad_accumulation))
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


def record_teacher(recipe: Recipe, data: str | Path, bank: Path, *, epochs: int | None = None) -> int:
    """Record the teacher of a recipe, in its precision, on the batches of its epochs, or of so many epochs.

    Epochs that the bank holds already are kept, so the same call goes on after an interruption, mends what is damaged,
    and with more epochs makes the bank longer. It gives the number of epochs that were recorded now.

    Raises:
        UserError: If the recipe has no teacher, the folder holds another bank, or a logit overflows float16.
        TrainingStopped: On SIGTERM or SIGINT; whole epochs are kept.
    """
    if not recipe.teacher:
        raise UserError("The recipe has no teacher to record: add --set teacher=NAME.")
    here, epochs = ranks(), recipe.epochs if epochs is None else epochs
    parts = assemble(recipe, data, here)
    teacher = parts.teacher
    assert teacher is not None
    facts = {
        "recipe": bank_facts(recipe, parts.split, parts.model.pretrained_cfg),
        "teacher": parts.facts["teacher"],
        "epochs": epochs,
    }
    bank = make_folder(bank)
    clear_temporaries(bank)
    missing = [epoch for epoch in range(epochs) if not holds_epoch(bank, epoch, facts)]
    bf16 = precision_on(here.device, recipe.precision) == "bf16"
    console = PlainConsole()
    console.print(f"{recipe.teacher} on {parts.batches.num_images:,} images, {len(missing)} of {epochs} epochs to do")
    with StopRequest() as request, torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        for epoch in missing:
            started, kept = time.perf_counter(), []
            for images, *_ in parts.batches.epoch(epoch):
                if request.signal_number:
                    raise TrainingStopped(
                        f"{signal.Signals(request.signal_number).name} stopped the recording in epoch {epoch + 1}: "
                        "the epochs before it are kept, so the same command goes on.",
                        request.signal_number,
                    )
                with torch.no_grad(), torch.autocast(here.device.type, dtype=torch.bfloat16, enabled=bf16):
                    kept.append(to_float16(teacher(images), recipe.teacher))
            write_epoch(bank, epoch, torch.cat(kept).cpu(), facts)
            console.print(f"epoch {epoch + 1:3d} of {epochs}  {time.perf_counter() - started:.0f} s")
    return len(missing)
