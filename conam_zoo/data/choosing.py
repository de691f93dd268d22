"""Which of the two data paths a set takes: it stays on the training device if it fits there."""

import torch

from conam_zoo.data.batches import AugmentedBatches, BatchSettings, DeviceLoader
from conam_zoo.data.dataset import ImageSplit
from conam_zoo.data.loader import LoaderBatches
from conam_zoo.data.memory import free_bytes
from conam_zoo.data.sources import LazyImages, source_of_split

__all__ = ["SHARE_OF_MEMORY", "create_loader", "fits"]

SHARE_OF_MEMORY = 0.5  # of what is free: the rest is for the training


def fits(count: int, size: int, device: torch.device | str, *, free: int | None = None) -> bool:
    """Whether images take at most half of the free memory of a device, as uint8.

    Args:
        count: How many images.
        size: Side of an image, in pixels.
        device: The device.
        free: Its free bytes; None to ask it.
    """
    available = free_bytes(device) if free is None else free
    return 3 * count * size * size <= SHARE_OF_MEMORY * available


def create_loader(
    train: ImageSplit | LazyImages,
    size: int,
    settings: BatchSettings,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    free: int | None = None,
) -> tuple[AugmentedBatches, str]:
    """Batches that keep the whole set on the device if it takes at most half of what is free there, else from a loader.

    Args:
        train: The training images: in memory, or a source that did not fit there.
        size: Side of the images, in pixels.
        settings: How the batches are made.
        device: The training device.
        workers: Processes of the loader; see ``LoaderBatches``.
        free: Free bytes of the device; None to ask it.

    Returns:
        The batches, and one line that says which kind and why.
    """
    device = torch.device(device)
    free = free_bytes(device) if free is None else free
    held = isinstance(train, ImageSplit) and (
        train.images.device.type == device.type == "cpu" or fits(len(train), size, device, free=free)
    )
    need = f"{3 * len(train) * size * size / 1e6:,.1f} MB of images, {free / 1e6:,.0f} MB free on {device.type}"
    if held and isinstance(train, ImageSplit):
        batches = DeviceLoader(train.to(device), settings)
        return batches, f"The whole training set stays on the {device.type} as uint8 ({need})."
    source = source_of_split(train) if isinstance(train, ImageSplit) else train
    if isinstance(train, ImageSplit):
        workers = 0  # nothing to decode
    loader = LoaderBatches(source, size, settings, device=device, workers=workers)
    return loader, f"The training set is read by a loader with {loader.workers} workers as it is needed ({need})."
