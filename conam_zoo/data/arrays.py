"""Arrays as image sets: ``.npy`` files in a folder, or one ``.npz`` file."""

import unicodedata
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from conam_zoo.data.dataset import ArrayReader, LazyImages, free_bytes
from conam_zoo.data.images import check_size, full_scale, reason_of, value_range
from conam_zoo.errors import UserError
from conam_zoo.files import check_file, status

SPLITS = ("train", "val", "test")
_NAMES = {"images": "train_images", "labels": "train_labels", "classes": "classes"}  # by a name in an .npz file
for _short, _kind in (("x", "images"), ("y", "labels")):
    for _split in SPLITS:
        _NAMES[f"{_short}_{_split}"] = _NAMES[f"{_split}_{_kind}"] = f"{_split}_{_kind}"
LARGEST_TEXT = 1 << 22  # letters of a classes.txt
MOST_CLASSES = 100_000  # without names: a label beyond is refused


def has_arrays(root: Path) -> bool:
    """Whether a folder holds ``<split>_images.npy`` for some split."""
    return any(status(root / f"{split}_images.npy") is not None for split in SPLITS)


def npy_sources(root: Path, *, training: bool, train_only: bool) -> dict[str, LazyImages]:
    """The splits in a folder with ``<split>_images.npy``, ``<split>_labels.npy`` and perhaps ``classes.txt``.

    With ``train_only`` no file of another split is opened, if there are training images. Else as ``npz_sources``.
    """
    there = [split for split in SPLITS if status(root / f"{split}_images.npy") is not None]
    if train_only and "train" in there:
        there = ["train"]
    arrays = {
        f"{split}_{kind}": _load(root / f"{split}_{kind}.npy") for split in there for kind in ("images", "labels")
    }
    names = root / "classes.txt"
    return _sources(arrays, _read_classes(names) if status(names) is not None else None, str(root), training)


def npz_sources(path: Path, *, training: bool) -> dict[str, LazyImages]:
    """The splits in an ``.npz`` file.

    Its arrays are ``images`` and ``labels``, or ``{train,val,test}_images`` and ``{train,val,test}_labels`` (as in
    MedMNIST), or ``x_train``, ``y_train``, ``x_test``, ``y_test`` (as Keras has it); and ``classes``, if the names are
    known. Images are (N, H, W), grey, or (N, H, W, C) with C of 1, 3 or 4; their values are taken as
    ``conam_zoo.data.images.full_scale`` says, all splits alike. Labels are whole numbers from 0 of any type, or names,
    (N,) or (N, 1).
    """
    check_file(path, ".npz file")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {_array_name(info): info for info in archive.infolist()}
            members.pop("", None)
            need, free = sum(info.file_size for info in members.values()), free_bytes("cpu")
            if need > free:
                raise UserError(
                    f"{path} unpacks to {need / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB of memory are free: save its "
                    "arrays as .npy files in a folder, which are not read as a whole."
                )
            for name, info in members.items():
                with archive.open(info) as file:
                    _check_header(file, info.file_size, f"{info.filename} of {path}")
                with archive.open(info) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise whatever they ran into; RuntimeError: it is encrypted
        raise UserError(
            f"{path} cannot be read as an .npz file ({reason_of(error)}): write it again with numpy.savez."
        ) from error
    classes = None
    if "classes" in arrays:
        classes = _checked_names(_texts(np.atleast_1d(arrays["classes"]).ravel()), f"classes of {path}")
    return _sources(arrays, classes, str(path), training)


def npz_splits(path: Path) -> set[str]:
    """The splits whose images an ``.npz`` file has, by the names in it; none if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {_array_name(info) for info in archive.infolist()}
    except (OSError, zipfile.BadZipFile):
        return set()
    return {split for split in SPLITS if f"{split}_images" in found}


def _array_name(info: zipfile.ZipInfo) -> str:
    """What an array in an ``.npz`` file is called here; an empty string for one that is not used."""
    return _NAMES.get(info.filename.removesuffix(".npy"), "")


def array_source(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str) -> LazyImages:
    """Arrays in memory as training images; see ``npz_sources`` for what fits. ``source`` is what messages call them."""
    return _sources({"train_images": images, "train_labels": labels}, classes, source, True)["train"]


def _check_header(file: IO[bytes], size: int, what: str) -> None:
    """Refuse an array that claims more than there is, before memory is asked for."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise UserError(f"{what} holds Python objects, which are not opened: save numbers or texts.")
    claimed = int(np.prod([int(length) for length in shape], dtype=object)) * dtype.itemsize
    if claimed > size:
        raise UserError(f"{what} is damaged: it claims {claimed:,} bytes and holds {size:,}. Write it again.")


def _load(path: Path) -> np.ndarray:
    if status(path) is None:
        raise UserError(f"{path} is missing: images and labels belong beside each other.")
    check_file(path, ".npy file")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
    except Exception as error:  # a damaged header raises whatever numpy's parser ran into
        raise UserError(
            f"{path} cannot be read as an .npy file ({reason_of(error)}): write it again with numpy.save."
        ) from error
    return array


def _read_classes(path: Path) -> tuple[str, ...]:
    """One name a line, in label order."""
    check_file(path, "text file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 ({error}): save it so, one class name a line.") from error
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{path} has more than {LARGEST_TEXT:,} letters: write one class name a line.")
    return _checked_names([_plain(line) for line in text.rstrip().split("\n")], str(path))


def _plain(name: str) -> str:
    """A class name with its accents composed, without spaces round it."""
    return unicodedata.normalize("NFC", name.strip())


def _texts(values: np.ndarray) -> list[str]:
    """Names (N,), also those stored as bytes in UTF-8."""
    try:
        return [_plain(value.decode() if isinstance(value, bytes) else str(value)) for value in values.tolist()]
    except UnicodeDecodeError as error:
        raise UserError(f"The class name {error.object!r} is not UTF-8: save the names as texts.") from error


def _checked_names(names: list[str], what: str) -> tuple[str, ...]:
    """Class names, each of which stands for one class."""
    if "" in names:
        raise UserError(f"{what} has no name for class {names.index('')}: write one name a line, without empty lines.")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{what} names {twice[0]} twice, but each class needs a name of its own: rename one.")
    return tuple(names)


def _sources(
    arrays: Mapping[str, np.ndarray], classes: tuple[str, ...] | None, source: str, training: bool
) -> dict[str, LazyImages]:
    """The splits among arrays called ``<split>_images`` and ``<split>_labels``."""
    for split in SPLITS:
        if (f"{split}_images" in arrays) != (f"{split}_labels" in arrays):
            raise UserError(f"{source} has only one of {split}_images and {split}_labels: it needs both.")
    splits = [split for split in SPLITS if f"{split}_images" in arrays]
    if not splits or (training and "train" not in splits):
        raise UserError(f"{source} holds no training images: name its arrays train_images and train_labels.")
    images = {split: arrays[f"{split}_images"] for split in splits}
    labels = {split: _flat(arrays[f"{split}_labels"], f"{split}_labels of {source}") for split in splits}
    if classes is None:
        known = [labels["train"]] if "train" in splits else list(labels.values())
        classes = _class_names(np.concatenate(known), source)
    limits = _limits(images, source)
    sources = {}
    for split in splits:
        what = f"{split}_images of {source}"
        count, dtype = len(images[split]), images[split].dtype
        numbers = _numbers(labels[split], count, classes, f"{split}_labels of {source}")
        top, note = full_scale(dtype, limits.get(dtype), what) if count else (255.0, "")
        sources[split] = LazyImages(
            labels=numbers,
            classes=classes,
            source=source,
            names=[f"{split} image {index}" for index in range(count)],
            read=ArrayReader(images[split], top),
            members=np.arange(count),
            notes=(note,) if note else (),
        )
    return sources


def _flat(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels as int64 or text, (N,): (N, 1) counts as the same, and so do whole numbers of any type."""
    if labels.ndim > 1 and labels.size == len(labels):
        labels = labels.reshape(len(labels))
    labels = np.asarray(labels)
    if labels.ndim == 1 and labels.dtype.kind in "US":
        return np.array(_texts(labels), dtype=np.str_)
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all()))
    if labels.ndim != 1 or not whole or not np.isfinite(labels).all():
        raise UserError(
            f"{what} is {labels.dtype} of shape {labels.shape}, but it must hold one number or name for each image, "
            "the number whole."
        )
    if len(labels) and (float(labels.min()) < 0 or float(labels.max()) >= MOST_CLASSES):
        raise UserError(f"{what} runs from {labels.min()} to {labels.max()}: number them from 0.")
    return labels.astype(np.int64)


def _class_names(labels: np.ndarray, source: str) -> tuple[str, ...]:
    if labels.dtype.kind == "U":
        return _checked_names(np.unique(labels).tolist(), f"labels of {source}")
    return tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1))


def _limits(images: Mapping[str, np.ndarray], source: str) -> dict[np.dtype, tuple[float, float]]:
    """The range of the values of each type over all splits, so that white is the same in each."""
    found: dict[np.dtype, tuple[float, float]] = {}
    for split, array in images.items():
        _check_images(array, f"{split}_images of {source}")
        if array.dtype not in (np.uint8, np.bool_) and (limits := value_range(array)) is not None:
            low, high = found.get(array.dtype, limits)
            found[array.dtype] = (min(low, limits[0]), max(high, limits[1]))
    return found


def _check_images(images: np.ndarray, what: str) -> None:
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if not fits or 0 in images.shape[1:] or images.dtype.kind not in "uifb":
        raise UserError(
            f"{what} is {images.dtype} of shape {images.shape}, but it must hold uint8, other whole numbers or floats, "
            "of shape (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels."
        )
    check_size(images.shape[2], images.shape[1], what)


def _numbers(labels: np.ndarray, images: int, classes: tuple[str, ...], what: str) -> np.ndarray:
    """Labels as places among the classes, int64 (N,)."""
    if images != len(labels):
        raise UserError(
            f"{what} does not fit: there are {len(labels)} labels and {images} images, but they must be as many."
        )
    if labels.dtype.kind == "U":
        places = {name: place for place, name in enumerate(classes)}
        if unknown := sorted(set(labels.tolist()) - set(places)):
            raise UserError(f"{what} has the class {unknown[0]}, which is not among the classes.")
        return np.array([places[name] for name in labels.tolist()], dtype=np.int64)
    if len(labels) and int(labels.max()) >= len(classes):
        raise UserError(
            f"{what} does not fit: it runs from {labels.min()} to {labels.max()}, but there are {len(classes)} "
            "classes: number them from 0."
        )
    return labels
