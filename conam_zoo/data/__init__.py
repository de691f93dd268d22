"""Images for training: reading sets of any kind, splitting them, and handing out augmented batches."""

from conam_zoo.data.augmentation import AugmentationSettings
from conam_zoo.data.batches import Batches, BatchSettings, ResidentBatches
from conam_zoo.data.choosing import choose_batches
from conam_zoo.data.loader import LoaderBatches
from conam_zoo.data.normalization import normalize
from conam_zoo.data.opening import ImageData, open_images, pixel_statistics
from conam_zoo.data.reading import read_split
from conam_zoo.data.split import ImageSplit

__all__ = [
    "AugmentationSettings",
    "BatchSettings",
    "Batches",
    "ImageData",
    "ImageSplit",
    "LoaderBatches",
    "ResidentBatches",
    "choose_batches",
    "normalize",
    "open_images",
    "pixel_statistics",
    "read_split",
]
