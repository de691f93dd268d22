"""Image folders: which splits there are, which classes, and which files."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from conam_zoo.data.dataset import LazyImages
from conam_zoo.data.images import PICTURE_SUFFIXES, read_image
from conam_zoo.errors import UserError

_SET = r"(?:[ _-]?(?:set|data|images|split))?$"
SPLIT_NAMES = {
    "train": re.compile("(?:train|training)" + _SET, re.IGNORECASE),
    "val": re.compile("(?:val|valid|validation|dev)" + _SET, re.IGNORECASE),
    "test": re.compile("(?:test|testing|eval|evaluation)" + _SET, re.IGNORECASE),
}
# What systems and unpackers put beside pictures; what begins with a dot is left out, too.
FOREIGN = frozenset(("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"))
# A folder with one of these is the run folder of a training, which writes pictures of its own.
RUN_FILES = (".conam-lock", "run.json", "checkpoint.safetensors")


def folder_sources(root: Path, *, training: bool) -> dict[str, LazyImages]:
    """The splits of an image-folder tree: ``train`` always, ``val`` and ``test`` where there are such folders.

    A class is a folder, and its images may lie at any depth below it; class names are sorted. ``root`` holds either
    the folders of the splits, or those of the classes, or a single folder that holds one of these. Left out are files
    that are not pictures by their suffix, hidden files and folders, and run folders. Every folder is visited
    once and every picture belongs to one class, wherever links lead. Without ``training`` a test split alone will do.
    """
    root = _unwrapped(root)
    folders, notes = _split_folders(root)
    if not folders:
        folders, training = {"train": root}, True
    elif "train" not in folders and training:
        name = next(iter(folders.values())).name
        raise UserError(f"{root} holds a folder {name} but none named train: name the training images' folder so.")
    walk = _Walk(folders.values())
    sources: dict[str, LazyImages] = {}
    inside = {split: walk.classes_in(folder) for split, folder in folders.items()}
    # Those of the training images, which other splits may lack, or without such those of all splits.
    decisive = ("train",) if "train" in folders and any(inside["train"][0].values()) else tuple(folders)
    classes = tuple(sorted({name for s in decisive for name, pictures in inside[s][0].items() if pictures}))
    for split, folder in folders.items():
        found, others = inside[split]
        if any(found.values()):
            sources[split] = _source(folder, found, others, classes)
        elif split == "train" and training:
            raise UserError(
                f"{folder} holds no class folders with images: put the images of each class into a folder named after "
                "it."
            )
        else:
            notes.append(f"{folder}: the split holds no images, so it counts as absent")
    if not sources:
        raise UserError(f"{folder} holds no class folders with images, and no other split does.")
    above = next(iter(folders.values())).parent
    notes += walk.notes(above)
    first = next(iter(sources))
    sources[first] = replace(sources[first], notes=(*notes, *sources[first].notes))
    return sources


def pictures_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures in a folder and below it, sorted, by the rules of ``folder_sources``; and what was left out."""
    pictures: list[Path] = []
    walk = _Walk([folder])
    walk._collect(folder, pictures, [])
    return sorted(pictures), walk.notes(folder)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check its rights.") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _reason_to_leave_out(entry: os.DirEntry[str]) -> str:
    """Why a folder is not part of the set; an empty string if it is."""
    if entry.name.startswith(".") or entry.name.lower() in FOREIGN:
        return "folders of the system"
    if any(os.path.lexists(os.path.join(entry.path, name)) for name in RUN_FILES):
        return "run folders"
    return ""


def _sub_folders(folder: Path) -> list[Path]:
    return [Path(e.path) for e in _entries(folder) if _is_folder(e) and not _reason_to_leave_out(e)]


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _has_pictures(folder: Path) -> bool:
    """Whether pictures lie in the folder itself."""
    return any(_is_picture(entry.name) and not _is_folder(entry) for entry in _entries(folder))


def _split_of(name: str) -> str | None:
    return next((split for split, pattern in SPLIT_NAMES.items() if pattern.match(name)), None)


def _unwrapped(root: Path) -> Path:
    """What an unpacked archive wraps its folder in is taken off."""
    seen = {root.resolve()}
    while True:
        inside = _sub_folders(root)
        if len(inside) != 1 or _has_pictures(root) or _split_of(inside[0].name):
            return root
        if not _sub_folders(inside[0]) or _has_pictures(inside[0]):  # a class
            return root
        root = inside[0]
        if root.resolve() in seen:
            return root
        seen.add(root.resolve())


def _split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of the splits, by split, if ``root`` holds such; and what a person should know."""
    folders = _sub_folders(root)
    named = [(split, folder) for folder in folders if (split := _split_of(folder.name)) is not None]
    named = named or _splits_with_a_prefix(folders)
    found = [(split, folder) for split, folder in named if _sub_folders(folder)]
    flat = [folder for _, folder in named if not _sub_folders(folder) and _has_pictures(folder)]
    named_folders = [folder for _, folder in named]
    others = [folder for folder in folders if folder not in named_folders]
    if named and not found and not others:
        raise _without_classes(root, named)
    # Beside folders with pictures, a lone folder named like a split is a class: the train among other vehicles.
    if not found:
        return {}, []
    if len(found) == 1 and any(map(_has_pictures, others)):
        return {}, [f"{root}: {found[0][1].name} counts as a class, because folders with images lie beside it"]
    splits: dict[str, Path] = {}
    for split, folder in found:
        if split in splits:
            raise UserError(f"{root} holds both {splits[split].name} and {folder.name}: keep one of them.")
        inner = _sub_folders(folder)
        # training_set/training_set/CLASS
        while len(inner) == 1 and (_split_of(inner[0].name) == split or inner[0].name == folder.name):
            folder, inner = inner[0], _sub_folders(inner[0])
        if inner or split == "train":
            splits[split] = folder
        else:
            flat.append(folder)
    if not splits:
        raise _without_classes(root, named)
    notes = [f"{root}: {folder.name} was left out, because it holds no class folders" for folder in flat]
    if others:
        names = ", ".join(folder.name for folder in others[:5]) + (", …" if len(others) > 5 else "")
        notes.append(f"{root}: left out beside the splits: {names}")
    order = [split for split in SPLIT_NAMES if split in splits]
    return {split: splits[split] for split in order}, notes


def _without_classes(root: Path, named: list[tuple[str, Path]]) -> UserError:
    names = " and ".join(folder.name for _, folder in named)
    return UserError(
        f"{root} holds {names}, which are names of splits, without class folders in them: put the images of each class "
        "into a folder named after it."
    )


def _splits_with_a_prefix(folders: list[Path]) -> list[tuple[str, Path]]:
    """Folders such as ``seg_train`` and ``seg_test``: the training images and others, with one name before both."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for folder in folders:
        for separator in re.finditer("[ _-]", folder.name):
            if split := _split_of(folder.name[separator.end() :]):
                found.setdefault(folder.name[: separator.start()].lower(), []).append((split, folder))
                break
    groups = [group for group in found.values() if {split for split, _ in group} > {"train"}]
    return groups[0] if len(groups) == 1 else []


class _Walk:
    """Goes through folders so that each is visited once, and each picture given once, by identity.

    Real folders come before links: where a link leads into another class, its pictures stay with that class.
    """

    def __init__(self, roots: Iterable[Path]) -> None:
        self.left_out: dict[str, list[str]] = {}
        self._seen = {_identity(f) for root in roots for f in (*root.resolve().parents, *self._real_folders(root))}

    def _real_folders(self, folder: Path) -> Iterator[Path]:
        yield folder
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False) and not _reason_to_leave_out(entry):
                yield from self._real_folders(Path(entry.path))

    def classes_in(self, folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
        """The pictures of each class folder of a split, by name; and the files that are none."""
        entries = _entries(folder)
        found: dict[str, list[Path]] = {}
        others: list[Path] = []
        # Links last: a class folder that is a link to another one adds nothing to it.
        for entry in sorted(entries, key=lambda entry: entry.is_symlink()):
            if _is_folder(entry) and self._is_entered(entry):
                self._collect(Path(entry.path), found.setdefault(_class_name(entry), []), others)
        _check_classes(folder, [e for e in entries if _is_folder(e) and _class_name(e) in found])
        others += [Path(e.path) for e in entries if not _is_folder(e) and not e.name.startswith(".")]
        return found, others

    def _collect(self, folder: Path, pictures: list[Path], others: list[Path]) -> None:
        """Add what lies below a folder."""
        for entry in _entries(folder):
            if _is_folder(entry):
                if self._is_entered(entry):
                    self._collect(Path(entry.path), pictures, others)
            elif _is_picture(entry.name):
                if self._is_first(entry, "further links to a picture"):
                    pictures.append(Path(entry.path))
            elif not entry.name.startswith("."):
                others.append(Path(entry.path))

    def _is_entered(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder is to be visited: a link only to where nothing was visited yet."""
        if reason := _reason_to_leave_out(entry):
            if not entry.name.startswith("."):
                self._note(reason, entry)
            return False
        return not entry.is_symlink() or self._is_first(entry, "links to folders of the set")

    def _is_first(self, entry: os.DirEntry[str], reason: str) -> bool:
        """Whether no other way led to this folder or picture before; else it is left out for ``reason``."""
        try:
            identity = _identity(entry)
        except OSError:
            return True  # a broken link is reported as an unreadable picture
        if identity in self._seen:
            self._note(reason, entry)
            return False
        self._seen.add(identity)
        return True

    def notes(self, above: Path) -> list[str]:
        """What was left out, and why; paths are relative to the folder ``above``."""
        return [
            f"{len(paths)} {reason} left out, such as {os.path.relpath(paths[0], above)}"
            for reason, paths in self.left_out.items()
        ]

    def _note(self, reason: str, entry: os.DirEntry[str]) -> None:
        self.left_out.setdefault(reason, []).append(entry.path)


def _identity(place: Path | os.DirEntry[str]) -> tuple[int, int]:
    facts = os.stat(place)  # on Windows an entry's own stat() has no identity
    return facts.st_dev, facts.st_ino


def _class_name(entry: os.DirEntry[str]) -> str:
    """The name of a class folder, with accents composed: systems differ in how they store them."""
    return unicodedata.normalize("NFC", entry.name)


def _check_classes(folder: Path, entries: list[os.DirEntry[str]]) -> None:
    """Refuse "classes" that hold the same sub-folders, and no pictures of their own: these are the classes."""
    used = [Path(entry.path) for entry in entries]
    if len(used) < 2 or any(map(_has_pictures, used)):
        return
    inner = [frozenset(path.name for path in _sub_folders(each)) for each in used]
    if len(inner[0]) > 1 and len(set(inner)) == 1:
        classes, groups = sorted(inner[0]), [each.name for each in used]
        raise UserError(
            f"{folder} holds {', '.join(groups[:3])}, and each of them holds {', '.join(classes[:3])}: if those "
            "are the classes, name the folders above them train, val and test, or point at one of them."
        )


def _source(folder: Path, found: dict[str, list[Path]], others: list[Path], classes: tuple[str, ...]) -> LazyImages:
    """The pictures of a split of a set with these classes."""
    names = tuple(sorted(name for name, pictures in found.items() if pictures))
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{folder} has the class {unknown[0]}, which the training images lack: rename or remove that folder."
        )
    paths = [path for name in names for path in sorted(found[name])]
    notes = [f"{folder}: {len(others)} other files left out, such as {others[0].name}"] if others else []
    notes += [f"{folder}: the class folder {name} holds no images" for name in sorted(found) if name not in names]
    return LazyImages(
        labels=np.repeat([classes.index(name) for name in names], [len(found[name]) for name in names]),
        classes=classes,
        source=str(folder),
        names=[str(path.relative_to(folder)) for path in paths],
        read=partial(_read, paths),
        members=np.arange(len(paths)),
        notes=tuple(notes),
    )


def _read(paths: list[Path], index: int) -> Image.Image:
    return read_image(paths[index])
