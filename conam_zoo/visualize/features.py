"""Pooled features of pictures, for search, clustering and classifiers of one's own."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from conam_zoo.data.images import read_image
from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.visualize.predict import split_transform

__all__ = ["pooled_features"]

BATCH = 64


@torch.inference_mode()
def pooled_features(
    model: StagedClassifier,
    paths: Iterable[Path],
    *,
    skip: Callable[[Path, UserError], object] | None = None,
) -> tuple[Tensor, list[Path]]:
    """What the classifier of a net sees of each picture, which is resized as for ``predict``.

    Args:
        model: A net in evaluation mode, made by timm.
        paths: Picture files.
        skip: Called for a picture that cannot be read, which is left out then.

    Returns:
        Features, float32 (N, num_features), and the files that they belong to.

    Raises:
        UserError: If a file cannot be read and there is no ``skip``.
    """
    resize, normalize = split_transform(model)
    device = next(model.parameters()).device
    kept: list[Path] = []

    def inputs() -> Iterator[Tensor]:
        for path in paths:
            try:
                picture = read_image(path)
            except UserError as error:
                if skip is None:
                    raise
                skip(path, error)
                continue
            kept.append(path)
            yield normalize(resize(picture))

    remaining, parts = inputs(), []
    while batch := list(islice(remaining, BATCH)):
        maps = model.forward_features(torch.stack(batch).to(device))
        parts.append(model.forward_head(maps, pre_logits=True).float().cpu())
    return torch.cat(parts) if parts else torch.empty(0, model.num_features), kept
