"""Evaluation of a model on the test split of its data set, in float32 and without test-time augmentation."""

from pathlib import Path

import torch

from conam_zoo.data import ImageSplit, read_split
from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.training.engine import Scores, predict_logits, score

__all__ = ["evaluate", "evaluate_on"]


def evaluate(model: StagedClassifier, data: str | Path, dataset: str | None = None) -> tuple[Scores, ImageSplit]:
    """Scores of a model on the test split found in ``data``, normalised with the model's own statistics.

    Args:
        model: The net.
        data: Where the images are.
        dataset: Name of the data set where the model was trained on a published one, whose images are taken as they
            are; None: whatever fine-tuning reads is read, and resized to the model's input as fine-tuning does it.

    Raises:
        UserError: If the data cannot be read, or its classes are not those that the model was trained for.
    """
    split = read_split(data, "test", dataset, image_size=None if dataset else model.pretrained_cfg["input_size"][1])
    return evaluate_on(model, split), split


def evaluate_on(model: StagedClassifier, split: ImageSplit, *, sharded: bool = False) -> Scores:
    """Scores of a model on a split that is already read.

    Args:
        model: The net.
        split: The images, on any device.
        sharded: Share the work among the ranks of a training; all of them have to call this, with the same weights.

    Raises:
        UserError: If classes or size of the images are not those that the model was trained for.
    """
    cfg = model.pretrained_cfg
    names = cfg.get("label_names")
    if len(split.classes) != model.num_classes:
        raise UserError(
            f"{split.source} has {len(split.classes)} classes, but the model has {model.num_classes}: "
            "evaluate it on the data set that it was trained for."
        )
    if names and tuple(names) != split.classes:
        raise UserError(f"The classes of {split.source} are not those of the model, or in another order.")
    size = tuple(cfg["input_size"][1:])
    if tuple(split.images.shape[1:3]) != size:
        raise UserError(
            f"The images of {split.source} have {split.images.shape[1]} x {split.images.shape[2]} pixels, but the "
            f"model takes {size[0]} x {size[1]}: resize them."
        )
    model = model.to(memory_format=torch.channels_last)
    split = split.to(next(model.parameters()).device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 means float32 on a GPU too
        logits = predict_logits(model, split.images, cfg["mean"], cfg["std"], sharded=sharded)
    return score(logits, split.labels)
