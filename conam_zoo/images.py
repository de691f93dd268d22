"""Reading one picture, whatever its format and mode, as RGB."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from conam_zoo.errors import UserError

__all__ = ["read_image"]


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB: turned upright by its EXIF tag, transparency over white, 16 bits scaled to 8.

    Raises:
        UserError: If the file is missing, is no picture, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no image file {path}: check the path.")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read: convert it to PNG or JPEG.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"The image {path} is damaged or too large ({error}): replace it.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit pictures use 0..65535 even where a decoder hands them out as 32-bit integers; floats use 0..1.
        top = 65535.0 if image.mode != "F" else 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
