"""Opening a data set of any kind: all of its splits for fine-tuning, or one of them."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conam_zoo.data.dataset import (
    ArrayReader,
    ImageSplit,
    LazyImages,
    Unreadable,
    find_unreadable,
    median_side,
    read_source,
    source_of_split,
    stratified_split,
)
from conam_zoo.data.memory import fits
from conam_zoo.data.readers.arrays import has_arrays, npy_sources, npz_sources
from conam_zoo.data.readers.folders import folder_sources
from conam_zoo.data.readers.timm_sets import NAME_PREFIXES, named_sources
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.inputs import expand_path, status

__all__ = ["ImageData", "check_image_size", "find_sources", "open_images", "read_split"]

SMALL_SIDE = 48  # up to this median side, 32 px are taken: CIFAR's size, at which the weights were trained
SIZES = (32, 64)
LARGEST_SIDE = 1024  # pixels, of what a model folder may state
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


def find_sources(
    data: str | Path,
    *,
    training: bool = True,
    splits: tuple[str, ...] = ("train", "test"),
) -> dict[str, LazyImages]:
    """The splits of a data set of any kind, before anything of it is read: ``train``, perhaps ``val`` and ``test``.

    Args:
        data: An image folder, with splits or with class folders directly; a folder with ``.npy`` arrays; an ``.npz``
            file; a name that timm knows (``hfds/…``, ``torch/…``, ``wds/…``, ``tfds/…``); or ``cifar10``/``cifar100``.
        training: Whether there have to be training images.
        splits: Those of ``cifar10`` and ``cifar100`` that are wanted; of ``.npy`` arrays, whether only ``train`` is.

    Raises:
        UserError: If it is none of these.
    """
    path = expand_path(data)
    found = status(path) if not str(data).startswith(NAME_PREFIXES) or path.exists() else None
    if found is not None and path.is_dir():
        if has_arrays(path):
            return npy_sources(path, training=training, train_only=splits == ("train",))
        return folder_sources(path, training=training)
    if found is not None:
        if path.suffix.lower() == ".npz":
            return npz_sources(path, training=training)
        raise UserError(f"{path} is a file, but not an .npz one: pass a folder of images, or arrays.")
    if str(data) in DATASETS:
        return {split: source_of_split(_download(str(data), split)) for split in splits}
    if str(data).startswith(NAME_PREFIXES):
        return named_sources(str(data))
    raise UserError(
        f"There is no data set {data}: the folder or file does not exist; pass a folder of images, arrays, or a name "
        f"that begins with {', '.join(NAME_PREFIXES)}."
    )


def _download(name: str, split: str) -> ImageSplit:
    """A split of ``cifar10`` or ``cifar100`` from torchvision's cache folder ``data/``, downloaded if need be."""
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        dataset = cls("data", train=split == "train", download=True)
    except Exception as error:  # torchvision raises whatever urllib, tarfile or its own checks raise
        raise UserError(
            f"{name} could not be downloaded by torchvision ({error}): download it elsewhere and pass its folder."
        ) from error
    labels = torch.tensor(dataset.targets, dtype=torch.int64)
    return ImageSplit(torch.from_numpy(dataset.data), labels, DATASETS[name].classes, f"torchvision {name}")


def read_split(
    data: str | Path,
    split: str,
    dataset: str | None = None,
    *,
    image_size: int | None = None,
) -> ImageSplit:
    """Read one split; no image of another split is opened.

    Args:
        data: What ``find_sources`` takes, or a folder that holds it under the name ``dataset``.
        split: ``"train"`` or ``"test"``, in place of which ``val`` serves.
        dataset: Name of the data set, for the sub-folder rule.
        image_size: Resize every image to a square of this side, as fine-tuning does (short side resized, middle kept;
            images of that size stay as they are). Then all images serve where there are no splits. None: the images
            must be of one size, and stay as they are.

    Raises:
        UserError: If nothing of that kind is there, or images cannot be read.
    """
    root = expand_path(data)
    if dataset and status(root / dataset) is not None and (root / dataset).is_dir():
        data = root / dataset
    if image_size is None and status(root) is None and str(data) not in DATASETS and ":" not in str(data):
        raise UserError(
            f"The data folder {root} does not exist: pass a folder of images or arrays, or cifar10/cifar100."
        )
    sources = find_sources(data, training=False, splits=(split,))
    wanted = ("train",) if split == "train" else ("test", "val") if image_size is None else ("test", "val", "train")
    source = next((sources[name] for name in wanted if name in sources), None)
    if source is None:
        raise UserError(
            f"{data} has neither {split}_images.npy nor a folder {' or '.join(wanted)}, only {', '.join(sources)}: "
            "point --data at the folder that holds them."
        )
    if split != "train" and source is sources.get("train"):
        source = replace(source, source=f"{source.source} (all images, because there is no test split)")
    size = image_size
    if size is None:
        source, size = _of_one_size(source)
    result, unreadable = read_source(source, size)
    if unreadable:
        one = unreadable[0]
        raise UserError(
            f"{len(unreadable)} of {len(source)} images cannot be read as they are, such as {one.name}. {one.reason}"
        )
    if not len(result):
        raise UserError(f"{source.source} holds no readable image: check the files.")
    return result


def _of_one_size(source: LazyImages) -> tuple[LazyImages, int]:
    """A source that refuses images of another size than the first one that can be read, and that one's side."""
    if isinstance(source.read, ArrayReader):
        sizes = {source.read.images.shape[2:0:-1]}
    else:
        sizes = set()
        for index in range(len(source)):
            try:
                sizes.add(source.picture(index).size)
                break
            except UserError:
                continue  # told with all the others
    width, height = next(iter(sizes), (1, 1))

    def read(index: int) -> Image.Image:
        picture = source.read(index)
        if picture.size != (width, width):
            raise UserError(f"It has {picture.height} x {picture.width} pixels, but all need {width} x {width}.")
        return picture

    return (source if isinstance(source.read, ArrayReader) and width == height else replace(source, read=read)), width


def check_image_size(image_size: int | None) -> None:
    """Refuse a side that images cannot be resized to; None is the choice by their own size.

    Raises:
        UserError: If it is no multiple of 8 from 8 to 1024.
    """
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

    Raises:
        UserError: If the set cannot be read, has fewer than two classes, or holds unreadable images with ``"stop"``.
    """
    if corrupt not in ("stop", "skip"):
        raise UserError(f"The choice for corrupt files is {corrupt!r}, but it must be 'stop' or 'skip'.")
    check_image_size(image_size)
    if not 0 <= val_share < 1:
        raise UserError(f"The share for validation is {val_share}, but it must lie in [0, 1).")
    sources = sources or find_sources(data)
    train = sources["train"]
    if not len(train):
        raise UserError(f"{data} holds no training images: add some.")
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
        if name in splits:
            notes += [note for note in splits[name].notes if note not in notes]
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
