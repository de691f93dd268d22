"""Recording a bank of logits: the teacher runs once over the batches that a recipe will show."""

import signal
import time
from pathlib import Path
from typing import Any

import torch

from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole
from conam_zoo.files import clear_temporaries, make_folder
from conam_zoo.training.checkpointer import StopRequest, TrainingStopped
from conam_zoo.training.distributed import ranks
from conam_zoo.training.hardware import precision_on
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.teacher_bank import bank_facts, epoch_file, read_epoch, to_float16, write_epoch
from conam_zoo.training.train import assemble

__all__ = ["record_teacher"]


def record_teacher(recipe: Recipe, data: str | Path, bank: Path, *, epochs: int | None = None) -> int:
    """Record the teacher of a recipe, in its precision, on the batches of its epochs.

    Epochs that the bank holds already are kept, so the same call goes on after an interruption, mends what is damaged,
    and with more epochs makes the bank longer.

    Args:
        recipe: Names the teacher, and how the batches are made.
        data: Where the data set is; see ``conam_zoo.data.read_split``.
        bank: The folder.
        epochs: How many; those of the recipe if None.

    Returns:
        How many epochs were recorded now.

    Raises:
        UserError: If the recipe has no teacher, the folder holds another bank, or a logit overflows float16.
        TrainingStopped: On SIGTERM or SIGINT; whole epochs are kept.
    """
    if not recipe.teacher:
        raise UserError("The recipe has no teacher to record: add --set teacher=NAME.")
    here, epochs = ranks(), recipe.epochs if epochs is None else epochs
    parts = assemble(recipe, data, here)
    assert parts.teacher is not None
    cfg = parts.model.pretrained_cfg
    facts = {
        "recipe": bank_facts(recipe, parts.split, cfg["mean"], cfg["std"]),
        "teacher": parts.facts["teacher"],
        "epochs": epochs,
    }
    bank = make_folder(bank)
    clear_temporaries(bank)
    missing = [epoch for epoch in range(epochs) if not _has(bank, epoch, facts)]
    teacher = parts.teacher.to(here.device).to(memory_format=torch.channels_last)
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


def _has(bank: Path, epoch: int, facts: dict[str, Any]) -> bool:
    """Whether the bank holds an epoch, whole.

    Raises:
        UserError: If it is one of other batches or of another teacher.
    """
    if not epoch_file(bank, epoch).is_file():
        return False
    try:
        _, recorded, _ = read_epoch(bank, epoch)
    except UserError:
        return False  # damaged
    for part in ("recipe", "teacher"):
        for key, value in facts[part].items():
            if recorded[part].get(key) != value:
                raise UserError(
                    f"{bank} holds the logits of another recording ({key} was {recorded[part].get(key)!r} and is "
                    f"{value!r}): choose another --output."
                )
    return True
