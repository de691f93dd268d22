"""The confidence-map picture that goes with a model card."""

from pathlib import Path

import timm
from conftest import CHECKOUT
from PIL import Image

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.models.registry import export_model
from conam_zoo.visualize.plots import draw_card_picture


def test_the_picture_lies_beside_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "resnet20_conam.cifar10"
    export_model(timm.create_model("resnet20_conam"), folder, tag="cifar10")
    picture = draw_card_picture(folder, CHECKOUT / "examples" / "photos")
    assert picture == folder / "confidence.png"
    with Image.open(picture) as image:
        assert min(image.size) > 300
