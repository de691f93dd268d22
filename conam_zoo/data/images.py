"""Reading one picture, whatever its format and mode, as RGB, and bringing it to a net's size."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from conam_zoo.errors import UserError

__all__ = ["PICTURE_SUFFIXES", "decode_image", "read_image", "resize_image", "to_rgb"]

# What is taken for a picture in a folder; everything else there is left out.
PICTURE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB: turned upright by its EXIF tag, transparency over white, 16 bits scaled to 8.

    Raises:
        UserError: If the file is missing, is no picture, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no image file {path}: check the path.")
    return decode_image(path, str(path))


def decode_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """The same of an open file or a path; ``name`` is what messages call it.

    Raises:
        UserError: If it is no picture, or is damaged.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can read: convert it to PNG or JPEG.") from error
    except Exception as error:  # a decoder raises whatever its parser ran into: struct.error, zlib.error, IndexError...
        raise UserError(f"The image {name} is damaged or too large ({error}): replace it.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a decoded picture: transparency over white, 16 bits scaled to 8, floats from 0..1 (or 0..255)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit pictures use 0..65535 even where a decoder hands them out as 32-bit integers; floats use 0..1.
        top = 65535.0 if image.mode != "F" else 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def resize_image(image: Image.Image, size: int, interpolation: str = "bicubic") -> Image.Image:
    """A square of ``size`` pixels: the short side resized, the middle kept; what timm's evaluation transform does.

    >>> resize_image(Image.new("RGB", (90, 60)), 32).size
    (32, 32)
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    if image.size == (size, size):
        return image
    resized: Image.Image = center_crop(resize(image, [size], InterpolationMode(interpolation)), [size, size])
    return resized
