"""CIFAR through torchvision, which downloads it."""

import torch

from conam_zoo.data.dataset import ImageSplit
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError

__all__ = ["read_download"]


def read_download(name: str, split: str) -> ImageSplit:
    """A split of ``cifar10`` or ``cifar100`` from torchvision's cache folder ``data/``, downloaded if need be.

    Raises:
        UserError: If the download fails.
    """
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
