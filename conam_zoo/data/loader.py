"""Batches of images that do not fit on the training device: worker processes decode and resize them when needed."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conam_zoo.data.batches import AugmentedBatches, BatchSettings
from conam_zoo.data.sources import LazyImages
from conam_zoo.data.transforms import ImageDraws

__all__ = ["LoaderBatches"]

MAX_WORKERS = 16


class _Pixels(Dataset[Tensor]):
    """The images of a source at one size, for ``DataLoader``."""

    def __init__(self, source: LazyImages, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.source.pixels(index, self.size)


class LoaderBatches(AugmentedBatches):
    """The batches that ``DeviceLoader`` would give, bit for bit, with images read from their source every epoch.

    The workers decode and resize, nothing else, so nothing is random in them. What is augmented is augmented on the
    training device, as a whole batch.

    Args:
        source: The training images.
        size: Side of the square that they are resized to, in pixels.
        settings: How the batches are made.
        device: Where they are wanted.
        workers: Processes that decode; None for one less than there are cores, 0 for none beside this one.

    Raises:
        UserError: If the settings do not fit the images.
    """

    def __init__(
        self,
        source: LazyImages,
        size: int,
        settings: BatchSettings,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> None:
        labels = torch.from_numpy(source.labels)
        super().__init__(labels, source.classes, source.source, (size, size), settings, device)
        self._pixels = _Pixels(source, size)
        self.workers = min(MAX_WORKERS, (os.cpu_count() or 1) - 1) if workers is None else workers

    def _windows(
        self, order: Tensor, order_here: Tensor, draws: ImageDraws, parts: list[slice], crop: tuple[int, int]
    ) -> Iterator[Tensor]:
        loader = DataLoader(
            self._pixels,
            batch_sampler=[order[part].tolist() for part in parts],
            num_workers=self.workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else the loader would take a number from torch's own stream
        )
        for part, images in zip(parts, loader, strict=True):
            here = images.to(self._device, non_blocking=True)
            yield self._window(here, torch.arange(len(here), device=self._device), draws[part], crop)
