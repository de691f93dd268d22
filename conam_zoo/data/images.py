"""Reading one picture, whatever its format and mode, as RGB, and bringing it to a net's size."""

import logging
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from conam_zoo.errors import UserError
from conam_zoo.files import check_file, expand_path

# The formats that are opened, by what a file holds, not by its name: Pillow runs a program for some of the others.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What is taken for a picture in a folder; everything else there is left out.
PICTURE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
) | {".tif", ".tiff", ".webp"}
MAX_PIXELS = 120_000_000  # of the largest telephone cameras that store whole pictures; 360 MB as RGB
MAX_RATIO = 1000  # of the sides: a strip grows by its ratio when its short side is brought to a net's size
NOTE = "conam_note"  # key in ``Image.info``: what a person should know about how a picture was read
HALF_STEP = 1 / 510  # of 8 bits, as a share of the full scale: what interpolation may overshoot without harm
BLOCK = 2**22  # values that are scaled at a time

# By the orientation that EXIF states, what turns a picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow thinks of a file is either no concern of the user's or becomes a sentence below.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB: turned upright by its EXIF tag, transparency over white, other depths scaled."""
    path = expand_path(path)
    check_file(path, "image file")
    return decode_image(path, str(path))


def decode_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """``read_image`` of an open file or a path; ``name`` is what messages call it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(*image.size, f"The image {name}")
            image.load()
            picture = upright(image)
            if image.format == "PPM" and picture.mode == "I":  # Pillow stretches these to 16 bits
                picture = Image.fromarray(np.asarray(picture).astype(np.uint16))
            return to_rgb(picture, f"The image {name}")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that is read here: convert it to PNG or JPEG.") from error
    except Exception as error:  # a decoder raises whatever its parser ran into: struct.error, zlib.error, IndexError...
        raise UserError(f"The image {name} is damaged or too large ({reason_of(error)}): replace it.") from error


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF tag says, if that can be read.

    Unlike Pillow's ``exif_transpose`` this leaves the other tags alone, which it writes anew and may fail at.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever the parser ran into
        turn = None
    return image.copy() if turn is None else image.transpose(turn)


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def check_size(width: int, height: int, what: str) -> None:
    """Refuse pictures whose pixels, or whose resized copy, would fill the memory."""
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{what} is too large ({width:,} x {height:,} pixels; {MAX_PIXELS // 10**6} million are the most): "
            "scale it down."
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(
            f"{what} is too long a strip ({width:,} x {height:,} pixels; a side may be {MAX_RATIO:,} times the "
            "other): cut it."
        )


def to_rgb(image: Image.Image, name: str = "An image") -> Image.Image:
    """8-bit RGB of a decoded picture: transparency over white; more bits and floats scaled by ``full_scale``."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        top, note = full_scale(values.dtype, value_range(values), name)
        rgb = Image.fromarray(to_uint8(values, top)).convert("RGB")
        if note:
            rgb.info[NOTE] = note
        return rgb
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def value_range(values: np.ndarray) -> tuple[float, float] | None:
    """The smallest and the largest finite value; None if there is none."""
    low, high = np.inf, -np.inf
    for block in _blocks(values):
        if block.dtype.kind == "f":
            block = block[np.isfinite(block)]
        if block.size:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
    return (low, high) if low <= high else None


def full_scale(dtype: np.dtype, limits: tuple[float, float] | None, what: str) -> tuple[float, str]:
    """Which value is white, and a note where 16 bits hold no more than 12, else an empty string.

    8 and 16 bits without sign are taken over their whole range. Other integers lie in 0..255 or 0..65535, floats in
    0..1, 0..255 or 0..65535: the first range that holds them, of which floats have to use a quarter or more.
    ``limits`` is what ``value_range`` gave, ``what`` the name of the image or the array for messages.
    """
    if dtype in (np.bool_, np.uint8):
        return (1.0 if dtype == np.bool_ else 255.0), ""
    if limits is None:
        raise UserError(f"{what} holds no finite value: write it again.")
    low, high = limits
    whole = dtype.kind in "iu"
    unsigned16 = dtype.kind == "u" and dtype.itemsize == 2  # of either byte order
    tops = (65535.0,) if unsigned16 else (255.0, 65535.0) if whole else (1.0, 255.0, 65535.0)
    slack = 0.0 if whole else HALF_STEP
    fitting = [top for top in tops if -slack * top <= low and high <= (1 + slack) * top]
    if not fitting or (not whole and fitting[0] > 1 and high < fitting[0] / 4):
        ranges = "integers must lie in [0, 255] or" if whole else "floats must lie in [0, 1], [0, 255] or"
        raise UserError(f"{what} runs from {low:g} to {high:g}, but {ranges} [0, 65535]: scale it.")
    if fitting[0] == 65535 and 0 < high <= 4095:
        bits = 8 if high <= 255 else 12
        return fitting[0], (
            f"{what} has 16 bits, but no value above {high:g}, so it is dark: if it holds {bits} bits, "
            f"multiply it by {65535 // (2**bits - 1)}"
        )
    return fitting[0], ""


def to_uint8(values: np.ndarray, top: float) -> np.ndarray:
    """Values of 0..``top`` as 8 bits, rounded; what is not a number becomes 0."""
    if values.dtype == np.uint8:
        return values
    result = np.empty(values.shape, np.uint8)
    for block, target in zip(_blocks(values), _blocks(result), strict=True):
        scaled = np.nan_to_num(np.asarray(block, dtype=np.float64) / top, nan=0.0, posinf=1.0, neginf=0.0)
        target[...] = np.round(scaled.clip(0, 1) * 255)
    return result


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """Views of an array, cut along its first axis, that are small enough for a copy of each."""
    step = max(1, BLOCK // max(1, values[:1].size))
    return [values[start : start + step] for start in range(0, len(values), step)]


def resize_image(image: Image.Image, size: int) -> Image.Image:
    """A square of ``size`` pixels: the short side resized, the middle kept; what timm's evaluation transform does.

    >>> resize_image(Image.new("RGB", (90, 60)), 32).size
    (32, 32)
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    if image.size == (size, size):
        return image
    resized: Image.Image = center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size, size])
    return resized
