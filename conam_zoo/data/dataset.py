"""A split of a data set, held in memory as one uint8 tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from conam_zoo.errors import UserError

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

    def spread(self, count: int) -> "ImageSplit":
        """At most ``count`` images, spread evenly over the split, so that one sorted by class gives all classes."""
        count = min(count, len(self))
        return self.select(torch.arange(count) * len(self) // max(count, 1))

    def averaged_down(self, side: int) -> "ImageSplit":
        """The same images with ``side`` x ``side`` pixels, each the rounded mean of a square of pixels.

        Raises:
            UserError: If the images are not square, or ``side`` does not divide theirs.
        """
        n, height, width, channels = self.images.shape
        if height != width or height % side:
            raise UserError(
                f"The setting image_size is {side}, but the images of {self.source} have {height} x {width} pixels: "
                "set it to a divisor of both."
            )
        factor = height // side
        squares = self.images.view(n, side, factor, side, factor, channels)
        sums = squares.sum(dim=(2, 4), dtype=torch.int32)
        images = (sums + factor**2 // 2).div(factor**2, rounding_mode="floor").to(torch.uint8)
        return ImageSplit(images, self.labels, self.classes, self.source, self.names)
