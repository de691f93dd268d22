"""A whole training: from a recipe and a data folder to a run folder."""

import csv
import difflib
import io
import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from conam_zoo.data import BatchAugmentation, ImageSplit, read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.files import make_folder, write_text
from conam_zoo.models import StagedClassifier
from conam_zoo.models.lookup import check_model_name
from conam_zoo.training.checkpoint import load_checkpoint, save_checkpoint
from conam_zoo.training.curves import draw_curves
from conam_zoo.training.engine import batches_of, train_one_epoch
from conam_zoo.training.environment import describe_environment
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.export import export_model
from conam_zoo.training.recipe import Recipe

__all__ = ["train"]

CHECKPOINT = "checkpoint.safetensors"
LOG_FIELDS = ("epoch", "lr", "loss", "train_top1_percent", "holdout_top1_percent", "seconds")


def train(recipe: Recipe, data: str | Path, output: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Train, then evaluate once on the test split, and fill the run folder.

    The folder holds ``run.json`` (recipe, command, versions, hardware, results), ``log.csv``, ``curves.png``,
    ``checkpoint.safetensors`` (the last whole epoch) and ``final/`` in timm's Hub layout. With ``holdout`` in the
    recipe the kept-out training images are evaluated instead, and the test split is never opened.

    Args:
        recipe: What to train and how.
        data: Where the data set is; see ``conam_zoo.data.read_split``.
        output: The run folder.
        resume: Continue from the checkpoint in the run folder.
        command: The command line, for the record.

    Returns:
        What ``run.json`` holds.

    Raises:
        UserError: If the data or the run folder is not what it should be.
        NonFiniteLossError: If the training diverges.
    """
    console = Console()
    checkpoint_path = output / CHECKPOINT
    if checkpoint_path.exists() and not resume:
        raise UserError(f"{output} holds a training already: add --resume to continue it, or choose another --output.")
    state = load_checkpoint(checkpoint_path) if resume else None
    if state is not None and state["facts"]["recipe"] != recipe.to_dict():
        changed = sorted(k for k, v in recipe.to_dict().items() if state["facts"]["recipe"].get(k) != v)
        raise UserError(f"{output} was begun with another recipe ({', '.join(changed)} differ): resume it unchanged.")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_names(recipe)
    train_split, holdout_split = _training_images(recipe, data)
    make_folder(output)
    environment = describe_environment()  # now: the checkout may have moved on when the training is done
    torch.manual_seed(recipe.seed)
    model = _model(recipe).to(device).to(memory_format=torch.channels_last)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    optimizer = create_optimizer_v2(
        model, opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = len(batches_of(torch.arange(len(train_split)), recipe.batch_size))
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps,
        lr_min=recipe.min_lr,
        warmup_t=int(recipe.warmup_epochs * steps),
        warmup_lr_init=recipe.lr / 100,
        t_in_epochs=False,
    )
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None

    log: list[dict[str, Any]] = []
    if state is not None:
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["facts"]["log"]
        scheduler.step_update(len(log) * steps)

    train_split = train_split.to(device)
    augmentation = BatchAugmentation(train_split.images, recipe.crop_padding, recipe.flip)
    final: StagedClassifier = ema.module if ema is not None and recipe.final_weights == "ema" else model
    params = sum(p.numel() for p in model.parameters())
    console.print(
        f"{recipe.model} ({params:,} parameters) on {len(train_split):,} images of {train_split.source}, "
        f"{recipe.epochs} epochs, {recipe.precision} on {device.type}" + (f", from epoch {len(log) + 1}" if log else "")
    )
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        for epoch in range(len(log), recipe.epochs):
            task = progress.add_task("", total=steps, epoch=f"{epoch + 1}/{recipe.epochs}")
            started = time.perf_counter()
            result = train_one_epoch(
                model,
                train_split,
                augmentation,
                optimizer,
                scheduler,
                ema,
                epoch=epoch,
                batch_size=recipe.batch_size,
                label_smoothing=recipe.label_smoothing,
                mean=mean,
                std=std,
                bf16=recipe.precision == "bf16",
                seed=recipe.seed,
                on_step=partial(_show_step, progress, task),
            )
            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "loss": result.loss,
                "train_top1_percent": result.top1_percent,
                "holdout_top1_percent": evaluate_on(final, holdout_split).top1_percent if holdout_split else None,
                "seconds": time.perf_counter() - started,
            }
            log.append(row)
            _write_log(output, log)
            facts = {"recipe": recipe.to_dict(), "log": log}
            save_checkpoint(
                checkpoint_path, model=model, ema=ema.module if ema else None, optimizer=optimizer, facts=facts
            )
            progress.remove_task(task)
            console.print(
                f"epoch {epoch + 1:3d}  loss {row['loss']:.4f}  train {row['train_top1_percent']:.2f} %"
                + (f"  held out {row['holdout_top1_percent']:.2f} %" if holdout_split else "")
                + f"  {row['seconds']:.0f} s"
            )
    return _finish(recipe, final, data, output, log, holdout_split, {"command": command, **environment}, console)


def _check_names(recipe: Recipe) -> None:
    """Refuse a recipe that names a model, an optimiser or model arguments that do not exist."""
    check_model_name(f"{recipe.model}.{recipe.dataset}")
    if recipe.opt not in list_optimizers():
        near = difflib.get_close_matches(recipe.opt, list_optimizers(), n=3) or ["sgd", "adamw"]
        raise UserError(f"timm has no optimiser {recipe.opt!r}: did you mean {' or '.join(near)}?")
    if "num_classes" in recipe.model_args:
        raise UserError("The setting model_args holds num_classes, but the classes are those of the data set.")
    with torch.device("meta"):
        _model(recipe)


def _model(recipe: Recipe) -> StagedClassifier:
    try:
        model: StagedClassifier = timm.create_model(f"{recipe.model}.{recipe.dataset}", **recipe.model_args)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The setting model_args is {recipe.model_args}, which {recipe.model} refuses: {error}"
        ) from error
    return model


def _show_step(progress: Progress, task: TaskID, step: int) -> None:
    progress.update(task, completed=step)


def _training_images(recipe: Recipe, data: str | Path) -> tuple[ImageSplit, ImageSplit | None]:
    """The images to train on, and those held out from them by the recipe."""
    split = read_split(data, "train", recipe.dataset)
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


def _write_log(output: Path, log: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    write_text(output / "log.csv", text.getvalue())


def _finish(
    recipe: Recipe,
    final: StagedClassifier,
    data: str | Path,
    output: Path,
    log: list[dict[str, Any]],
    holdout_split: ImageSplit | None,
    provenance: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Evaluate once, and write everything that a reader of the run wants."""
    draw_curves(log, output / "curves.png", title=f"{recipe.model} on {recipe.dataset}")
    split = holdout_split or read_split(data, "test", recipe.dataset)
    scores = evaluate_on(final, split)
    on = "held-out training images" if holdout_split else "test images"
    console.print(f"top-1 {scores.top1_percent:.2f} %, top-5 {scores.top5_percent:.2f} % on {len(split):,} {on}")
    exported = export_model(final, output / "final", tag=None)
    run = {
        "recipe": recipe.to_dict(),
        "evaluated_on": on,
        "scores": asdict(scores),
        "train_minutes": sum(row["seconds"] for row in log) / 60,
        "sha256": exported,
        **provenance,
    }
    write_text(output / "run.json", json.dumps(run, indent=2) + "\n")
    return run
