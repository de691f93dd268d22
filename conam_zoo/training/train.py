"""A whole training: from a recipe and a data folder to a run folder."""

from contextlib import ExitStack
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
from conam_zoo.inputs import expand_path
from conam_zoo.models import StagedClassifier
from conam_zoo.models.export import export_model
from conam_zoo.models.registry import check_model_name
from conam_zoo.training.curves import draw_curves
from conam_zoo.training.distillation import known_sha256, open_teacher
from conam_zoo.training.distributed import Ranks, process_group, run_on_primary
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.fit import FitResult, fit
from conam_zoo.training.hardware import describe_environment, precision_on
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.run_folder import check_free, hold, write_recipe, write_run
from conam_zoo.training.teacher_bank import BankedBatches, TeacherBank, bank_facts
from conam_zoo.training.train_state import batch_settings, check_optimizer, images_per_batch

__all__ = ["MONITORED_IMAGES", "Assembly", "assemble", "export_run", "train"]

MONITORED_IMAGES = 256  # whose patches' confidences are watched


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
    average, and last of all ``run.json``: recipe, command, versions, hardware, results. With ``holdout`` in the recipe
    the kept-out training images are evaluated instead, and the test split is never opened. Under ``torchrun`` all
    processes call this, and all get the result.

    Args:
        recipe: What to train and how.
        data: Where the data set is; see ``conam_zoo.data.read_split``.
        output: The run folder.
        teacher_bank: Logits of the recipe's teacher that ``record_teacher`` kept; None to run the teacher.
        resume: Continue from the checkpoint in the run folder.
        compile: Run the net through ``torch.compile``.
        checkpoint_minutes: Time after which the state is saved within an epoch, too.
        command: The command line, for the record.

    Returns:
        What ``run.json`` holds.

    Raises:
        UserError: If the data or the run folder is not what it should be.
        NonFiniteLossError: If the training diverges.
        TrainingStopped: On SIGTERM or SIGINT, once the state is saved.
    """
    output, teacher_bank = expand_path(output), teacher_bank and expand_path(teacher_bank)
    with process_group() as here, ExitStack() as held:
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
            console.print(
                f"The recipe's {recipe.precision} is left out: this {here.device.type} has no instructions for it."
            )
        console.print(parts.note)
        held.enter_context(hold(output, resume))
        result = fit(
            parts.model,
            recipe,
            parts.batches,
            output,
            holdout=parts.holdout,
            monitor=parts.monitor,
            teacher=parts.teacher,
            resume=resume,
            record={
                "classes": list(parts.batches.classes),
                "images": parts.num_images,
                "data_sha256": parts.data_sha256,
                **parts.facts,
            },
            compile=compile,
            checkpoint_minutes=checkpoint_minutes,
        )
        split = parts.holdout or _of_size(read_split(data, "test", recipe.dataset), recipe)
        scores = evaluate_on(result.final, split, sharded=True)
        on = "held-out training images" if parts.holdout else "test images"
        console.print(f"top-1 {scores.top1_percent:.2f} %, top-5 {scores.top5_percent:.2f} % on {len(split):,} {on}")
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
        console.print(f"written: {output / 'run.json'}, weights in {output / 'final'}")
        return run


def export_run(result: FitResult, recipe: Recipe, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Write what a finished training leaves: curves, recipe, weights, and ``run.json`` at the very end.

    Returns:
        The facts, with ``sha256`` of the weights in ``final/`` and, if there is a moving average, ``other_sha256`` of
        those that were not chosen: ``raw/`` where the average is final, ``ema/`` where it is not.
    """
    draw_curves(result.log, output / "curves.png", title=f"{recipe.model} on {recipe.dataset}")
    write_recipe(output, recipe)
    run = {**run, "sha256": export_model(result.final, output / "final", tag=None)}
    if result.ema is not None:
        other, name = (result.raw, "raw") if result.final is result.ema else (result.ema, "ema")
        run["other_sha256"] = export_model(other, output / name, tag=None)
    write_run(output, run)
    return run


@dataclass(frozen=True)
class Assembly:
    """The parts of a training that a recipe names.

    Attributes:
        model: The net, initialised by the recipe's seed.
        split: The training images.
        batches: Augmented training images, for the training device.
        note: What a person should know about how the images were read, and where they are kept; a line each.
        num_images: How many training images there are; an epoch may leave some of them out.
        holdout: Training images kept out for choosing, or None.
        monitor: Some training images, the same ones for every training on them, to measure liveness on.
        data_sha256: Hash of images and labels, the held-out ones included.
        teacher: The net to learn from, or None; None as well if the batches carry its logits.
        facts: Facts for the record: ``teacher``, with name and hash, and ``teacher_bank``.
    """

    model: StagedClassifier
    split: ImageSplit
    batches: Batches
    note: str
    num_images: int
    holdout: ImageSplit | None
    monitor: ImageSplit
    data_sha256: str
    teacher: nn.Module | None
    facts: dict[str, Any]


def assemble(recipe: Recipe, data: str | Path, here: Ranks, teacher_bank: Path | None = None) -> Assembly:
    """Read the training images, and make net and teacher; the test split is not opened.

    Raises:
        UserError: If the recipe names what does not exist, or the data is not what it should be.
    """
    _check_names(recipe)
    batch_size = images_per_batch(
        recipe, here
    )  # refuses a batch that the processes cannot share, before anything is read
    split, holdout = _training_images(recipe, data)
    torch.manual_seed(recipe.seed)
    model = _model(recipe)
    teacher: nn.Module | None = None
    facts: dict[str, Any] = {}
    if recipe.teacher and teacher_bank is None:
        teacher, facts["teacher"] = open_teacher(recipe.teacher, model, split.classes)
    cfg = model.pretrained_cfg
    settings = batch_settings(recipe, cfg["mean"], cfg["std"], here)
    batches: Batches
    batches, note = create_loader(
        split,
        split.images.shape[1],
        settings,
        device=here.device,
    )
    if teacher_bank is not None:
        bank = _open_bank(teacher_bank, recipe, split, cfg, here)
        batches, facts = BankedBatches(batches, bank, batch_size), bank.record
    note = "\n".join((*split.notes, note))  # what was left out or rescaled, then where the images are kept
    monitor = split.spread(MONITORED_IMAGES)
    hashed = [part for part in (split, holdout) if part is not None]
    hashes = np.concatenate([image_hashes(part, part.images.shape[1]) for part in hashed])
    sha256 = data_sha256(hashes, np.concatenate([part.labels.cpu().numpy() for part in hashed]))
    return Assembly(model, split, batches, note, len(split), holdout, monitor, sha256, teacher, facts)


def _open_bank(folder: Path, recipe: Recipe, split: ImageSplit, cfg: dict[str, Any], here: Ranks) -> TeacherBank:
    if not recipe.teacher:
        raise UserError(f"The recipe has no teacher, so it cannot learn from {folder}: add --set teacher=NAME.")
    if here.world_size > 1:
        raise UserError(f"{folder} serves a training of one process, but here are {here.world_size}: start one.")
    facts = bank_facts(recipe, split, cfg["mean"], cfg["std"])
    return TeacherBank.open(folder, recipe, facts, known_sha256(recipe.teacher))


def _check_names(recipe: Recipe) -> None:
    """Refuse a recipe that names a model, an optimiser or model arguments that do not exist."""
    check_model_name(f"{recipe.model}.{recipe.dataset}")
    check_optimizer(recipe)
    if "num_classes" in recipe.model_args:
        raise UserError("The setting model_args holds num_classes, but the classes are those of the data set.")
    with torch.device("meta"):
        _model(recipe)


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
    """The images to train on, and those held out from them by the recipe."""
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
