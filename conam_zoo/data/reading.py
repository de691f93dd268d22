"""Reading one split of a data set: as it is, for images of one size, or resized to the size of a net."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from conam_zoo.data.dataset import ImageSplit
from conam_zoo.data.download import read_download
from conam_zoo.data.load import find_sources
from conam_zoo.data.sources import read_source
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError

__all__ = ["read_split"]


def read_split(
    data: str | Path, split: str, dataset: str | None = None, *, image_size: int | None = None
) -> ImageSplit:
    """Read one split; no image of another split is opened.

    Args:
        data: A folder with the arrays ``<split>_images.npy``, ``<split>_labels.npy`` and ``classes.txt``; or an
            image-folder tree ``<split>/<class>/*``; or a folder that holds one of these under the data set's name; or
            ``cifar10`` / ``cifar100``, which torchvision downloads to its own cache folder ``data/``.
        split: ``"train"`` or ``"test"``. A folder named ``val`` serves as the test split of an image-folder tree.
        dataset: Name of the data set, for the sub-folder rule.
        image_size: Resize every image to a square of this side, as fine-tuning does (short side resized, middle kept).
            Then everything that ``open_images`` reads can be read, and where there is no test split, the validation
            split serves, and where there is none either, all images.

    Raises:
        UserError: If nothing of that kind is there, or images and labels do not fit together.
    """
    if image_size is not None:
        return _read_resized(data, split, dataset, image_size)
    if str(data) in DATASETS and not Path(data).exists():
        return read_download(str(data), split)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"The data folder {root} does not exist: pass a folder of images or arrays, or cifar10/cifar100."
        )
    if dataset and (root / dataset).is_dir():
        root = root / dataset
    if (root / f"{split}_images.npy").is_file():
        return _read_arrays(root, split)
    folders = [split] if split == "train" else [split, "val"]
    for folder in folders:
        if (root / folder).is_dir():
            return _read_image_folder(root / folder)
    raise UserError(
        f"The data folder {root} has neither {split}_images.npy nor a folder {' or '.join(folders)}: "
        "point --data at the folder that holds them."
    )


def _read_resized(data: str | Path, split: str, dataset: str | None, image_size: int) -> ImageSplit:
    root = Path(data).expanduser()
    if dataset and (root / dataset).is_dir():
        root = root / dataset
    stored = root / f"{split}_images.npy"
    if stored.is_file() and (root / "classes.txt").is_file():
        images = np.load(stored, mmap_mode="r", allow_pickle=False)
        if images.shape[1:] == (image_size, image_size, 3):  # no detour over pictures
            return _read_arrays(root, split)
    sources = find_sources(root if root.is_dir() else data, training=False)
    wanted = ("train",) if split == "train" else ("test", "val", "train")
    source = next((sources[name] for name in wanted if name in sources), None)
    if source is None:
        raise UserError(f"{data} has no {split} images: it holds only {', '.join(sources)}.")
    if split != "train" and source is sources.get("train"):
        source = replace(source, source=f"{source.source} (all images, because there is no test split)")
    result, unreadable = read_source(source, image_size)
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(source)} images cannot be read. {unreadable[0].reason}")
    return result


def _read_arrays(root: Path, split: str) -> ImageSplit:
    images_path, labels_path, classes_path = (
        root / f"{split}_images.npy",
        root / f"{split}_labels.npy",
        root / "classes.txt",
    )
    for path in (labels_path, classes_path):
        if not path.is_file():
            raise UserError(f"{path} is missing: it belongs beside {images_path.name}.")
    images, labels = np.load(images_path, allow_pickle=False), np.load(labels_path, allow_pickle=False)
    classes = tuple(classes_path.read_text().split())
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"{images_path} holds {images.dtype} of shape {images.shape}, but it must hold uint8 of shape (N, H, W, 3)."
        )
    if labels.shape != images.shape[:1] or (len(labels) and int(labels.max()) >= len(classes)):
        raise UserError(
            f"{labels_path} does not fit: {len(images)} images and {len(classes)} classes need as many labels below it."
        )
    return ImageSplit(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), classes, str(root))


def _read_image_folder(folder: Path) -> ImageSplit:
    from torchvision.datasets import ImageFolder

    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"The data folder {folder} holds no class folders with images.") from error
    sizes: set[tuple[int, ...]] = set()
    arrays = []
    for path, _ in dataset.samples:
        try:
            array = np.asarray(dataset.loader(path))
        except OSError as error:
            raise UserError(f"The image {path} cannot be read: remove it or replace it.") from error
        sizes.add(array.shape)
        arrays.append(array)
        if len(sizes) > 1:
            raise UserError(
                f"The image {path} has shape {array.shape}, others in {folder} have not: resize them alike."
            )
    labels = torch.tensor(dataset.targets, dtype=torch.int64)
    return ImageSplit(torch.from_numpy(np.stack(arrays)), labels, tuple(dataset.classes), str(folder))
