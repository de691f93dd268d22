"""Data sets that timm opens by name: ``hfds/…``, ``torch/…``, and the streams ``wds/…``, ``tfds/…``, ``hfids/…``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from conam_zoo.data.dataset import LazyImages
from conam_zoo.data.images import decode_image, to_rgb
from conam_zoo.data.memory import free_bytes
from conam_zoo.errors import UserError

__all__ = ["NAME_PREFIXES", "named_sources"]

NAME_PREFIXES = ("hfds/", "torch/", "wds/", "tfds/", "hfids/")
SPLIT_NAMES = {"val": ("validation", "val"), "test": ("test",)}
TORCH_FOLDER = "data"  # torchvision keeps its downloads there


def named_sources(name: str) -> dict[str, LazyImages]:
    """The splits of a data set that ``timm.data.create_dataset`` knows by name.

    ``hfds/`` and ``torch/`` sets are read image by image when they are wanted. Streams cannot be: they are read once,
    as a whole, into memory. Where the files of a ``wds/`` or ``tfds/`` set lie is part of the name, after an ``@``:
    ``wds/pets@/data/pets``.

    Raises:
        UserError: If timm cannot open the set, or a stream does not fit into memory.
    """
    train = _open(name, "train", required=True)
    sources = {"train": train}
    for split, names in SPLIT_NAMES.items():
        if name.startswith("torch/") and split == "val":
            continue  # what torchvision holds beside the training images, timm calls validation and people test
        wanted = ("validation",) if name.startswith("torch/") else names
        for other in wanted:
            source = _open(name, other, required=False)
            if source is None or not len(source):
                continue
            if source.labels.min() < 0:
                note = f"the {split} split of {name} is left out: its labels are kept secret"
                sources["train"] = replace(sources["train"], notes=(*sources["train"].notes, note))
                continue
            sources[split] = source
            break
    return sources


def _open(full_name: str, split: str, *, required: bool) -> Any:
    from timm.data import create_dataset

    name, _, root = full_name.partition("@")
    torch_set = name.startswith("torch/")
    try:
        dataset = create_dataset(
            name, root=root or (TORCH_FOLDER if torch_set else None), split=split, download=torch_set, is_training=False
        )
        read = _stream if hasattr(dataset, "set_epoch") else _map
        return read(dataset, f"{full_name}, {split}")
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the set's library raises: no network, no such split, no package
        if not required:
            return None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"timm cannot open the data set {full_name} ({reason}): check its name, the network, and that the library "
            "behind the prefix is installed."
        ) from error


def _map(dataset: Any, source: str) -> LazyImages:
    """A set with random access."""
    if hasattr(dataset, "targets"):  # torchvision
        labels, classes, read = dataset.targets, tuple(dataset.classes), partial(_torchvision_picture, dataset)
    else:  # not the data set itself, which replaces a damaged image by the next one
        reader = dataset.reader
        labels, classes, read = list(reader.iter_targets()), _classes(reader), partial(_reader_picture, reader, source)
    return _source(np.array([int(label) for label in labels], dtype=np.int64), classes, source, read)


def _torchvision_picture(dataset: Any, index: int) -> Image.Image:
    return to_rgb(dataset[index][0])


def _reader_picture(reader: Any, source: str, index: int) -> Image.Image:
    return decode_image(reader[index][0], f"{source} {index}")


def _stream(dataset: Any, source: str) -> LazyImages:
    """A set that is read from its beginning to its end, once."""
    budget, used = free_bytes("cpu") // 2, 0
    pictures: list[Image.Image] = []
    labels: list[int] = []
    for picture, label, *_ in dataset:
        pictures.append(to_rgb(picture))
        labels.append(int(label))
        used += 3 * picture.width * picture.height
        if used > budget:
            raise UserError(
                f"The stream {source} does not fit into {budget / 1e9:.1f} GB, half of the free memory: use its hfds/ "
                "form or an image folder, which are read from the disk."
            )
    return _source(np.array(labels, dtype=np.int64), _classes(dataset.reader), source, pictures.__getitem__)


def _classes(reader: Any) -> tuple[str, ...]:
    """Class names by label, where the set states them."""
    indices = getattr(reader, "class_to_idx", None) or {}
    return tuple(str(name) for name, _ in sorted(indices.items(), key=lambda item: item[1]))


def _source(
    labels: np.ndarray, classes: tuple[str, ...], source: str, read: Callable[[int], Image.Image]
) -> LazyImages:
    if not classes:
        classes = tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))
    names = [f"{source} {index}" for index in range(len(labels))]
    return LazyImages(labels, classes, source, names, read, np.arange(len(labels)))
