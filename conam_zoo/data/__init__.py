"""Images for training: reading sets of any kind, splitting them, and handing out augmented batches."""

from conam_zoo.data.dataset import ImageSplit, pixel_statistics
from conam_zoo.data.load import ImageData, check_split, open_images, read_split
from conam_zoo.data.loaders import Batches, BatchSettings, DeviceLoader, WorkerLoader, create_loader
from conam_zoo.data.transforms import AugmentationSettings, normalize

__all__ = [
    "AugmentationSettings",
    "BatchSettings",
    "Batches",
    "DeviceLoader",
    "ImageData",
    "ImageSplit",
    "WorkerLoader",
    "check_split",
    "create_loader",
    "normalize",
    "open_images",
    "pixel_statistics",
    "read_split",
]
