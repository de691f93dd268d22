"""Reading pictures of all modes."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conam_zoo.data.images import decode_image, read_image, resize_image
from conam_zoo.errors import UserError
from conam_zoo.visualize.predict import percent


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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damage_of_any_kind_is_a_picture_or_a_sentence(form: str) -> None:
    file = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert("RGB").save(file, form)
    chance = random.Random(0)
    sentences = []
    for _ in range(60):
        content = bytearray(file.getvalue())
        for _ in range(chance.choice([1, 4, 40])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        content = content[: chance.choice([len(content), len(content) // 2, 30, 0])]
        try:
            assert decode_image(io.BytesIO(content), "a picture").mode == "RGB"
        except UserError as error:
            sentences.append(str(error))
    assert 15 < len(sentences) <= 60
    assert all("a picture" in sentence for sentence in sentences)


def test_a_palette_with_transparency_and_sixteen_bits_with_alpha(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "p.png")).min() == 255
    Image.new("LA", (4, 4), (100, 128)).save(tmp_path / "la.png")
    np.testing.assert_allclose(np.asarray(read_image(tmp_path / "la.png")), 177, atol=1)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (8, 8), (32, 32), (1, 100)])
def test_resizing_gives_a_square(size: tuple[int, int]) -> None:
    assert resize_image(Image.new("RGB", size, "red"), 32).size == (32, 32)


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0.0, "<0.1%"), (0.0004, "<0.1%"), (0.0005, "0.1%"), (0.125, "12.5%"), (0.9994, "99.9%"), (1.0, ">99.9%")],
)
def test_probabilities_are_never_shown_as_certain_or_impossible(probability: float, text: str) -> None:
    assert percent(probability) == text
