"""Images for training: reading sets of any kind, splitting them, and handing out augmented batches."""

from conam_zoo.data.batches import Batches, BatchSettings, DeviceLoader
from conam_zoo.data.choosing import create_loader
from conam_zoo.data.dataset import ImageSplit
from conam_zoo.data.load import ImageData, open_images, pixel_statistics
from conam_zoo.data.loader import LoaderBatches
from conam_zoo.data.normalization import normalize
from conam_zoo.data.reading import read_split
from conam_zoo.data.transforms import AugmentationSettings

__all__ = [
    "AugmentationSettings",
    "BatchSettings",
    "Batches",
    "DeviceLoader",
    "ImageData",
    "ImageSplit",
    "LoaderBatches",
    "create_loader",
    "normalize",
    "open_images",
    "pixel_statistics",
    "read_split",
]
