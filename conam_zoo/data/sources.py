"""Where images come from, before they are read: their labels, their names, and a way to read each of them."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conam_zoo.data.dataset import ImageSplit
from conam_zoo.data.images import resize_image
from conam_zoo.errors import UserError

__all__ = ["LazyImages", "Unreadable", "find_unreadable", "median_side", "read_source", "source_of_split"]

PEEKED = 200  # images that are looked at to learn the usual size


@dataclass(frozen=True)
class LazyImages:
    """Images that are read one by one.

    Attributes:
        labels: int64, (N,).
        classes: Class names in label order.
        source: Where they are, for messages.
        names: What each image is called, (N,).
        read: From a number of ``members`` to an RGB picture; raises ``UserError`` if it cannot be read. It can be
            pickled, for worker processes.
        members: The numbers that belong to this source, in its order, (N,).
        notes: What a person should know about how it was found.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    source: str
    names: Sequence[str]
    read: Callable[[int], Image.Image]
    members: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> "LazyImages":
        """Some of the images, in the order of ``indices``."""
        names = [self.names[index] for index in indices]
        return replace(self, labels=self.labels[indices], names=names, members=self.members[indices])

    def picture(self, index: int) -> Image.Image:
        """The picture at a place of this source, in its own size."""
        return self.read(int(self.members[index]))

    def pixels(self, index: int, size: int) -> Tensor:
        """The picture at a place, resized: uint8 (size, size, 3)."""
        return torch.from_numpy(np.array(resize_image(self.picture(index), size)))


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read: its place in the source, its name, and the sentence that says why."""

    index: int
    name: str
    reason: str


def source_of_split(split: ImageSplit) -> LazyImages:
    """A split in memory as a source."""
    pixels = split.images.cpu().numpy()
    return LazyImages(
        labels=split.labels.cpu().numpy(),
        classes=split.classes,
        source=split.source,
        names=split.names or [f"image {index}" for index in range(len(split))],
        read=partial(_picture, pixels),
        members=np.arange(len(split)),
    )


def _picture(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def median_side(source: LazyImages) -> float:
    """Median of the shorter side in pixels, of up to 200 images spread evenly over the source."""
    sides = []
    for index in np.unique(np.linspace(0, len(source) - 1, PEEKED).astype(int)):
        try:
            sides.append(min(source.picture(index).size))
        except UserError:
            continue  # told later, with all the others
    if not sides:
        raise UserError(f"None of the images of {source.source} can be read: check the files.")
    return float(np.median(sides))


def read_source(source: LazyImages, size: int) -> tuple[ImageSplit, list[Unreadable]]:
    """Read all images at a size, on as many threads as there are cores; those that cannot be read are listed.

    The split holds the readable ones in the order of the source.
    """
    images = torch.empty(len(source), size, size, 3, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = source.pixels(index, size)

    broken = _each(source, fill)
    split = ImageSplit(images, torch.from_numpy(source.labels), source.classes, source.source, tuple(source.names))
    if broken:
        split = split.select(torch.from_numpy(_others(source, broken)))
    return split, broken


def find_unreadable(source: LazyImages) -> tuple[LazyImages, list[Unreadable]]:
    """Decode every image once, keeping none: the readable part of the source, and those that cannot be read."""
    broken = _each(source, source.picture)
    return (source.select(_others(source, broken)) if broken else source), broken


def _others(source: LazyImages, broken: list[Unreadable]) -> np.ndarray:
    return np.setdiff1d(np.arange(len(source)), [image.index for image in broken])


def _each(source: LazyImages, work: Callable[[int], object]) -> list[Unreadable]:
    def attempt(index: int) -> Unreadable | None:
        try:
            work(index)
        except UserError as error:
            return Unreadable(index, source.names[index], str(error))
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [failure for failure in pool.map(attempt, range(len(source))) if failure is not None]
