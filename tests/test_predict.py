"""The commands that look at pictures, with the inputs and outputs that users name."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from conftest import CHECKOUT, Command
from PIL import Image

from conam_zoo.errors import UserError
from conam_zoo.visualize.plots import SHEET_ROWS, caption
from conam_zoo.visualize.predict import class_names, expand_pictures, split_transform

PHOTOS = CHECKOUT / "examples" / "photos"
MODEL = "resnet20_conam.cifar10"


def copy_photo(path: Path, name: str = "dog.jpg") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((PHOTOS / name).read_bytes())
    return path


def top_of(row: dict) -> str:
    return row["top"][0]["class"]


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "relative", "folder"])
@pytest.mark.parametrize("command", ["predict", "explain"])
def test_an_input_is_never_written_onto(conam: Command, tmp_path: Path, monkeypatch, command: str, link: str) -> None:
    Image.open(PHOTOS / "dog.jpg").save(tmp_path / "in.png")
    before = (tmp_path / "in.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out.png"
    if link == "same":
        output = tmp_path / "in.png"
    elif link == "symbolic":
        output.symlink_to("in.png")
    elif link == "hard":
        output.hardlink_to(tmp_path / "in.png")
    elif link == "relative":
        output = Path("../") / tmp_path.name / "in.png"
    else:
        (tmp_path / "other").symlink_to(tmp_path)
        output = tmp_path / "other" / "in.png"
    code, _, err = conam(command, MODEL, "in.png", "--output", output)
    assert code == 2
    assert "it is the input in.png" in err
    assert err.count("\n") == 1
    assert (tmp_path / "in.png").read_bytes() == before


def test_json_is_not_written_onto_an_input_a_weight_or_the_sheet(conam: Command, tmp_path: Path) -> None:
    photo = copy_photo(tmp_path / "in.jpg")
    code, _, err = conam("predict", MODEL, photo, "--json", photo)
    assert (code, photo.read_bytes()) == (2, (PHOTOS / "dog.jpg").read_bytes())
    assert "it is the input" in err
    code, _, err = conam("predict", MODEL, photo, "--output", tmp_path / "a.png", "--json", tmp_path / "a.png")
    assert code == 2
    assert "cannot be written twice" in err
    folder = CHECKOUT / "weights" / MODEL
    before = (folder / "config.json").read_bytes()
    assert conam("predict", f"local-dir:{folder}", photo, "--json", folder / "config.json")[0] == 2
    assert (folder / "config.json").read_bytes() == before


def test_json_replaces_no_picture_of_a_data_set_and_no_config_of_a_folder(conam: Command, tmp_path: Path) -> None:
    photo = copy_photo(tmp_path / "set" / "dog" / "in.jpg")
    before = photo.read_bytes()
    code, _, err = conam("evaluate", MODEL, "--data", tmp_path / "set", "--json", photo)
    assert (code, photo.read_bytes()) == (2, before)
    assert "is not replaced" in err
    folder = tmp_path / "net"
    shutil.copytree(CHECKOUT / "weights" / MODEL, folder)
    before = (folder / "config.json").read_bytes()
    assert conam("info", f"local-dir:{folder}", "--json", folder / "config.json")[0] == 2
    assert (folder / "config.json").read_bytes() == before


def test_json_that_cannot_be_written_is_refused_before_the_work(conam: Command, tmp_path: Path) -> None:
    photo = copy_photo(tmp_path / "in.jpg")
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = conam("predict", MODEL, photo, "--output", tmp_path / "a.png", "--json", tmp_path / "notes.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not replaced" in err
    assert not (tmp_path / "a.png").exists()


def test_a_folder_is_predicted_without_what_is_hidden_in_it(conam: Command, tmp_path: Path) -> None:
    copy_photo(tmp_path / "set" / "dog.JPG")
    copy_photo(tmp_path / "set" / "bird.jpg", "bird.jpg")
    copy_photo(tmp_path / "set" / "._bird.jpg")
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    code, out, _ = conam("predict", MODEL, tmp_path / "set", "--json", "-")
    assert code == 0
    assert [(Path(row["image"]).name, top_of(row)) for row in json.loads(out)] == [
        ("bird.jpg", "bird"),
        ("dog.JPG", "dog"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "explain"])
def test_standard_input_is_a_picture(conam: Command, tmp_path: Path, monkeypatch, command: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO((PHOTOS / "dog.jpg").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    code, out, _ = conam(command, MODEL, "-", "--output", tmp_path / "out.png", "--json", "-")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["image"], top_of(row)) == ("-", "dog")
    with pytest.raises(UserError, match="named twice"):
        expand_pictures([Path("-"), Path("-")])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "explain"])
def test_a_picture_that_cannot_be_read_does_not_stop_the_others(conam: Command, tmp_path: Path, command: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    paths = [tmp_path / "broken.png", PHOTOS / "dog.jpg", tmp_path / "missing.png", PHOTOS / "bird.jpg"]
    code, out, err = conam(command, MODEL, *paths, "--output", tmp_path / "out.png", "--json", "-")
    assert code == 1
    assert [top_of(row) for row in json.loads(out)] == ["dog", "bird"]
    assert [line.split("broken")[0][:7] for line in err.splitlines()] == ["conam: "] * 2
    assert "broken.png" in err
    assert "missing.png" in err
    assert (tmp_path / "out.png").is_file()


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_a_picture_that_cannot_even_be_asked_for_does_not_stop_the_others(
    conam: Command, tmp_path: Path, command: str
) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    paths = [tmp_path / "loop.png", tmp_path / ("x" * 300), PHOTOS / "dog.jpg"]
    code, out, err = conam(command, MODEL, *paths, "--output", tmp_path / "out.png", "--json", "-")
    assert (code, [top_of(row) for row in json.loads(out)]) == (1, ["dog"])
    assert "its links lead in a circle" in err
    assert "the name is too long" in err


@pytest.mark.parametrize("kind", ["closed", "folder"])
def test_standard_input_that_is_none_is_one_sentence(conam: Command, tmp_path: Path, monkeypatch, kind: str) -> None:
    class Folder(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(sys, "stdin", None if kind == "closed" else SimpleNamespace(buffer=Folder()))
    code, _, err = conam("predict", MODEL, "-")
    assert (code, err.count("\n")) == (2, 1)
    assert "Standard input is closed or a folder" in err


def test_where_no_picture_can_be_read_nothing_is_written(conam: Command, tmp_path: Path) -> None:
    code, out, err = conam("predict", MODEL, "a.png", "b.png", "--output", tmp_path / "out.png")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.splitlines()[-1] == "conam: None of the 2 pictures can be read."


@pytest.mark.slow
def test_many_pictures_take_several_sheets_of_bounded_size(conam: Command, tmp_path: Path, monkeypatch) -> None:
    drawn: list[tuple[int, str]] = []
    monkeypatch.setattr(
        "conam_zoo.visualize.plots.draw_sheet", lambda rows, path, title: drawn.append((len(rows), path.name))
    )
    code, out, _ = conam("predict", MODEL, *[PHOTOS / "dog.jpg"] * (2 * SHEET_ROWS + 1), "--output", tmp_path / "s.png")
    assert code == 0
    assert drawn == [(SHEET_ROWS, "s.png"), (SHEET_ROWS, "s-2.png"), (1, "s-3.png")]
    assert [line for line in out.splitlines() if "written" in line] == [
        f"written: {tmp_path / name}" for name in ("s.png", "s-2.png", "s-3.png")
    ]


def test_later_sheets_are_not_written_onto_inputs(conam: Command, tmp_path: Path) -> None:
    inputs = [copy_photo(tmp_path / "s-2.png")] * (SHEET_ROWS + 1)
    code, _, err = conam("predict", MODEL, *inputs, "--output", tmp_path / "s.png")
    assert code == 2
    assert "s-2.png cannot be written: it is the input" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["[red]x[0].jpg", "[/]out.jpg", "$\\foo$.jpg", "a\x1b[31mb.jpg", "b\udcff.jpg", "日.jpg"]
)
def test_names_of_any_kind_are_shown_as_they_are(conam: Command, tmp_path: Path, name: str) -> None:
    photo = copy_photo(tmp_path / name)
    sheet = photo.with_suffix(".png")
    code, out, err = conam("predict", MODEL, photo, "--output", sheet)
    assert (code, err) == (0, "")
    assert sheet.is_file()
    assert "\x1b" not in out
    shown = name.replace("\x1b", "\\x1b").replace("\udcff", "\\xff")
    assert shown.rpartition("/")[2] in out.splitlines()[1]
    assert shown.replace(".jpg", ".png") in out
    assert conam("explain", MODEL, photo, "--output", sheet)[0] == 0


def test_long_names_are_shortened_in_figures() -> None:
    assert caption("a" * 40 + "z" * 40, 11) == "aaaaa…zzzzz"
    assert caption("$x$") == r"\$x\$"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: os.mkfifo(path), "is a pipe, a device or a socket"),
        (lambda path: path.symlink_to(path), "its links lead in a circle"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a device or a socket"),
        (lambda path: path.symlink_to("nowhere"), "There is no image file"),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(conam: Command, tmp_path: Path, make, sentence: str) -> None:
    make(tmp_path / "in.png")
    code, _, err = conam("predict", MODEL, tmp_path / "in.png")
    assert (code, err.count("\n")) == (2, 1)
    assert sentence in err


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("~nobody-at-all/x.png", "home folder that does not exist"),
        ("x" * 300 + ".png", "the name is too long"),
        ("x/" * 3000 + "a.png", "the name is too long"),
    ],
)
def test_paths_that_cannot_be_are_refused(conam: Command, path: str, sentence: str) -> None:
    code, _, err = conam("predict", MODEL, path)
    assert (code, err.count("\n")) == (2, 1)
    assert sentence in err


def test_the_sheet_of_one_picture_has_its_colour_bar_s_label_in_full(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from conam_zoo.visualize.plots import draw_map, draw_scale

    figure = Figure(figsize=(6, 2.75), layout="constrained")
    axes = figure.subplots()
    confidence = np.full((4, 4), 1 / 16, np.float32)
    bar = draw_scale(figure, draw_map(axes, np.zeros((8, 8, 3), np.uint8), confidence, 2.0), [axes], [confidence])
    assert bar.ax.get_ylabel() == "confidence as a multiple of\nthe even share, 1/16 (line)"
    figure.canvas.draw()
    label = bar.ax.yaxis.label.get_window_extent()
    assert label.y0 >= 0
    assert label.y1 <= figure.bbox.height


@pytest.mark.parametrize(("command", "output"), [("predict", "a.png"), ("explain", "a.png"), ("features", "a.npz")])
def test_a_dark_picture_is_told(conam: Command, tmp_path: Path, command: str, output: str) -> None:
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(tmp_path / "dark.png")
    code, _, err = conam(command, MODEL, tmp_path / "dark.png", "--output", tmp_path / output)
    assert code == 0
    assert "if it holds 12 bits, multiply it by 16" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("count", "terminal", "shown"), [(20, True, True), (19, True, False), (20, False, False)])
def test_a_progress_bar_is_shown_on_a_terminal_from_twenty_pictures_on(
    conam: Command, monkeypatch: pytest.MonkeyPatch, count: int, terminal: bool, shown: bool
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = conam("predict", MODEL, *[PHOTOS / "dog.jpg"] * count)
    assert code == 0
    assert ("reading pictures" in err) == shown


def test_a_new_head_has_no_names_of_the_old_one() -> None:
    assert class_names(timm.create_model(MODEL, num_classes=3, device="meta")) == ["class 0", "class 1", "class 2"]
    assert class_names(timm.create_model(MODEL, device="meta"))[:2] == ["airplane", "automobile"]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_what_is_seen_has_the_size_of_the_net_in_every_crop_mode(mode: str) -> None:
    model = timm.create_model(MODEL, device="meta", pretrained_cfg_overlay={"crop_mode": mode})
    assert split_transform(model)[0](Image.new("RGB", (90, 30))).size == (32, 32)
