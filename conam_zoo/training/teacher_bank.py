"""A teacher's logits on the very batches of a recipe, recorded once for any number of students.

A bank is a folder with one safetensors file for each epoch, ``epoch-0000.safetensors`` and so on, of float16 logits
(N, classes) in the order in which the epoch shows its images; a student of the same seed, batch size and augmentation
sees the same ones. Each header holds all that the logits depend on, and a SHA-256 of this and the logits.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conam_zoo.data import AugmentationSettings, Batches, ImageSplit
from conam_zoo.data.dataset import data_sha256, image_hashes
from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically
from conam_zoo.training.distillation import known_sha256
from conam_zoo.training.distributed import ranks
from conam_zoo.training.recipe import Recipe

# The settings that decide which images a batch shows, and in which precision the teacher looks at them.
SETTINGS = (
    *("dataset", "teacher", "seed", "batch_size", "grad_accumulation", "holdout", "image_size", "precision"),
    *(field.name for field in fields(AugmentationSettings)),
)


def bank_facts(recipe: Recipe, split: ImageSplit, cfg: dict[str, Any]) -> dict[str, Any]:
    """What the images of a recipe's batches depend on: its settings, the training images, how they are normalised."""
    values = recipe.to_dict()
    images = data_sha256(image_hashes(split, split.images.shape[1]), split.labels.cpu().numpy())
    settings = {key: values[key] for key in SETTINGS}
    return {**settings, "images": images, "mean": list(cfg["mean"]), "std": list(cfg["std"])}


def epoch_file(bank: Path, epoch: int) -> Path:
    """The file of an epoch, from 0."""
    return bank / f"epoch-{epoch:04d}.safetensors"


def write_epoch(bank: Path, epoch: int, logits: Tensor, facts: dict[str, Any]) -> None:
    """Write the float16 logits (N, classes) of an epoch, in the order in which the images are shown.

    ``facts`` are ``recipe`` from ``bank_facts``, ``teacher`` from ``open_teacher``, the planned ``epochs``, and the
    precision that the logits were ``computed_in``.
    """
    header = json.dumps({**facts, "epoch": epoch}, sort_keys=True)
    metadata = {"facts": header, "sha256": _sha256(header, logits)}
    write_atomically(epoch_file(bank, epoch), lambda file: save_file({"logits": logits}, file, metadata=metadata))


def read_epoch(bank: Path, epoch: int) -> tuple[Tensor, dict[str, Any], str]:
    """The float16 logits (N, classes) of an epoch, its facts and its hash, which was checked."""
    path = epoch_file(bank, epoch)
    remedy = "let conam record-teacher write it again, which keeps what is whole"
    if not path.is_file():
        raise UserError(f"There is no {path}: {remedy}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            logits, facts = file.get_tensor("logits"), json.loads(metadata["facts"])
        right = metadata["sha256"] == _sha256(metadata["facts"], logits)
        whole = right and facts["epoch"] == epoch and isinstance(facts["computed_in"], str)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: {remedy}.")
    return logits, facts, metadata["sha256"]


def _sha256(header: str, logits: Tensor) -> str:
    digest = hashlib.sha256(header.encode())
    digest.update(logits.contiguous().numpy().data)
    return digest.hexdigest()


def holds_epoch(bank: Path, epoch: int, facts: dict[str, Any]) -> bool:
    """Whether the bank holds an epoch, whole; one of other batches or of another teacher is refused."""
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


@dataclass(frozen=True)
class TeacherBank:
    """A bank that was checked against a student's recipe; epoch e of the student is its epoch ``e % epochs``."""

    folder: Path
    epochs: int  # how many of the bank's the student reads
    # teacher, with name and hash; teacher_bank, with the hash over the epochs read; teacher_precision
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, split: ImageSplit, cfg: dict[str, Any]) -> "TeacherBank":
        """Check a bank, each of its logits included."""
        if not recipe.teacher:
            raise UserError(f"The recipe has no teacher, so it cannot learn from {folder}: add --set teacher=NAME.")
        if (processes := ranks().world_size) > 1:
            raise UserError(f"{folder} serves a training of one process, but here are {processes}: start one.")
        held = 0
        while epoch_file(folder, held).is_file():
            held += 1
        if not held:
            raise UserError(f"{folder} holds no recorded teacher logits: record one with conam record-teacher.")
        planned = read_epoch(folder, held - 1)[1]["epochs"]
        if held < planned and held < recipe.epochs:
            raise UserError(f"{folder} holds {held} of {planned} epochs: let conam record-teacher finish it first.")
        used, hashes, facts = min(held, recipe.epochs), [], bank_facts(recipe, split, cfg)
        precisions: set[str] = set()
        for epoch in range(used):
            _, recorded, digest = read_epoch(folder, epoch)
            for key, value in facts.items():
                if recorded["recipe"].get(key) != value:
                    raise UserError(f"{folder} was recorded {_difference(key, recorded['recipe'].get(key), value)}")
            hashes.append(digest)
            precisions.add(recorded["computed_in"])
        teacher, today = recorded["teacher"], known_sha256(recipe.teacher)
        if None not in (today, teacher["sha256"]) and today != teacher["sha256"]:
            raise UserError(
                f"{folder} was recorded with other weights of {teacher['name']} (SHA-256 {teacher['sha256'][:12]}...) "
                f"than those of today ({today[:12]}...): record a bank anew."  # type: ignore[index]
            )
        if recipe.epochs > used and recipe.alternate_flip and used % 2:
            raise UserError(
                f"{folder} holds {used} epochs, and to pass it again with alternate_flip takes an even number: "
                "record one more."
            )
        if recipe.epochs > used and recipe.early_epochs:
            raise UserError(
                f"{folder} holds {used} epochs, and to pass it again would bring the crops of early_epochs back: "
                f"record all {recipe.epochs}."
            )
        together = hashlib.sha256("".join(hashes).encode()).hexdigest()
        record: dict[str, Any] = {"teacher": teacher, "teacher_bank": {"sha256": together, "epochs": used}}
        record["teacher_precision"] = sorted(precisions)
        return cls(folder, used, record)


def _difference(key: str, recorded: Any, value: Any) -> str:
    if key == "images":
        return "on other training images: record a bank of these."
    return (
        f"with {key} = {recorded!r}, but the recipe has {value!r}: set {key} to that, or record a bank of this recipe."
    )


class BankedBatches(Batches):
    """Batches of a single process that carry the teacher's logits as a third tensor, float16 (B, classes).

    Past the bank's last epoch the first one follows again, its images included.
    """

    def __init__(self, batches: Batches, bank: TeacherBank, batch_size: int) -> None:
        self.classes, self.source = batches.classes, batches.source
        self.num_images, self.steps = batches.num_images, batches.steps
        self._batches, self._bank, self._batch_size = batches, bank, batch_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """See ``Batches.epoch``."""
        logits: Tensor | None = None
        start = first_step * self._batch_size
        for images, targets, *_ in self._batches.epoch(epoch % self._bank.epochs, first_step):
            if logits is None:
                logits = read_epoch(self._bank.folder, epoch % self._bank.epochs)[0].to(images.device)
                if len(logits) != self.num_images:
                    raise UserError(f"{self._bank.folder} holds {len(logits)} logits an epoch, not {self.num_images}.")
            yield images, targets, logits[start : start + len(targets)]
            start += len(targets)


def to_float16(logits: Tensor, name: str) -> Tensor:
    """Logits as the bank keeps them; those that are not finite in float16 are refused."""
    kept = logits.to(torch.float16)
    if not bool(kept.isfinite().all()):
        raise UserError(
            f"The teacher {name} gives a logit of {logits.abs().max().item():.6g}, which float16 does not hold (65504 "
            "at most): choose another teacher, or learn from it without a bank."
        )
    return kept
