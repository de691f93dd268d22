"""Reading pictures of all modes."""

import io
import random
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from conam_zoo.data.images import NOTE, decode_image, full_scale, read_image, resize_image
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


@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(6 * 3 * 3, dtype=np.uint8).reshape(3, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as saved:
        assert np.array_equal(read_image(tmp_path / "turned.png"), ImageOps.exif_transpose(saved))


def test_a_picture_is_turned_whatever_its_other_tags_hold(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "someone"
    text, ratio = struct.pack(">HHI", 0x013B, 2, 8), struct.pack(">HHI", 0x013B, 5, 1)
    assert text in exif.tobytes()
    image = Image.new("RGB", (6, 3), "white")
    image.save(tmp_path / "turned.jpg", exif=exif.tobytes().replace(text, ratio))  # the artist's name as a number
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


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
showpage
"""


def test_only_formats_that_run_no_program_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **more: pytest.fail("a program was started"))
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(UserError, match=r"photo\.png is not an image that is read here"):
        read_image(tmp_path / "photo.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.tga")
    with pytest.raises(UserError, match=r"photo\.tga is not an image that is read here"):
        read_image(tmp_path / "photo.tga")


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG, whose pixels are missing: to decode it would be another sentence."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((13_300, 13_300), r"is too large \(13,300 x 13,300 pixels"),
        ((1, 130_000_000), "is too large"),
        ((100_000, 100_000), "too large"),
        ((1, 60_000), r"is too long a strip \(1 x 60,000 pixels"),
        ((60_000, 2), "is too long a strip"),
        ((11_000, 10_000), "is damaged"),  # it may be decoded
    ],
)
def test_pixels_are_bounded_before_they_are_decoded(size: tuple[int, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        decode_image(io.BytesIO(png_of(*size)), "big.png")
    assert "big.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_nothing_is_said_by_libraries(tmp_path: Path, warm_python: str) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    Image.new("RGB", (10_000, 9_500)).save(tmp_path / "bomb.png", compress_level=1)
    Image.effect_noise((24, 24), 60).save(tmp_path / "cut.tif")
    content = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[:-60])
    program = (
        "import sys; from conam_zoo.data.images import read_image; from conam_zoo.errors import UserError\n"
        "for name in sys.argv[1:]:\n    try: print(read_image(name).size)\n    except UserError as e: print('refused')"
    )
    names = [str(tmp_path / name) for name in ("palette.png", "bomb.png", "cut.tif")]
    done = subprocess.run([warm_python, "-c", program, *names], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(4, 4)", "(10000, 9500)", "refused"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[0, 200 * 257]], np.int32), [0, 200]),
        (np.array([[0, 200, 255]], np.float32), [0, 200, 255]),
        (np.array([[0, 200 * 257, 65535]], np.float32), [0, 200, 255]),
        (np.array([[0, 0.5, np.nan, np.inf, -np.inf, 1]], np.float32), [0, 128, 0, 255, 0, 255]),
        (np.array([[-1e-4, 1.0005]], np.float32), [0, 255]),  # what interpolation overshoots
    ],
)
def test_values_are_scaled_by_the_range_that_they_fit(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "values.tif")
    assert np.asarray(read_image(tmp_path / "values.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.array([[-5, 5]], np.int32), r"runs from -5 to 5, but integers must lie in \[0, 255\] or \[0, 65535\]"),
        (np.array([[0, 70_000]], np.int32), "runs from 0 to 70000"),
        (np.array([[-1, 1]], np.float32), r"floats must lie in \[0, 1\], \[0, 255\] or \[0, 65535\]"),
        (np.array([[0, 16]], np.float32), "runs from 0 to 16"),
        (np.array([[0, 4095]], np.float32), "runs from 0 to 4095"),
        (np.array([[np.nan, np.inf]], np.float32), "holds no finite value"),
    ],
)
def test_values_that_fit_no_range_are_refused(tmp_path: Path, values: np.ndarray, sentence: str) -> None:
    Image.fromarray(values).save(tmp_path / "values.tif")
    with pytest.raises(UserError, match=sentence):
        read_image(tmp_path / "values.tif")


@pytest.mark.parametrize(("largest", "note"), [(255, "if it holds 8 bits"), (4095, "if it holds 12 bits"), (9000, "")])
def test_few_bits_in_a_file_of_sixteen_get_a_note(tmp_path: Path, largest: int, note: str) -> None:
    Image.fromarray(np.array([[0, largest]], np.uint16)).save(tmp_path / "few.png")
    image = read_image(tmp_path / "few.png")
    assert np.asarray(image)[0, 1, 0] == round(largest / 257)
    assert note in image.info.get(NOTE, "")
    assert bool(note) == (NOTE in image.info)


def test_sixteen_bits_are_sixteen_bits_in_every_byte_order_and_format(tmp_path: Path) -> None:
    values = np.full((8, 8), 200, np.uint16)  # so dark that they would pass for eight bits
    Image.fromarray(values).save(tmp_path / "little.tif")
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    for name in ("little.tif", "big.tif", "grey.pgm"):
        picture = read_image(tmp_path / name)
        assert np.asarray(picture).max() == 1, name
        assert "16 bits" in picture.info[NOTE]
    assert full_scale(np.dtype(">u2"), (0, 200), "it")[0] == 65535
