"""Arrays as image sets: ``.npy`` files in a folder, or one ``.npz`` file."""

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from conam_zoo.data.images import to_rgb
from conam_zoo.data.sources import LazyImages
from conam_zoo.errors import UserError

__all__ = ["array_source", "has_arrays", "npy_sources", "npz_sources"]

SPLITS = ("train", "val", "test")


def has_arrays(root: Path) -> bool:
    """Whether a folder holds ``<split>_images.npy`` for some split."""
    return any((root / f"{split}_images.npy").is_file() for split in SPLITS)


def npy_sources(root: Path, *, training: bool = True) -> dict[str, LazyImages]:
    """The splits in a folder with ``<split>_images.npy``, ``<split>_labels.npy`` and perhaps ``classes.txt``.

    ``training`` says whether there have to be training images.

    Raises:
        UserError: If a file is missing or its content does not fit; see ``npz_sources`` for what fits.
    """
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        if (root / f"{split}_images.npy").is_file():
            for kind in ("images", "labels"):
                arrays[f"{split}_{kind}"] = _load(root / f"{split}_{kind}.npy")
    classes_path = root / "classes.txt"
    classes = tuple(classes_path.read_text(encoding="utf-8").split()) if classes_path.is_file() else None
    return _sources(arrays, classes, str(root), training)


def npz_sources(path: Path, *, training: bool = True) -> dict[str, LazyImages]:
    """The splits in an ``.npz`` file.

    Its arrays are ``images`` and ``labels``, or ``{train,val,test}_images`` and ``{train,val,test}_labels`` (as in
    MedMNIST), or ``x_train``, ``y_train``, ``x_test``, ``y_test`` (as Keras has it); and ``classes``, if the names are
    known. Images are (N, H, W), grey, or (N, H, W, C) with C of 1, 3 or 4: uint8, uint16 over its whole range, or
    floating-point in [0, 1]. Labels are whole numbers from 0, or names. ``training`` says whether there have to be
    training images.

    Raises:
        UserError: If the file cannot be read or its content does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz file ({error}): write it again with numpy.savez.") from error
    classes = tuple(str(name) for name in arrays.pop("classes")) if "classes" in arrays else None
    for split in SPLITS:
        for short, kind in (("x", "images"), ("y", "labels")):
            if f"{short}_{split}" in arrays:
                arrays[f"{split}_{kind}"] = arrays.pop(f"{short}_{split}")
    for kind in ("images", "labels"):
        if kind in arrays:
            arrays[f"train_{kind}"] = arrays.pop(kind)
    return _sources(arrays, classes, str(path), training)


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing: images and labels belong beside each other.")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an .npy file ({error}): write it again with numpy.save.") from error
    return array


def _sources(
    arrays: Mapping[str, np.ndarray], classes: tuple[str, ...] | None, source: str, training: bool
) -> dict[str, LazyImages]:
    if not any(f"{split}_images" in arrays for split in SPLITS[: 1 if training else None]):
        raise UserError(f"{source} holds no training images: name its arrays train_images and train_labels.")
    for split in SPLITS:
        if (f"{split}_images" in arrays) != (f"{split}_labels" in arrays):
            raise UserError(f"{source} has only one of {split}_images and {split}_labels: it needs both.")
    splits = [split for split in SPLITS if f"{split}_images" in arrays]
    labels = {split: _flat(arrays[f"{split}_labels"], f"{split}_labels of {source}") for split in splits}
    if classes is None:
        classes = _class_names(labels.get("train", next(iter(labels.values()))))
    return {split: array_source(arrays[f"{split}_images"], labels[split], classes, source, split) for split in splits}


def _flat(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels as (N,): (N, 1) counts as the same."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise UserError(
            f"{what} is {labels.dtype} of shape {labels.shape}, but it must hold one number or name for each image."
        )
    return np.asarray(labels)


def _class_names(labels: np.ndarray) -> tuple[str, ...]:
    if labels.dtype.kind == "U":
        return tuple(str(name) for name in np.unique(labels))
    return tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))


def array_source(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str, split: str = "train"
) -> LazyImages:
    """Arrays in memory, or mapped into it, as a source.

    Args:
        images: What ``npz_sources`` describes.
        labels: Whole numbers or names, (N,).
        classes: Class names in label order.
        source: What to call the set in messages.
        split: What to call this part of it.

    Raises:
        UserError: If they do not fit together.
    """
    what = f"{split}_images of {source}"
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if not fits or 0 in images.shape[1:] or not (images.dtype in (np.uint8, np.uint16) or images.dtype.kind == "f"):
        raise UserError(
            f"{what} is {images.dtype} of shape {images.shape}, but it must hold uint8, uint16 or floats in [0, 1], "
            "of shape (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels."
        )
    if len(images) != len(labels):
        raise UserError(f"{what} holds {len(images)} images, but there are {len(labels)} labels: they must be as many.")
    if labels.dtype.kind == "U":
        if unknown := sorted(set(labels.tolist()) - set(classes)):
            raise UserError(f"{split}_labels of {source} has the class {unknown[0]}, which is not among the classes.")
        labels = np.array([classes.index(str(name)) for name in labels])
    elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise UserError(
            f"{split}_labels of {source} runs from {labels.min()} to {labels.max()}, but there are {len(classes)} "
            "classes: number them from 0."
        )
    if images.dtype.kind == "f" and images.size and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"{what} runs from {images.min():g} to {images.max():g}, but floats must lie in [0, 1]: scale them."
        )
    return LazyImages(
        labels=labels.astype(np.int64),
        classes=classes,
        source=source,
        names=[f"{split} image {index}" for index in range(len(images))],
        read=partial(_picture, images),
        members=np.arange(len(images)),
    )


def _picture(images: np.ndarray, index: int) -> Image.Image:
    """One image of an array as RGB."""
    pixels = images[index]
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257)
    elif pixels.dtype.kind == "f":
        pixels = np.round(np.asarray(pixels, dtype=np.float64) * 255)
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return to_rgb(Image.fromarray(pixels))
