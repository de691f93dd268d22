"""Splits of data sets: in memory as one uint8 tensor, or as images that are read one by one when they are wanted."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conam_zoo.data.images import NOTE, resize_image, to_rgb, to_uint8
from conam_zoo.data.transforms import SPLITTING, random_stream
from conam_zoo.errors import UserError

__all__ = [
    "ArrayReader",
    "ImageSplit",
    "LazyImages",
    "Unreadable",
    "data_sha256",
    "find_unreadable",
    "image_hashes",
    "median_side",
    "pixel_statistics",
    "read_source",
    "source_of_split",
    "stratified_split",
]

PEEKED = 200  # images that are looked at to learn the usual size


@dataclass(frozen=True)
class ImageSplit:
    """One split of a data set.

    Attributes:
        images: uint8, (N, H, W, 3).
        labels: int64, (N,).
        classes: Class names in label order.
        source: Where it was read, for messages.
        names: What each image is called where it was read (a path), or nothing if it has no name.
        notes: What a person should know about how it was read.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSplit":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def select(self, indices: Tensor) -> "ImageSplit":
        names = tuple(self.names[index] for index in indices.tolist()) if self.names else ()
        return replace(self, images=self.images[indices], labels=self.labels[indices], names=names)

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
        return replace(self, images=images)


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


class ArrayReader:
    """Reads images out of an array (M, H, W) or (M, H, W, C): what ``LazyImages.read`` is for arrays.

    An array that is mapped into memory is not copied to worker processes: they map its file again.

    Args:
        images: Values of 0..``top``; 1, 3 or 4 channels.
        top: Which value is white.
    """

    def __init__(self, images: np.ndarray, top: float = 255.0) -> None:
        self.images, self.top = images, top

    def __call__(self, index: int) -> Image.Image:
        pixels = np.ascontiguousarray(to_uint8(np.asarray(self.images[index]), self.top))
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return to_rgb(Image.fromarray(pixels))

    def as_they_are(self, members: np.ndarray, size: int) -> np.ndarray | None:
        """A copy of some images, uint8 (N, size, size, 3), if they are stored so; else None."""
        stored = self.images.dtype == np.uint8 and self.images.shape[1:] == (size, size, 3)
        return np.array(self.images[members]) if stored else None

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        if isinstance(self.images, np.memmap) and self.images.filename is not None:
            order = "C" if self.images.flags.c_contiguous else "F"
            facts = (self.images.dtype, "r", self.images.offset, self.images.shape, order)
            state["images"] = (self.images.filename, *facts)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], tuple):
            state["images"] = np.memmap(*state["images"])
        self.__dict__.update(state)


def source_of_split(split: ImageSplit) -> LazyImages:
    """A split in memory as a source."""
    return LazyImages(
        labels=split.labels.cpu().numpy(),
        classes=split.classes,
        source=split.source,
        names=split.names or [f"image {index}" for index in range(len(split))],
        read=ArrayReader(split.images.cpu().numpy()),
        members=np.arange(len(split)),
    )


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
    if isinstance(source.read, ArrayReader):
        stored = source.read.as_they_are(source.members, size)
        if stored is not None:
            return _split_of(source, torch.from_numpy(stored)), []
    dark: list[str] = []
    images = torch.empty(len(source), size, size, 3, dtype=torch.uint8)

    def fill(index: int) -> None:
        picture = source.picture(index)
        if NOTE in picture.info:
            dark.append(picture.info[NOTE])
        images[index] = torch.from_numpy(np.array(resize_image(picture, size)))

    broken = _each(source, fill)
    split = _split_of(source, images)
    if dark:
        more = f"; and {len(dark) - 1} more" if len(dark) > 1 else ""
        split = replace(split, notes=(*split.notes, min(dark) + more))
    if broken:
        split = split.select(torch.from_numpy(_others(source, broken)))
    return split, broken


def _split_of(source: LazyImages, images: Tensor) -> ImageSplit:
    labels = torch.from_numpy(source.labels)
    return ImageSplit(images, labels, source.classes, source.source, tuple(source.names), source.notes)


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


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split images with labels (N,) class by class: the same share of each, at least one image, and never the only one.

    Returns:
        Indices that are kept and indices that are held out, both sorted.
    """
    stream = random_stream(SPLITTING, seed)
    held = []
    for label in np.unique(labels):
        members = stream.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held.append(members[: min(len(members) - 1, max(1, round(share * len(members))))])
    chosen = np.sort(np.concatenate(held)) if held else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1], over all pixels of uint8 images (N, H, W, 3)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(-1):
        shares = torch.bincount(channel.flatten().cpu(), minlength=256).double()
        shares /= shares.sum()
        mean = (shares * values).sum()
        means.append(float(mean))
        deviations.append(float((shares * (values - mean) ** 2).sum().sqrt()))
    return tuple(means), tuple(deviations)


def image_hashes(images: ImageSplit | LazyImages, size: int) -> np.ndarray:
    """64-bit hashes of the pixels of images of ``size`` x ``size``, uint64 (N,); a source is read once."""
    if isinstance(images, ImageSplit):
        pixels = iter(images.images.cpu().contiguous().numpy())
    else:
        pixels = (images.pixels(index, size).numpy() for index in range(len(images)))
    digests = b"".join(blake2b(each.tobytes(), digest_size=8).digest() for each in pixels)
    return np.frombuffer(digests, dtype="<u8")


def data_sha256(hashes: np.ndarray, labels: np.ndarray) -> str:
    """A hash of a whole split, in its order, with its labels (N,)."""
    return sha256(hashes.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
