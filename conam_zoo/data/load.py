"""Opening a data set of any kind for fine-tuning: its splits, classes, image size and statistics."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conam_zoo.data.choosing import fits
from conam_zoo.data.dataset import ImageSplit
from conam_zoo.data.download import read_download
from conam_zoo.data.readers.arrays import has_arrays, npy_sources, npz_sources
from conam_zoo.data.readers.folders import folder_sources
from conam_zoo.data.readers.timm_sets import NAME_PREFIXES, named_sources
from conam_zoo.data.sources import (
    LazyImages,
    Unreadable,
    find_unreadable,
    median_side,
    read_source,
    source_of_split,
)
from conam_zoo.data.transforms import SPLITTING, random_stream
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError

__all__ = ["ImageData", "find_sources", "open_images", "pixel_statistics", "stratified_split"]

SMALL_SIDE = 48  # up to this median side, 32 px are taken: CIFAR's size, at which the weights were trained
SIZES = (32, 64)
NAMED_IN_MESSAGES = 3


@dataclass(frozen=True)
class ImageData:
    """A data set, ready for fine-tuning.

    Attributes:
        train: Training images; a source instead of a split where they are too many for the memory.
        val: Validation images; None if there are none and none were to be split off.
        test: Test images; None if there are none.
        classes: Class names in label order.
        counts: Training images of each class, in label order.
        image_size: Side that all images were resized to, in pixels.
        median_side: Median of the shorter side before, in pixels.
        source: Where it was read.
        unreadable: Images that were left out because they cannot be read.
        notes: What a person should know, one sentence part each.
    """

    train: ImageSplit | LazyImages
    val: ImageSplit | None
    test: ImageSplit | None
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    image_size: int
    median_side: float
    source: str
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()


def find_sources(data: str | Path, *, training: bool = True) -> dict[str, LazyImages]:
    """The splits of a data set of any kind, before anything of it is read: ``train``, perhaps ``val`` and ``test``.

    Args:
        data: An image folder, with splits or with class folders directly; a folder with ``.npy`` arrays; an ``.npz``
            file; a name that timm knows (``hfds/…``, ``torch/…``, ``wds/…``, ``tfds/…``); or ``cifar10``/``cifar100``.
        training: Whether a folder or file has to have training images.

    Raises:
        UserError: If it is none of these.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return npy_sources(path, training=training) if has_arrays(path) else folder_sources(path, training=training)
    if path.is_file():
        if path.suffix == ".npz":
            return npz_sources(path, training=training)
        raise UserError(f"{path} is a file, but not an .npz one: pass a folder of images, or arrays.")
    if str(data) in DATASETS:
        return {split: source_of_split(read_download(str(data), split)) for split in ("train", "test")}
    if str(data).startswith(NAME_PREFIXES):
        return named_sources(str(data))
    raise UserError(
        f"There is no data set {data}: pass a folder of images, arrays, or a name that begins with "
        f"{', '.join(NAME_PREFIXES)}."
    )


def open_images(
    data: str | Path,
    *,
    image_size: int | None = None,
    val_share: float = 0.1,
    seed: int = 0,
    corrupt: str = "stop",
    free: int | None = None,
) -> ImageData:
    """Read a data set of any kind, resized once to one size; every image is decoded before a training begins.

    Args:
        data: See ``find_sources``.
        image_size: Side of the square that images are resized to (short side resized, middle kept); None for 32 px
            where the median side is at most 48 px, else 64 px.
        val_share: Share of every class that is split off for validation where there is no such split; at least one
            image of each class that has two. 0 for none.
        seed: Of that choice.
        corrupt: ``"stop"`` or ``"skip"``: what is done if images cannot be read.
        free: Free bytes of memory; None to ask the system. Training images that need more than half of it are not
            kept but read again in every epoch.

    Raises:
        UserError: If the set cannot be read, has fewer than two classes, or holds unreadable images with ``"stop"``.
    """
    if corrupt not in ("stop", "skip"):
        raise UserError(f"The choice for corrupt files is {corrupt!r}, but it must be 'stop' or 'skip'.")
    if image_size is not None and (image_size < 8 or image_size % 8):
        raise UserError(f"The image size is {image_size}, but it must be a multiple of 8, such as 32, 64 or 96.")
    if not 0 <= val_share < 1:
        raise UserError(f"The share for validation is {val_share}, but it must lie in [0, 1).")
    sources = find_sources(data)
    train = sources["train"]
    if len(train.classes) < 2:
        raise UserError(f"{data} has only the class {', '.join(train.classes)}: a classifier needs two or more.")
    side = median_side(train)
    size = image_size if image_size is not None else SIZES[side > SMALL_SIDE]
    notes = [note for source in sources.values() for note in source.notes]
    unreadable: list[Unreadable] = []
    splits: dict[str, ImageSplit] = {}
    kept: ImageSplit | LazyImages = train
    for name, source in sources.items():
        if name == "train" and not fits(len(source), size, "cpu", free=free):
            kept, broken = find_unreadable(source)
        else:
            splits[name], broken = read_source(source, size)
        unreadable += [replace(image, name=f"{source.source}: {image.name}") for image in broken]
        if name in splits and not len(splits[name]) and name != "train":
            del splits[name]
            notes.append(f"the {name} split holds no readable image, so it counts as absent")
    if unreadable and corrupt == "stop":
        raise UserError(_sentence(unreadable))
    kept = splits.get("train", kept)
    val = splits.get("val")
    if val is None and val_share > 0:
        kept, val = _split_off(kept, val_share, seed, size, notes)
    labels = kept.labels.numpy() if isinstance(kept.labels, Tensor) else kept.labels
    counts = np.bincount(labels, minlength=len(train.classes))
    if missing := [name for name, count in zip(train.classes, counts, strict=True) if count == 0]:
        raise UserError(
            f"{data} has no readable training image of the class {missing[0]}: add some or remove the class."
        )
    return ImageData(
        train=kept,
        val=val,
        test=splits.get("test"),
        classes=train.classes,
        counts=tuple(counts.tolist()),
        image_size=size,
        median_side=side,
        source=str(data),
        unreadable=tuple(unreadable),
        notes=tuple(notes),
    )


def _sentence(unreadable: list[Unreadable]) -> str:
    shown = "; ".join(image.reason.rstrip(".") for image in unreadable[:NAMED_IN_MESSAGES])
    more = len(unreadable) - NAMED_IN_MESSAGES
    return (
        f"{len(unreadable)} image{'s' * (len(unreadable) > 1)} cannot be read: {shown}"
        + (f"; and {more} more" if more > 0 else "")
        + ". Repair or remove them, or leave them out with --corrupt skip."
    )


def _split_off(
    train: ImageSplit | LazyImages, share: float, seed: int, size: int, notes: list[str]
) -> tuple[ImageSplit | LazyImages, ImageSplit]:
    labels = train.labels.numpy() if isinstance(train.labels, Tensor) else train.labels
    kept, held = stratified_split(labels, share, seed)
    counts = np.bincount(labels, minlength=len(train.classes))
    if single := [name for name, count in zip(train.classes, counts, strict=True) if count == 1]:
        notes.append(f"not in the validation split, because they have a single image: {', '.join(single[:5])}")
    if not len(held):
        raise UserError(f"{train.source} has a single image of each class: add images.")
    if isinstance(train, ImageSplit):
        val = train.select(torch.from_numpy(held))
        return train.select(torch.from_numpy(kept)), replace(val, source=f"{train.source}, split off for validation")
    val, _ = read_source(train.select(held), size)
    return train.select(kept), replace(val, source=f"{train.source}, split off for validation")


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split images class by class: the same share of each, at least one image, and never the only one.

    Args:
        labels: Label of each image, (N,).
        share: Share of every class that is held out.
        seed: Which images.

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
