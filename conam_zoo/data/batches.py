"""Augmented training batches, from images that lie on the training device or come from a loader.

What is random about the image at one place of an epoch's order is drawn for that place, for the whole epoch at once. So
a batch is a function of seed, epoch and step, whatever came before it; which path the images took, and how many devices
share the epoch, changes nothing about crop, flip and Cutout. mixup and CutMix draw one share for each batch of each
device.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from conam_zoo.data.dataset import ImageSplit
from conam_zoo.data.normalization import Normalizer
from conam_zoo.data.sampler import Shards, epoch_order
from conam_zoo.data.transforms import (
    IMAGES,
    MIXING,
    AugmentationSettings,
    ImageDraws,
    alternating_flips,
    check_fits,
    crop_and_flip,
    cut_out,
    mix,
    random_stream,
)

__all__ = ["AugmentationSettings", "AugmentedBatches", "BatchSettings", "Batches", "DeviceLoader"]


@dataclass(frozen=True)
class BatchSettings:
    """How batches are made, whatever the images.

    Attributes:
        augmentation: What is done to the images.
        batch_size: Images of a full batch on this rank.
        seed: Seed of order and augmentation.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel.
        rank: Index of this device.
        world_size: Number of devices that share an epoch.
        balance: Show every class equally often; see ``epoch_order``.
    """

    augmentation: AugmentationSettings
    batch_size: int
    seed: int
    mean: Sequence[float]
    std: Sequence[float]
    rank: int = 0
    world_size: int = 1
    balance: bool = False


class Batches(Protocol):
    """Augmented training batches; everything drawn is a function of (seed, epoch, step) alone.

    Attributes:
        classes: Class names in label order.
        source: Where the images were read, for messages.
        num_images: Images of one epoch over all ranks.
        steps: Batches of one epoch on this rank.
    """

    classes: tuple[str, ...]
    source: str
    num_images: int
    steps: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch from ``first_step`` on; the skipped ones cost nothing.

        Yields:
            Images (B, 3, h, w), float32, normalised, channels_last, on the training device, smaller in early epochs if
            that is asked for; and targets: int64 (B,), or float32 (B, classes) for a batch that mixup or CutMix mixed.
            What follows is for the loss, such as a teacher's logits.
        """
        ...


class AugmentedBatches(ABC):
    """What the two kinds of batches share: order, shards, augmentation, normalisation.

    Args:
        labels: Label of every training image, int64 (N,).
        classes: Class names in label order.
        source: Where the images were read, for messages.
        size: (H, W) of the images.
        settings: How the batches are made.
        device: Where they are wanted.

    Raises:
        UserError: If the settings do not fit the images.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: tuple[str, ...],
        source: str,
        size: tuple[int, int],
        settings: BatchSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.classes, self.source = classes, source
        check_fits(settings.augmentation, size, f"the images of {source}")
        shards = Shards(len(labels), settings.batch_size, settings.rank, settings.world_size)
        self.num_images, self.steps = shards.num_images, shards.steps
        self._shards, self._settings, self._size, self._device = shards, settings, size, torch.device(device)
        self._host_labels = labels.cpu().numpy()
        self._labels = labels.to(self._device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch; see ``Batches.epoch``."""
        seed, augmentation = self._settings.seed, self._settings.augmentation
        order = epoch_order(self._host_labels, seed, epoch, balance=self._settings.balance)
        crop = augmentation.crop_size(epoch, self._size)
        normalize = Normalizer(self._settings.mean, self._settings.std, crop[1], self._device)
        flips = alternating_flips(len(self._host_labels), seed, epoch)[order] if augmentation.alternate_flip else None
        draws = ImageDraws.draw(random_stream(IMAGES, seed, epoch), len(order), self._size, augmentation, crop, flips)
        parts = [self._shards.part(step) for step in range(first_step, self.steps)]
        order_here, draws = order.to(self._device, non_blocking=True), draws.to(self._device)
        batches = self._windows(order, order_here, draws, parts, crop)
        for step, (part, windows) in enumerate(zip(parts, batches, strict=True), first_step):
            images = normalize(windows)
            labels = self._labels[order_here[part]]
            if augmentation.cutout:
                images = cut_out(images, draws[part], augmentation.cutout)
            stream = random_stream(MIXING, seed, epoch, step, self._settings.rank)
            if augmentation.mixes and (augmentation.mix_share == 1 or stream.random() < augmentation.mix_share):
                yield mix(images, labels, len(self.classes), augmentation, stream)
            else:
                yield images, labels

    def _window(self, images: Tensor, indices: Tensor, draws: ImageDraws, crop: tuple[int, int]) -> Tensor:
        """Crop and flip, where that is asked for: uint8 (B, h, w, 3)."""
        augmentation = self._settings.augmentation
        if augmentation.crop_padding or augmentation.flip or crop != self._size:
            return crop_and_flip(images, indices, draws, augmentation.crop_padding, crop)
        return images[indices]

    @abstractmethod
    def _windows(
        self, order: Tensor, order_here: Tensor, draws: ImageDraws, parts: list[slice], crop: tuple[int, int]
    ) -> Iterator[Tensor]:
        """The cropped and flipped uint8 images (B, h, w, 3) of every part of the order, on the device."""


class DeviceLoader(AugmentedBatches):
    """Batches of a split that lies on the training device as a whole, as uint8.

    Args:
        split: The training images, on the training device.
        settings: How the batches are made.

    Raises:
        UserError: If the settings do not fit the images.
    """

    def __init__(self, split: ImageSplit, settings: BatchSettings) -> None:
        size = (split.images.shape[1], split.images.shape[2])
        super().__init__(split.labels, split.classes, split.source, size, settings, split.images.device)
        self._images = split.images.contiguous()

    def _windows(
        self, order: Tensor, order_here: Tensor, draws: ImageDraws, parts: list[slice], crop: tuple[int, int]
    ) -> Iterator[Tensor]:
        for part in parts:
            yield self._window(self._images, order_here[part], draws[part], crop)
