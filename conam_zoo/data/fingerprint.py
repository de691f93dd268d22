"""Recognising images again: a number for each, by its pixels alone."""

from hashlib import blake2b, sha256

import numpy as np

from conam_zoo.data.dataset import ImageSplit, LazyImages

__all__ = ["data_sha256", "image_hashes"]


def image_hashes(images: ImageSplit | LazyImages, size: int) -> np.ndarray:
    """64-bit hashes of the pixels of images of ``size`` x ``size``, uint64 (N,); a source is read once."""
    if isinstance(images, ImageSplit):
        pixels = iter(images.images.cpu().contiguous().numpy())
    else:
        pixels = (images.pixels(index, size).numpy() for index in range(len(images)))
    digests = b"".join(blake2b(each.tobytes(), digest_size=8).digest() for each in pixels)
    return np.frombuffer(digests, dtype="<u8")


def data_sha256(hashes: np.ndarray, labels: np.ndarray) -> str:
    """A hash of a whole split, in its order, with its labels (N,)."""
    return sha256(hashes.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
