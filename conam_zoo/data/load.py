"""Opening a data set of any kind: all of its splits for fine-tuning, or one of them."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conam_zoo.checks import LARGEST_SIDE
from conam_zoo.data.arrays import has_arrays, npy_sources, npz_sources, npz_splits
from conam_zoo.data.dataset import (
    ArrayReader,
    ImageSplit,
    LazyImages,
    Unreadable,
    find_unreadable,
    fits,
    free_bytes,
    local_processes,
    median_side,
    read_source,
    source_of_split,
    stratified_split,
)
from conam_zoo.data.folders import folder_sources
from conam_zoo.data.named import NAME_PREFIXES, download, timm_sources
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.files import expand_path, status

SMALL_SIDE = 48  # up to this median side, 32 px are taken: CIFAR's size, at which the weights were trained
SIZES = (32, 64)
NAMED_IN_MESSAGES = 3


@dataclass(frozen=True)
class ImageData:
    """A data set, ready for fine-tuning."""

    train: ImageSplit | LazyImages  # a source instead of a split where the images are too many for the memory
    val: ImageSplit | None  # None if there are none and none were to be split off
    test: ImageSplit | None  # None if there are none
    classes: tuple[str, ...]  # in label order
    counts: tuple[int, ...]  # training images of each class, in label order
    image_size: int  # side that all images were resized to, in pixels
    median_side: float  # of the shorter side before, in pixels
    source: str  # where it was read
    unreadable: tuple[Unreadable, ...] = ()  # images that were left out because they cannot be read
    notes: tuple[str, ...] = ()  # what a person should know, one sentence part each


def find_sources(
    data: str | Path, *, training: bool = True, splits: tuple[str, ...] = ("train", "test")
) -> dict[str, LazyImages]:
    """The splits of a data set of any kind, before anything of it is read: ``train``, perhaps ``val`` and ``test``.

    Args:
        data: An image folder, with splits or with class folders directly; a folder with ``.npy`` arrays; an ``.npz``
            file; a name that timm knows (``hfds/…``, ``torch/…``, ``wds/…``, ``tfds/…``); or ``cifar10``/``cifar100``.
        training: Whether there have to be training images.
        splits: Those of ``cifar10`` and ``cifar100`` that are wanted; of ``.npy`` arrays, whether only ``train`` is.
    """
    kind, _, folder = str(data).partition("@")
    if kind in ("torch/image_folder", "torch/folder") and folder:
        data = folder  # of which timm would take the whole for any split that it does not find
    path, named = expand_path(data), str(data).startswith(NAME_PREFIXES)
    found = status(path) if not named or path.exists() else None
    if found is not None and path.is_dir():
        if has_arrays(path):
            return npy_sources(path, training=training, train_only=splits == ("train",))
        return folder_sources(path, training=training)
    if found is not None:
        if path.suffix.lower() == ".npz":
            return npz_sources(path, training=training)
        raise UserError(f"{path} is a file, but not an .npz one: pass a folder of images, or arrays.")
    if str(data) in DATASETS:
        return {split: source_of_split(download(str(data), split)) for split in splits}
    if named:
        return timm_sources(str(data))
    raise UserError(
        f"There is no data set {data}: the folder or file does not exist; pass a folder of images, arrays, or a name "
        f"that begins with {', '.join(NAME_PREFIXES)}."
    )


def read_split(
    data: str | Path, split: str, dataset: str | None = None, *, image_size: int | None = None
) -> ImageSplit:
    """Read one split; no image of another split is opened.

    Args:
        data: What ``find_sources`` takes, or a folder that holds it under the name ``dataset``.
        split: ``"train"`` or ``"test"``, in place of which ``val`` serves.
        dataset: Name of the data set.
        image_size: Resize every image to a square of this side, as fine-tuning does (short side resized, middle kept;
            images of that size stay as they are). Then all images serve where there are no splits. None: the images
            must be of one size, and stay as they are.
    """
    root, data = expand_path(data), _place(data, dataset)
    if image_size is None and status(root) is None and str(data) not in DATASETS and ":" not in str(data):
        raise UserError(
            f"The data folder {root} does not exist: pass a folder of images or arrays, or cifar10/cifar100."
        )
    sources = find_sources(data, training=False, splits=(split,))
    wanted = ("train",) if split == "train" else ("test", "val") if image_size is None else ("test", "val", "train")
    found = next((name for name in wanted if name in sources), None)
    if found is None:
        raise UserError(
            f"{data} has neither {split}_images.npy nor a folder {' or '.join(wanted)}, only {', '.join(sources)}: "
            "point --data at the folder that holds them."
        )
    source, size = sources[found], image_size
    if found == "train" != split:
        source = replace(source, source=f"{source.source} (all images, because there is no test split)")
    if size is None:
        source, size = of_one_size(source)
    result, unreadable = read_source(source, size)
    if unreadable:
        one = unreadable[0]
        raise UserError(
            f"{len(unreadable)} of {len(source)} images cannot be read as they are, such as {one.name}. {one.reason}"
        )
    if not len(result):
        raise UserError(f"{source.source} holds no readable image: check the files.")
    return result


def check_split(data: str | Path, split: str, dataset: str | None = None) -> None:
    """Refuse data without a split that ``read_split`` is to read later; the split itself is not opened."""
    place = expand_path(_place(data, dataset))
    wanted = ("train",) if split == "train" else ("test", "val")
    if place.suffix.lower() == ".npz" and place.is_file():
        found = not npz_splits(place).isdisjoint(wanted)
    elif not place.is_dir():
        return
    elif has_arrays(place):
        found = any((place / f"{name}_images.npy").exists() for name in wanted)
    else:
        found = not folder_sources(place, training=False).keys().isdisjoint(wanted)
    if not found:
        raise UserError(
            f"{place} has neither {split}_images nor a folder {' or '.join(wanted)}: add that, or keep training "
            "images out with --set holdout=5000."
        )


def _place(data: str | Path, dataset: str | None) -> str | Path:
    """A data set, or the folder of that name in a folder of several."""
    root = expand_path(data)
    return root / dataset if dataset and status(root / dataset) is not None and (root / dataset).is_dir() else data


def of_one_size(source: LazyImages) -> tuple[LazyImages, int]:
    """A source that refuses images of another width or height than the first readable one's width, and that width."""
    if isinstance(source.read, ArrayReader) and source.read.images.shape[1] == source.read.images.shape[2]:
        return source, source.read.images.shape[1]
    width = 1
    for index in range(len(source)):
        with suppress(UserError):  # reported with all the others
            width = source.picture(index).width
            break

    def read(index: int) -> Image.Image:
        picture = source.read(index)
        if picture.size != (width, width):
            raise UserError(f"It has {picture.height} x {picture.width} pixels, but all need {width} x {width}.")
        return picture

    return replace(source, read=read), width


def check_image_size(image_size: int | None) -> None:
    """Refuse a side that images cannot be resized to; None is the choice by their own size."""
    if image_size is not None and (not 8 <= image_size <= LARGEST_SIDE or image_size % 8):
        raise UserError(
            f"The image size is {image_size}, but it must be a multiple of 8 up to {LARGEST_SIDE}, such as 32 or 64."
        )


def open_images(
    data: str | Path,
    *,
    image_size: int | None = None,
    val_share: float = 0.1,
    seed: int = 0,
    corrupt: str = "stop",
    free: int | None = None,
    sources: dict[str, LazyImages] | None = None,
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
        sources: What ``find_sources`` gave for ``data``, where that is known.
    """
    if corrupt not in ("stop", "skip"):
        raise UserError(f"The choice for corrupt files is {corrupt!r}, but it must be 'stop' or 'skip'.")
    check_image_size(image_size)
    if not 0 <= val_share < 1:
        raise UserError(f"The share for validation is {val_share}, but it must lie in [0, 1).")
    sources = sources or find_sources(data)
    train: ImageSplit | LazyImages = sources["train"]
    if not len(train):
        raise UserError(f"{data} holds no training images: add some.")
    if len(train.classes) < 2:
        raise UserError(f"{data} has only the class {', '.join(train.classes)}: a classifier needs two or more.")
    side = median_side(sources["train"])
    size = image_size if image_size is not None else SIZES[side > SMALL_SIDE]
    notes = [note for source in sources.values() for note in source.notes]
    unreadable: list[Unreadable] = []
    others: dict[str, ImageSplit] = {}
    free = free_bytes("cpu") if free is None else free
    for name, source in sources.items():
        if name == "train" and not fits(len(source), size, free, local_processes()):
            train, broken = find_unreadable(source)
            notes += [note for note in train.notes if note not in notes]
        else:
            split, broken = read_source(source, size)
            notes += [note for note in split.notes if note not in notes]
            if name == "train":
                train = split
            elif len(split):
                others[name] = split
            else:
                notes.append(f"the {name} split holds no readable image, so it counts as absent")
        unreadable += [replace(image, name=f"{source.source}: {image.name}") for image in broken]
    if unreadable and corrupt == "stop":
        raise UserError(_sentence(unreadable))
    val = others.get("val")
    if val is None and val_share > 0:
        train, val = _split_off(train, val_share, seed, size, notes)
    counts = np.bincount(np.asarray(train.labels), minlength=len(train.classes)).tolist()
    if 0 in counts:
        missing = train.classes[counts.index(0)]
        raise UserError(f"{data} has no readable training image of the class {missing}: add some or remove the class.")
    return ImageData(
        train=train,
        val=val,
        test=others.get("test"),
        classes=train.classes,
        counts=tuple(counts),
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
    """The training images that are kept, and those split off for validation."""
    labels = np.asarray(train.labels)
    kept, held = stratified_split(labels, share, seed)
    counts = np.bincount(labels, minlength=len(train.classes))
    if single := [name for name, count in zip(train.classes, counts, strict=True) if count == 1]:
        notes.append(f"not in the validation split, because they have a single image: {', '.join(single[:5])}")
    if not len(held):
        raise UserError(f"{train.source} has a single image of each class: add images.")
    source = f"{train.source}, split off for validation"
    if isinstance(train, ImageSplit):
        return train.select(torch.from_numpy(kept)), replace(train.select(torch.from_numpy(held)), source=source)
    return train.select(kept), replace(read_source(train.select(held), size)[0], source=source)
