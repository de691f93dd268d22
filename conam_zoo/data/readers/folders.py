"""Image folders: which splits there are, which classes, and which files."""

import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from conam_zoo.data.images import PICTURE_SUFFIXES, read_image
from conam_zoo.data.sources import LazyImages
from conam_zoo.errors import UserError

__all__ = ["SPLIT_FOLDERS", "folder_sources"]

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def folder_sources(root: Path, *, training: bool = True) -> dict[str, LazyImages]:
    """The splits of an image-folder tree: ``train`` always, ``val`` and ``test`` where there are such folders.

    A class is a folder, and its images may lie at any depth below it; class names are sorted. ``root`` holds either
    the folders of the splits, or those of the classes, or a single folder that holds one of these. Files that are no
    pictures by their names' ending are left out, and so is what begins with a dot.

    Args:
        root: The folder.
        training: Whether there have to be training images: without, a tree that has only a test split will do.

    Raises:
        UserError: If there are no class folders with images, or a split has a class that ``train`` has not.
    """
    root = _descend(root)
    folders = {split: _split_folder(root, names) for split, names in SPLIT_FOLDERS.items()}
    if folders["train"] is None:
        others = {split: folder for split, folder in folders.items() if folder is not None}
        if others and training:
            name = next(iter(others.values())).name
            raise UserError(f"{root} holds a folder {name} but none named train: name the training images' folder so.")
        return {split: _scan(folder, None) for split, folder in others.items()} or {"train": _scan(root, None)}
    train = _scan(folders["train"], None)
    rest = {
        split: _scan(folder, train.classes)
        for split, folder in folders.items()
        if folder is not None and split != "train"
    }
    return {"train": train, **rest}


def _descend(root: Path) -> Path:
    """What an unpacked archive wraps its folder in is taken off."""
    split_names = {name for names in SPLIT_FOLDERS.values() for name in names}
    while True:
        inside = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name.lower() in split_names:
            return root
        if not any(entry.is_dir() for entry in inside[0].iterdir()):
            return root
        root = inside[0]


def _split_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a split: one of that name which holds folders; one that holds images is a class of that name."""
    for entry in sorted(root.iterdir()):
        if entry.name.lower() in names and entry.is_dir() and any(below.is_dir() for below in entry.iterdir()):
            return entry
    return None


def _scan(folder: Path, known: tuple[str, ...] | None) -> LazyImages:
    found = {entry.name: _pictures(entry) for entry in sorted(folder.iterdir()) if _is_class(entry)}
    names = tuple(name for name, (pictures, _) in found.items() if pictures)
    if not names:
        raise UserError(
            f"{folder} holds no class folders with images: put the images of each class into a folder named after it."
        )
    classes = known or names
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{folder} has the class {unknown[0]}, which the training images have not: rename or remove that folder."
        )
    paths, labels = [], []
    for name in names:
        paths += found[name][0]
        labels += [classes.index(name)] * len(found[name][0])
    left_out = [path for _, others in found.values() for path in others]
    left_out += [entry for entry in sorted(folder.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
    notes = [f"{folder}: {len(left_out)} other files left out, such as {left_out[0].name}"] if left_out else []
    notes += [f"{folder}: the class folder {name} holds no images" for name in found if name not in names]
    return LazyImages(
        labels=np.array(labels, dtype=np.int64),
        classes=classes,
        source=str(folder),
        names=[str(path.relative_to(folder)) for path in paths],
        read=partial(_read, paths),
        members=np.arange(len(paths)),
        notes=tuple(notes),
    )


def _read(paths: list[Path], index: int) -> Image.Image:
    return read_image(paths[index])


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pictures and other files below a folder, each sorted by path."""
    files = sorted(
        Path(place) / name
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    )
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    return pictures, [path for path in files if path.suffix.lower() not in PICTURE_SUFFIXES]
