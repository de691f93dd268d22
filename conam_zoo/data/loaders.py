"""Augmented training batches, from images that lie on the training device or come from a loader.

What is random about the image at one place of an epoch's order is drawn for that place, for the whole epoch at once. So
a batch is a function of seed, epoch and step, whatever came before it; which path the images took, and how many devices
share the epoch, changes nothing about crop, flip and Cutout. mixup and CutMix draw one share for each batch of each
device.
"""

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conam_zoo.data.dataset import ImageSplit, LazyImages, fits, free_bytes, local_processes, source_of_split
from conam_zoo.data.transforms import (
    IMAGES,
    MIXING,
    ORDER,
    AugmentationSettings,
    ImageDraws,
    Normalizer,
    alternating_flips,
    check_fits,
    crop_and_flip,
    cut_out,
    mix,
    random_stream,
)
from conam_zoo.errors import UserError

TOGETHER_SECONDS = 4.0  # less than torch waits before it ends a worker
MAX_WORKERS = 16


@dataclass(frozen=True)
class BatchSettings:
    """How batches are made, whatever the images."""

    augmentation: AugmentationSettings
    batch_size: int  # images of a full batch on this rank
    seed: int  # of order and augmentation
    mean: Sequence[float]  # of each channel, in [0, 1]
    std: Sequence[float]
    rank: int = 0  # index of this device
    world_size: int = 1  # devices that share an epoch
    balance: bool = False  # show every class equally often; see ``epoch_order``


def epoch_order(labels: np.ndarray, seed: int, epoch: int, *, balance: bool = False) -> Tensor:
    """The indices (N,) of an epoch, a function of the arguments alone.

    With ``balance`` every class is shown equally often instead of every image once: an epoch still has N images, and
    within a class every image comes up as often as any other, give or take one.
    """
    stream = random_stream(ORDER, seed, epoch)
    if not balance:
        return torch.from_numpy(stream.permutation(len(labels)))
    classes = stream.permutation(np.unique(labels))  # shuffled: who gets the remainder is chance
    quota, remainder = divmod(len(labels), len(classes))
    chosen = []
    for rank, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        count = quota + (rank < remainder)
        rounds = [stream.permutation(members) for _ in range(-(-count // len(members)))]
        chosen.append(np.concatenate(rounds)[:count] if rounds else members[:0])
    return torch.from_numpy(stream.permutation(np.concatenate(chosen)))


class Shards:
    """Cuts the order of an epoch into the batches of one device (rank) out of several.

    The order is cut into global batches, and each rank takes its own run of each, so that all ranks make the same
    number of steps. The last, smaller global batch is shared out as evenly as it goes; it is left out if a rank would
    get fewer than two images of it, because batch norm cannot train on a single one.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 2:
            raise UserError(f"The batch size on each device is {batch_size}, but batch norm needs 2 images or more.")
        self.whole = batch_size * world_size
        full, rest = divmod(count, self.whole)
        if rest < 2 * world_size:
            rest = 0
        self.steps = full + (rest > 0)
        self.num_images = full * self.whole + rest
        self.rank, self.world_size = rank, world_size
        if self.steps == 0:
            raise UserError(
                f"There are {count} training images, but {world_size} device(s) need {2 * world_size} for one step: "
                "add images."
            )

    def part(self, step: int) -> slice:
        """Which positions of the epoch's order are this rank's batch at a step."""
        start = step * self.whole
        size = min(self.whole, self.num_images - start)
        first, last = (start + size * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return slice(first, last)


class Batches(ABC):
    """Augmented training batches; everything drawn is a function of (seed, epoch, step) alone."""

    classes: tuple[str, ...]  # in label order
    source: str  # where the images were read, for messages
    num_images: int  # of one epoch over all ranks
    steps: int  # batches of one epoch on this rank

    @abstractmethod
    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch from ``first_step`` on; the skipped ones cost nothing.

        Yields:
            Images (B, 3, h, w), float32, normalised, channels_last, on the training device, smaller in early epochs if
            that is asked for; and targets: int64 (B,), or float32 (B, classes) for a batch that mixup or CutMix mixed.
            What follows is for the loss, such as a teacher's logits.
        """


class _AugmentedBatches(Batches):
    """What the two loaders share: order, shards, augmentation, normalisation; ``size`` is (H, W) of the images."""

    def __init__(
        self,
        labels: Tensor,
        classes: tuple[str, ...],
        source: str,
        size: tuple[int, int],
        settings: BatchSettings,
        device: torch.device | str,
    ) -> None:
        check_fits(settings.augmentation, size, f"the images of {source}")
        shards = Shards(len(labels), settings.batch_size, settings.rank, settings.world_size)
        self.classes, self.source = classes, source
        self.num_images, self.steps = shards.num_images, shards.steps
        self._shards, self._settings, self._size, self._device = shards, settings, size, torch.device(device)
        self._host_labels = labels.cpu().numpy()
        self._labels = labels.to(self._device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        seed, augmentation = self._settings.seed, self._settings.augmentation
        order = epoch_order(self._host_labels, seed, epoch, balance=self._settings.balance)
        crop = augmentation.crop_size(epoch, self._size)
        moved = augmentation.crop_padding or augmentation.flip or crop != self._size
        normalize = Normalizer(self._settings.mean, self._settings.std, crop[1], self._device)
        flips = alternating_flips(len(self._host_labels), seed, epoch)[order] if augmentation.alternate_flip else None
        draws = ImageDraws.draw(random_stream(IMAGES, seed, epoch), len(order), self._size, augmentation, crop, flips)
        draws, labels_in_order = draws.to(self._device), self._labels[order.to(self._device, non_blocking=True)]
        steps = range(first_step, self.steps)
        parts = [self._shards.part(step) for step in steps]
        for step, part, (images, indices) in zip(steps, parts, self._images(order, parts), strict=True):
            if moved:
                windows = crop_and_flip(images, indices, draws[part], augmentation.crop_padding, crop)
            else:
                windows = images[indices]
            shown, labels = normalize(windows), labels_in_order[part]
            if augmentation.cutout:
                shown = cut_out(shown, draws[part], augmentation.cutout)
            if augmentation.mixes:
                stream = random_stream(MIXING, seed, epoch, step, self._settings.rank)
                if augmentation.mix_share == 1 or stream.random() < augmentation.mix_share:
                    shown, labels = mix(shown, labels, len(self.classes), augmentation, stream)
            yield shown, labels

    @abstractmethod
    def _images(self, order: Tensor, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each part of the order uint8 images (N, H, W, 3) on the device, and which of them it shows, (B,)."""


class DeviceLoader(_AugmentedBatches):
    """Batches of a split that lies on the training device as a whole, as uint8."""

    def __init__(self, split: ImageSplit, settings: BatchSettings) -> None:
        size = (split.images.shape[1], split.images.shape[2])
        super().__init__(split.labels, split.classes, split.source, size, settings, split.images.device)
        self._all_images = split.images.contiguous()

    def _images(self, order: Tensor, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        here = order.to(self._device, non_blocking=True)
        for part in parts:
            yield self._all_images, here[part]


class _Pixels(Dataset[Tensor]):
    """The images of a source at one size, for ``DataLoader``."""

    def __init__(self, source: LazyImages, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.source.pixels(index, self.size)


def _outlive_supervisors(worker: int) -> None:
    """Outlive the signals of a supervisor to the whole group, after which the parent saves its state.

    They come together. A later SIGTERM is the parent's own, to a worker that hangs.
    """
    first: list[float] = []

    def stop(*_: object) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] > TOGETHER_SECONDS:
            os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)


class WorkerLoader(_AugmentedBatches):
    """The batches that ``DeviceLoader`` would give, bit for bit, with images read from their source every epoch.

    The workers decode and resize to squares of ``size`` pixels, nothing else, so nothing is random in them. What is
    augmented is augmented on the training device, as a whole batch. ``workers`` is None for one less than this process
    has cores, 0 for none beside it.
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
        cores = (os.cpu_count() or 1) // local_processes()
        self.workers = max(0, min(MAX_WORKERS, cores - 1)) if workers is None else workers

    def _images(self, order: Tensor, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._pixels,
            batch_sampler=[order[part].tolist() for part in parts],
            num_workers=self.workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else the loader would take a number from torch's own stream
            worker_init_fn=_outlive_supervisors,
        )
        try:
            for images in loader:
                yield images.to(self._device, non_blocking=True), torch.arange(len(images), device=self._device)
        except UserError as error:  # a worker's comes with its traceback
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None


def create_loader(
    train: ImageSplit | LazyImages,
    size: int,
    settings: BatchSettings,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    free: int | None = None,
) -> tuple[Batches, str]:
    """Batches that keep the whole set on the device if it takes at most half of what is free there, else from a loader.

    The line beside them says which kind and why. ``size`` is the side of the images in pixels; ``free`` are the
    device's free bytes, None to ask it.
    """
    device = torch.device(device)
    free = free_bytes(device) if free is None else free
    need = f"{3 * len(train) * size * size / 1e6:,.1f} MB of images, {free / 1e6:,.0f} MB free on {device.type}"
    if isinstance(train, ImageSplit):
        if train.images.device.type == device.type == "cpu" or fits(len(train), size, free):
            line = f"The whole training set stays on the {device.type} as uint8 ({need})."
            return DeviceLoader(train.to(device), settings), line
        train, workers = source_of_split(train), 0  # nothing to decode
    loader = WorkerLoader(train, size, settings, device=device, workers=workers)
    return loader, f"The training set is read by a loader with {loader.workers} workers as it is needed ({need})."
