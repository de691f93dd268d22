"""Splits of data sets: in memory as one uint8 tensor, or as images that are read one by one when they are wanted."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conam_zoo.data.images import NOTE, resize_image, to_rgb, to_uint8
from conam_zoo.data.transforms import SPLITTING, random_stream
from conam_zoo.errors import UserError

BLOCK = 4096  # images whose reading is planned at a time
PEEKED = 200  # images that are looked at to learn the usual size
SHARE_OF_MEMORY = 0.5  # of what is free: the rest is for the training
UNKNOWN = 4 * 2**30  # bytes that are taken for free where the system does not tell


@dataclass(frozen=True)
class ImageSplit:
    """One split of a data set, in memory."""

    images: Tensor  # uint8, (N, H, W, 3)
    labels: Tensor  # int64, (N,)
    classes: tuple[str, ...]  # in label order
    source: str  # where it was read, for messages
    names: tuple[str, ...] = ()  # of the images, where they were read; none if they have no names
    notes: tuple[str, ...] = ()  # what a person should know about how it was read

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
        """The same images with ``side`` x ``side`` pixels, each the rounded mean of a square of pixels."""
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
    """Images that are read one by one, if need be in worker processes: ``read`` can be pickled."""

    labels: np.ndarray  # int64, (N,)
    classes: tuple[str, ...]  # in label order
    source: str  # where they are, for messages
    names: Sequence[str]  # of the images, (N,)
    read: Callable[[int], Image.Image]  # a number of ``members`` to an RGB picture; ``UserError`` if it is damaged
    members: np.ndarray  # the numbers that belong to this source, in its order, (N,)
    notes: tuple[str, ...] = ()  # what a person should know about how it was found

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> "LazyImages":
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
    """Reads images out of an array (M, H, W) or (M, H, W, C), whose values run from 0 to ``top``.

    An array that is mapped into memory is not copied to worker processes: they map its file again.
    """

    def __init__(self, images: np.ndarray, top: float = 255.0) -> None:
        self.images, self.top = images, top

    def __call__(self, index: int) -> Image.Image:
        pixels = np.ascontiguousarray(to_uint8(np.asarray(self.images[index]), self.top))
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return to_rgb(Image.fromarray(pixels))

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


def free_bytes(device: torch.device | str) -> int:
    """Free memory of a device, in bytes; on the CPU without swapping, within the limit of a container."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    free = [int(available[0]) * 1024 if available else UNKNOWN]
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0] != "max":
        # Used memory holds pages of files that were read, which the system gives back.
        pages = [line.split()[1] for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file ")]
        free.append(max(0, int(limit[0]) - int(used[0]) + sum(map(int, pages))))
    return min(free)


def local_processes() -> int:
    """How many processes ``torchrun`` started on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def fits(count: int, size: int, free: int, processes: int = 1) -> bool:
    """Whether uint8 images of ``size`` x ``size`` take at most half of ``free`` bytes, in so many processes at once."""
    return processes * 3 * count * size * size <= SHARE_OF_MEMORY * free


def median_side(source: LazyImages) -> float:
    """Median of the shorter side in pixels, of up to 200 images spread evenly over the source."""
    sides = []
    for index in np.unique(np.linspace(0, len(source) - 1, PEEKED).astype(int)):
        with suppress(UserError):  # reported later, with all the others
            sides.append(min(source.picture(index).size))
    if not sides:
        raise UserError(f"None of the images of {source.source} can be read: check the files.")
    return float(np.median(sides))


def read_source(source: LazyImages, size: int) -> tuple[ImageSplit, list[Unreadable]]:
    """Read all images at a size, on as many threads as there are cores; those that cannot be read are listed.

    The split holds the readable ones in the order of the source. One that the free memory does not hold is refused.
    """
    if (needed := 3 * len(source) * size * size) > (free := free_bytes("cpu")) != UNKNOWN:
        raise UserError(
            f"{source.source} needs {needed / 1e9:.1f} GB for its {len(source):,} images of {size} x {size} pixels, "
            f"but {free / 1e9:.1f} GB of memory are free: use fewer or smaller images."
        )
    labels, names, notes = torch.from_numpy(source.labels), tuple(source.names), source.notes
    stored = source.read.images if isinstance(source.read, ArrayReader) else np.empty(0)
    if stored.dtype == np.uint8 and stored.shape[1:] == (size, size, 3):
        images = torch.from_numpy(stored[source.members])
        return ImageSplit(images, labels, source.classes, source.source, names, notes), []
    images = torch.empty(len(source), size, size, 3, dtype=torch.uint8)

    def fill(index: int, picture: Image.Image) -> None:
        images[index] = torch.from_numpy(np.array(resize_image(picture, size)))

    readable, broken, dark = _read_all(source, fill)
    split = ImageSplit(images, labels, source.classes, source.source, names, (*notes, *dark))
    return (split.select(torch.from_numpy(readable)) if broken else split), broken


def find_unreadable(source: LazyImages) -> tuple[LazyImages, list[Unreadable]]:
    """Decode every image once, keeping none: the readable part of the source, and those that cannot be read."""
    readable, broken, dark = _read_all(source, lambda index, picture: None)
    source = source.select(readable)
    return replace(source, notes=(*source.notes, *dark)), broken


def _read_all(
    source: LazyImages, use: Callable[[int, Image.Image], None]
) -> tuple[np.ndarray, list[Unreadable], list[str]]:
    """Read and use every picture: the places where it can be read, where it cannot, and a note on the dark ones."""
    dark: list[str] = []

    def attempt(index: int) -> Unreadable | None:
        try:
            picture = source.picture(index)
            use(index, picture)
        except UserError as error:
            return Unreadable(index, source.names[index], str(error))
        if NOTE in picture.info:
            dark.append(picture.info[NOTE])
        return None

    broken: list[Unreadable] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), BLOCK):  # what waits for a thread takes 2 kB for each picture
            block = range(start, min(start + BLOCK, len(source)))
            broken += [failure for failure in pool.map(attempt, block) if failure is not None]
    readable = np.setdiff1d(np.arange(len(source)), [image.index for image in broken])
    return readable, broken, [min(dark) + (f"; and {len(dark) - 1} more" if len(dark) > 1 else "")] if dark else []


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same share of each class of labels (N,), at least one image, and never the only one.

    The indices that are kept and those that are held out are both sorted.
    """
    stream = random_stream(SPLITTING, seed)
    held = [np.array([], dtype=np.int64)]
    for label in np.unique(labels):
        members = stream.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held.append(members[: min(len(members) - 1, max(1, round(share * len(members))))])
    chosen = np.sort(np.concatenate(held))
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

    def digest(pixels: np.ndarray) -> bytes:
        return blake2b(pixels.tobytes(), digest_size=8).digest()

    if isinstance(images, ImageSplit):
        digests = list(map(digest, images.images.cpu().contiguous().numpy()))
    else:
        digests = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), BLOCK):
                block = range(start, min(start + BLOCK, len(images)))
                digests += pool.map(lambda index: digest(images.pixels(index, size).numpy()), block)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def data_sha256(hashes: np.ndarray, labels: np.ndarray) -> str:
    """A hash of a whole split, in its order, with its labels (N,)."""
    return sha256(hashes.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
