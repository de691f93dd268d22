"""A whole training: from a recipe and a data folder to a run folder; its dry run, and its teacher's outputs alone."""

import itertools
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

from conam_zoo.data import Batches, ImageSplit, check_split, create_loader, read_split
from conam_zoo.data.dataset import data_sha256, image_hashes
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole
from conam_zoo.files import clear_temporaries, expand_path, make_folder
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import check_model_name, count_params_and_macs
from conam_zoo.training.checkpoint import CHECKPOINT, PREVIOUS, StopRequest, stop_for
from conam_zoo.training.distillation import open_teacher
from conam_zoo.training.distributed import Ranks, precision_on, process_group, ranks, run_on_primary, why_fp32
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.fit import fit
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.run_folder import (
    LOG,
    RECIPE,
    RUN,
    check_free,
    describe_environment,
    export_run,
    hold,
    where_it_ran,
)
from conam_zoo.training.teacher_bank import BankedBatches, TeacherBank, bank_facts, holds_epoch, to_float16, write_epoch
from conam_zoo.training.train_state import TrainState, batch_settings, check_optimizer

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

    The arguments are those of ``conam train``, with its command line for the record; docs/training.md lists what is
    written. The content of ``run.json`` is returned. With ``holdout`` in the recipe the kept-out training images are
    evaluated instead, and the test split is never opened. Under ``torchrun`` all processes call this, and all get the
    result. Raises what ``fit`` raises.
    """
    output, teacher_bank = expand_path(output), teacher_bank and expand_path(teacher_bank)
    with process_group() as here:
        run_on_primary(lambda: check_free(output, resume))
        # Now: the checkout may have moved on when the training is done.
        environment = {"precision": precision_on(here.device, recipe.precision), **describe_environment()}
        parts = assemble(recipe, data, here, teacher_bank)
        console = PlainConsole(quiet=not here.first, soft_wrap=True)
        precision = environment["precision"]
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
                environment=environment,
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
                "command": command,
                **parts.facts,
                **where_it_ran(result.history),
            }
            run = run_on_primary(lambda: export_run(result, recipe, output, run))
        console.print(f"written: {output / RUN}, weights in {output / 'final'}")
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
        check_split(data, "test", recipe.dataset)
        return split, None
    if recipe.holdout >= len(split):
        raise UserError(f"The setting holdout is {recipe.holdout}, but there are only {len(split)} training images.")
    # The same images are held out whatever the seed of the training is.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    held, kept = order[: recipe.holdout], order[recipe.holdout :]
    return split.select(kept), replace(split.select(held), source=f"{split.source}, held out")


def _of_size(split: ImageSplit, recipe: Recipe) -> ImageSplit:
    return split.averaged_down(recipe.image_size) if recipe.image_size else split


def dry_run(
    recipe: Recipe,
    data: str | Path,
    output: Path,
    *,
    teacher_bank: Path | None = None,
    compile: bool = False,
) -> dict[str, Any]:
    """Find out what ``train`` with the same arguments would do, and try a few steps on a net that is thrown away.

    Nothing is written and the test split is not opened, but ``cifar10`` and ``cifar100`` as ``data`` are downloaded if
    they are not there yet. What ``train`` would refuse before its first step is refused.
    """
    output, teacher_bank = expand_path(output), teacher_bank and expand_path(teacher_bank)
    with process_group() as here:
        run_on_primary(lambda: check_free(output, resume=False))
        parts = assemble(recipe, data, here, teacher_bank)
        model = parts.model.to(here.device).to(memory_format=torch.channels_last)
        state = TrainState(model, recipe, parts.batches.steps, teacher=parts.teacher, compile=compile)
        steps = state.steps_per_epoch
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # as ``fit`` has them
            early = _time_steps(state, parts.batches, 0) if recipe.early_epochs else 0.0
            seconds = _time_steps(state, parts.batches, recipe.early_epochs)
        total_seconds = steps * (recipe.early_epochs * early + (recipe.epochs - recipe.early_epochs) * seconds)
        name = f"{recipe.model}.{recipe.dataset}"
        params, macs = count_params_and_macs(name, pretrained_cfg_overlay=recipe.cfg_overlay, **recipe.model_args)
        weights = ["final/"]
        if recipe.ema_decay:
            weights.append("raw/" if recipe.final_weights == "ema" else "ema/")
        return {
            "model": name,
            "source": parts.batches.source,
            "loading": parts.note,
            "images": parts.batches.num_images,  # of one epoch
            "held_out": len(parts.holdout) if parts.holdout else 0,
            "classes": len(parts.batches.classes),
            "epochs": recipe.epochs,
            "steps_per_epoch": steps,
            "total_steps": recipe.epochs * steps,
            "batch_size": recipe.batch_size,
            "parameters": params,
            "macs": macs,  # of one image
            "device": f"{here.world_size} x {here.device.type}, {precision_on(here.device, recipe.precision)}",
            "seconds_per_step": seconds,  # on whole images
            "estimated_minutes": total_seconds / 60,  # of all steps; evaluations and compilation come on top
            "compile_seconds": state.compile_seconds,
            "peak_memory_bytes": _peak_memory_bytes(here.device),
            "output": str(output),
            "files": [*weights, CHECKPOINT, PREVIOUS, "curves.png", LOG, RECIPE, RUN, "tensorboard/"],
        }


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


def _peak_memory_bytes(device: torch.device) -> int | None:
    """Of the device on a GPU; of the whole process on a CPU, libraries and data included; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def record_teacher(recipe: Recipe, data: str | Path, bank: Path, *, epochs: int | None = None) -> int:
    """Record the teacher of a recipe, in its precision, on the batches of its epochs, or of so many epochs.

    Epochs that the bank holds already are kept, so the same call goes on after an interruption (``TrainingStopped``),
    replaces what is damaged, and with more epochs makes the bank longer. Returns how many were recorded now.
    """
    if not recipe.teacher:
        raise UserError("The recipe has no teacher to record: add --set teacher=NAME.")
    here, epochs = ranks(), recipe.epochs if epochs is None else epochs
    parts = assemble(recipe, data, here)
    teacher = parts.teacher
    assert teacher is not None
    precision = precision_on(here.device, recipe.precision)
    facts = {
        "recipe": bank_facts(recipe, parts.split, parts.model.pretrained_cfg),
        "teacher": parts.facts["teacher"],
        "epochs": epochs,
        "computed_in": precision,
    }
    bank = make_folder(bank)
    clear_temporaries(bank)
    missing = [epoch for epoch in range(epochs) if not holds_epoch(bank, epoch, facts)]
    bf16 = precision == "bf16"
    console = PlainConsole()
    console.print(f"{recipe.teacher} on {parts.batches.num_images:,} images, {len(missing)} of {epochs} epochs to do")
    with StopRequest() as request, torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        for epoch in missing:
            started, kept = time.perf_counter(), []
            for images, *_ in parts.batches.epoch(epoch):
                stop_for(
                    request.signal_number,
                    f"the recording in epoch {epoch + 1}: the epochs before it are kept, so the same command goes on.",
                )
                with torch.no_grad(), torch.autocast(here.device.type, dtype=torch.bfloat16, enabled=bf16):
                    kept.append(to_float16(teacher(images), recipe.teacher))
            write_epoch(bank, epoch, torch.cat(kept).cpu(), facts)
            console.print(f"epoch {epoch + 1:3d} of {epochs}  {time.perf_counter() - started:.0f} s")
    return len(missing)
