"""Pooled features: the command, against the net itself, and the page that shows what they are for."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import PYTHON_BLOCK
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from conam_zoo.models.registry import export_model

NET = "resnet20_conam.cifar10"


def write_pictures(root: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [root / "cat" / "a.png", root / "cat" / "deep" / "b.jpg", root / "dog" / "c.png"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(path)
    return paths


def test_the_command_writes_what_the_head_sees(conam, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures")
    code, _, _ = conam("features", NET, tmp_path / "pictures", "--output", tmp_path / "f.npz")
    assert code == 0
    with np.load(tmp_path / "f.npz") as arrays:
        features, names = arrays["features"], arrays["names"].tolist()
    assert names == [str(path) for path in paths]
    model = timm.create_model(NET, pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        expected = torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths])
    assert (features.dtype, features.shape) == (np.float32, (3, 64))
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_classes": 0}, "The net has no classifier"),
        ({"in_chans": 1}, "The net takes images with 1 channels, but pictures are read with 3"),
    ],
)
def test_a_net_that_cannot_name_pictures_is_refused(conam, tmp_path: Path, arguments: dict, sentence: str) -> None:
    (path, *_) = write_pictures(tmp_path / "pictures")
    export_model(timm.create_model("resnet20_conam", **arguments), tmp_path / "net", tag=None)
    name, sheet = f"local-dir:{tmp_path / 'net'}", ("--output", tmp_path / "sheet.png")
    for call in (("predict", name, path), ("explain", name, path, *sheet)):
        code, _, err = conam(*call)
        assert (code, err.count("\n")) == (2, 1), err
        assert sentence in err
    assert not (tmp_path / "sheet.png").exists()


def test_a_pool_of_two_kinds_gives_twice_the_features(conam, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    export_model(timm.create_model("resnet20_conam", global_pool="catavgmax"), tmp_path / "net", tag=None)
    name = f"local-dir:{tmp_path / 'net'}"
    code, _, err = conam("features", name, tmp_path / "pictures", "--output", tmp_path / "f.NPZ")
    assert code == 0, err
    with np.load(tmp_path / "f.NPZ") as arrays:
        assert arrays["features"].shape == (3, 128)


def test_what_cannot_be_read_is_left_out_and_told(conam, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "cat" / "broken.png").write_bytes(b"x")
    code, _, err = conam("features", NET, tmp_path / "pictures", "--output", tmp_path / "f.npz")
    assert code == 1
    assert "broken.png" in err
    with np.load(tmp_path / "f.npz") as arrays:
        assert len(arrays["names"]) == 3
    for arguments, sentence in (
        ((tmp_path / "pictures", "--output", tmp_path / "f.csv"), "end in .npz"),
        ((tmp_path / "nothing.png", "--output", tmp_path / "g.npz"), "no image file"),
    ):
        code, _, err = conam("features", NET, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert sentence in err


def test_a_folder_gives_the_pictures_that_fine_tuning_would_take(conam, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    write_pictures(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "cat" / "._a.png").write_bytes(b"of a system")
    (tmp_path / "pictures" / "__MACOSX").mkdir()
    (tmp_path / "pictures" / "__MACOSX" / "b.png").write_bytes(b"of a system")
    (tmp_path / "pictures" / "folder.jpg").mkdir()
    code, _, err = conam("features", NET, tmp_path / "pictures", "--output", tmp_path / "f.npz")
    assert code == 0, err
    assert "1 folders of the system left out, such as __MACOSX" in err
    with np.load(tmp_path / "f.npz") as arrays:
        assert len(arrays["names"]) == 6


def test_the_page_runs(conam, tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    (first, *_) = write_pictures(Path("my_pictures"))
    shutil.copy(first, "my_pictures/dog/copy of a.png")
    page = (checkout / "docs" / "features.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^conam .*$", page, re.MULTILINE)
    assert conam(*command.split()[1:])[0] == 0
    blocks = PYTHON_BLOCK.findall(page)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/features.md", "exec"), {})
    out = capfd.readouterr().out
    assert f"{first} is most like my_pictures/dog/copy of a.png" in out
    assert "layer3 (2, 64, 8, 8)" in out
