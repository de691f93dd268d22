"""Reading pictures of all modes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conam_zoo.analysis.predict import percent
from conam_zoo.errors import UserError
from conam_zoo.images import read_image


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "HSV", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = ".tif" if mode in ("CMYK", "I", "F", "YCbCr") else ".png"
    base = Image.new("RGB", (5, 4), (200, 200, 200))
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 5), 200 * 257, np.uint16))
    elif mode == "I":
        image = Image.fromarray(np.full((4, 5), 200 * 257, np.int32))
    elif mode == "F":
        image = Image.fromarray(np.full((4, 5), 200 / 255, np.float32))
    elif mode == "HSV":
        image = base  # no format stores it
    elif mode == "P":
        image = base.convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        image = base.convert(mode)
    image.save(tmp_path / f"picture{suffix}")
    result = read_image(tmp_path / f"picture{suffix}")
    assert result.mode == "RGB"
    assert result.size == (5, 4)
    if mode == "1":  # dithered to black and white
        assert 100 < np.asarray(result).mean() < 255
    else:
        np.testing.assert_allclose(np.asarray(result), 200, atol=3)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 3), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (3, 6)


def test_what_is_no_picture_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt is not an image"):
        read_image(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="There is no image file"):
        read_image(tmp_path / "nothing.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    with pytest.raises(UserError, match=r"cut\.png is damaged"):
        read_image(tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0.0, "<0.1%"), (0.0004, "<0.1%"), (0.0005, "0.1%"), (0.125, "12.5%"), (0.9994, "99.9%"), (1.0, ">99.9%")],
)
def test_probabilities_are_never_shown_as_certain_or_impossible(probability: float, text: str) -> None:
    assert percent(probability) == text
