"""Data sets by name: CIFAR through torchvision, and what ``timm.data.create_dataset`` knows."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image

from conam_zoo.data.dataset import ImageSplit, LazyImages, free_bytes
from conam_zoo.data.images import decode_image, read_image, reason_of, to_rgb, upright
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError

NAME_PREFIXES = ("hfds/", "torch/", "wds/", "tfds/", "hfids/")  # of the sets that timm opens
TORCHVISION_FOLDER = "data"  # for its downloads


def download(name: str, split: str) -> ImageSplit:
    """A split of ``cifar10`` or ``cifar100`` from torchvision's cache folder ``data/``, downloaded if need be."""
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        with _download_lock(TORCHVISION_FOLDER):
            dataset = cls(TORCHVISION_FOLDER, train=split == "train", download=True)
    except Exception as error:  # torchvision raises whatever urllib, tarfile or its own checks raise
        raise UserError(
            f"{name} could not be downloaded by torchvision ({error}): download it elsewhere and pass its folder."
        ) from error
    labels = torch.tensor(dataset.targets, dtype=torch.int64)
    return ImageSplit(torch.from_numpy(dataset.data), labels, DATASETS[name].classes, f"torchvision {name}")


@contextmanager
def _download_lock(folder: str) -> Iterator[None]:
    """Let no other training write into a folder of downloads; one without rights to write is read only."""
    os.makedirs(folder, exist_ok=True)
    with FileLock(Path(folder, ".conam-download.lock")) if os.access(folder, os.W_OK) else nullcontext():
        yield


def timm_sources(name: str) -> dict[str, LazyImages]:
    """The splits of a data set that ``timm.data.create_dataset`` knows by name.

    ``hfds/`` and ``torch/`` sets are read image by image when they are wanted. Streams cannot be: they are read once,
    as a whole, into memory. Where the files of a ``wds/`` or ``tfds/`` set lie is part of the name, after an ``@``:
    ``wds/pets@/data/pets``.
    """
    sources, notes = {"train": _open_timm(name, "train")}, []
    wanted = {"val": ("validation", "val"), "test": ("test",)}
    if name.startswith("torch/"):  # what torchvision has beside the training images, timm calls validation
        wanted = {"test": ("validation",)}
    for split, others in wanted.items():
        for other in others:
            source = None
            try:
                source = _open_timm(name, other)
            except _NotOpenedError as error:
                if split == "test":
                    reason = error.reason.rstrip(".")
                    notes.append(f"there is no test split of {name}, or it could not be opened: {reason}")
            if source is not None and len(source):
                sources[split] = source
                break
        if split in sources and sources[split].labels.min() < 0:
            del sources[split]
            notes.append(f"the {split} split of {name} is left out: its labels are kept secret")
    train = sources["train"]
    for split, source in sources.items():
        for label in (source.labels.min(initial=0), source.labels.max(initial=0)):
            if not 0 <= label < len(train.classes):
                raise UserError(
                    f"{source.source} has the label {label}, but the training images have {len(train.classes)} "
                    "classes, numbered from 0: mend the labels."
                )
        if source.classes == tuple(map(str, range(len(source.classes)))):  # numbers, where names are not stated
            sources[split] = replace(source, classes=train.classes)
    sources["train"] = replace(train, notes=(*train.notes, *notes))
    return sources


class _NotOpenedError(UserError):
    """timm cannot open a split, which may not exist."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"timm cannot open the data set {name} ({reason}): check its name, the network, and that the library "
            "behind the prefix is installed."
        )
        self.reason = reason


def _open_timm(full_name: str, split: str) -> LazyImages:
    from timm.data import create_dataset

    name, _, root = full_name.partition("@")
    torchvision = name.startswith("torch/")
    folder = root or (TORCHVISION_FOLDER if torchvision else None)
    # timm would convert the pictures of these before to_rgb sees them.
    own: dict[str, Any] = {"input_img_mode": ""} if name.startswith(("wds/", "hfids/")) else {}
    try:
        with _download_lock(str(folder)) if torchvision else nullcontext():
            dataset = create_dataset(name, root=folder, split=split, download=torchvision, is_training=False, **own)
        read = _stream if hasattr(dataset, "set_epoch") else _map
        return read(dataset, f"{full_name}, {split}")
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the set's library raises: no network, no such split, no package
        raise _NotOpenedError(full_name, reason_of(error)) from error


def _map(dataset: Any, source: str) -> LazyImages:
    """A set with random access."""
    if hasattr(dataset, "targets"):  # torchvision
        # One of files has a loader, which leaves out EXIF and transparency.
        images = dataset.imgs if hasattr(dataset, "loader") else dataset
        return _timm_source(dataset.targets, dataset.classes, source, partial(_picture_at, images, source))
    reader = dataset.reader  # not the data set itself, which replaces a damaged image by the next one
    return _timm_source(reader.iter_targets(), _class_names(reader), source, partial(_picture_at, reader, source))


def _picture_at(images: Any, source: str, index: int) -> Image.Image:
    name = f"{source} {index}"
    try:
        image = images[index][0]
    except Exception as error:  # whatever the library of the set raises
        raise UserError(f"The image {name} cannot be read ({reason_of(error)}): repair or remove it.") from error
    if isinstance(image, str):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(upright(image), f"The image {name}")
    return decode_image(image, name)


def _stream(dataset: Any, source: str) -> LazyImages:
    """A set that is read from its beginning to its end, once."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(f"The stream {source} would reach each process in part: start one process.")
    budget, used = free_bytes("cpu") // 2, 0
    pictures: list[Image.Image] = []
    labels: list[int] = []
    for picture, label, *_ in dataset:
        pictures.append(to_rgb(upright(picture), f"The image {source} {len(labels)}"))
        labels.append(label)
        used += 3 * picture.width * picture.height
        if used > budget:
            raise UserError(
                f"The stream {source} does not fit into {budget / 1e9:.1f} GB, half of the free memory: use its hfds/ "
                "form or an image folder, which are read from the disk."
            )
    stated = getattr(getattr(dataset.reader, "split_info", None), "num_samples", len(labels)) or len(labels)
    result = _timm_source(labels, _class_names(dataset.reader), source, pictures.__getitem__)
    if stated > len(labels):  # timm leaves out what it cannot read
        note = f"{source}: {stated - len(labels):,} of {stated:,} images left out as unreadable"
        result = replace(result, notes=(note,))
    return result


def _class_names(reader: Any) -> list[str]:
    """Class names by label, where the set states them."""
    indices = getattr(reader, "class_to_idx", None) or {}
    return sorted(indices, key=indices.__getitem__)


def _timm_source(labels: Any, classes: list[str], source: str, read: Callable[[int], Image.Image]) -> LazyImages:
    numbers = np.array([int(label) for label in labels], dtype=np.int64)
    names = tuple(map(str, classes or range(int(numbers.max(initial=-1)) + 1)))
    images = [f"{source} {index}" for index in range(len(numbers))]
    return LazyImages(numbers, names, source, images, read, np.arange(len(numbers)))
