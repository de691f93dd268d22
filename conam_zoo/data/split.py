"""A split of a data set, held in memory as one uint8 tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageSplit"]


@dataclass(frozen=True)
class ImageSplit:
    """One split of a data set.

    Attributes:
        images: uint8, (N, H, W, 3).
        labels: int64, (N,).
        classes: Class names in label order.
        source: Where it was read, for messages.
        names: What each image is called where it was read (a path), or nothing if it has no name.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSplit":
        return ImageSplit(self.images.to(device), self.labels.to(device), self.classes, self.source, self.names)

    def select(self, indices: Tensor) -> "ImageSplit":
        names = tuple(self.names[index] for index in indices.tolist()) if self.names else ()
        return ImageSplit(self.images[indices], self.labels[indices], self.classes, self.source, names)
