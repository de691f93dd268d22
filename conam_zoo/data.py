"""Image sets that fit in memory: reading them split by split, and augmenting whole batches of them.

A split is kept as one uint8 tensor of shape (N, H, W, 3) on the training device. Indexing it with a batch of crop
windows gives (B, H, W, 3), whose permutation to (B, 3, H, W) is already in the channels_last memory format.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError

__all__ = ["BatchAugmentation", "ImageSplit", "normalize", "read_split"]


@dataclass(frozen=True)
class ImageSplit:
    """One split of a data set.

    Attributes:
        images: uint8, (N, H, W, 3).
        labels: int64, (N,).
        classes: Class names in label order.
        source: Where it was read, for messages.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSplit":
        return ImageSplit(self.images.to(device), self.labels.to(device), self.classes, self.source)

    def select(self, indices: Tensor) -> "ImageSplit":
        return ImageSplit(self.images[indices], self.labels[indices], self.classes, self.source)


def read_split(data: str | Path, split: str, dataset: str | None = None) -> ImageSplit:
    """Read one split; nothing of another split is opened.

    Args:
        data: A folder with the arrays ``<split>_images.npy``, ``<split>_labels.npy`` and ``classes.txt``; or an
            image-folder tree ``<split>/<class>/*``; or a folder that holds one of these under the data set's name; or
            ``cifar10`` / ``cifar100``, which torchvision downloads to its own cache folder ``data/``.
        split: ``"train"`` or ``"test"``. A folder named ``val`` serves as the test split of an image-folder tree.
        dataset: Name of the data set, for the sub-folder rule.

    Raises:
        UserError: If nothing of that kind is there, or images and labels do not fit together.
    """
    if str(data) in DATASETS and not Path(data).exists():
        return _read_torchvision(str(data), split)
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


def _read_torchvision(name: str, split: str) -> ImageSplit:
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


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last, channel-wise normalised."""
    offset = torch.tensor(mean, device=images.device) * 255
    scale = 1 / (torch.tensor(std, device=images.device) * 255)
    return ((images.float() - offset) * scale).permute(0, 3, 1, 2)


class BatchAugmentation:
    """Random crop from a reflection-padded image and horizontal flip, per image, in one gather for the whole batch.

    Args:
        images: uint8, (N, H, W, 3).
        padding: Pixels added on each side before cropping back to (H, W); 0 for no crop.
        flip: Whether to flip half of the images.
    """

    def __init__(self, images: Tensor, padding: int, flip: bool) -> None:
        self.height, self.width = images.shape[1:3]
        self.padding = padding
        self.flip = flip
        rows = _reflected(self.height, padding, images.device)
        columns = _reflected(self.width, padding, images.device)
        self.padded = images[:, rows][:, :, columns]

    def __call__(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented images (B, H, W, 3), uint8, for the indices (B,)."""
        count, device = len(indices), self.padded.device

        def draw(high: int) -> Tensor:
            return torch.randint(high, (count, 1), generator=generator).to(device)

        rows = draw(2 * self.padding + 1) + torch.arange(self.height, device=device)
        columns = torch.arange(self.width, device=device).expand(count, -1)
        if self.flip:
            columns = torch.where(draw(2) == 1, self.width - 1 - columns, columns)
        columns = columns + draw(2 * self.padding + 1)
        return self.padded[indices.to(device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Source positions along one side of an image that is reflection-padded: (size + 2 * padding,)."""
    positions = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)
