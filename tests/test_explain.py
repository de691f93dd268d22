"""Explaining a classification: the arrays say what the net does, and the pictures and the command follow them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import CHECKOUT
from PIL import Image, ImageFilter
from timm.data import create_transform, resolve_model_data_config

import conam_zoo  # noqa: F401 (registers the models)
import experiments  # noqa: F401 (registers the forms of ConAM)
from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import open_model
from conam_zoo.visualize.explain import explain
from conam_zoo.visualize.plots import draw_explanations, draw_map, draw_scale, relative
from conam_zoo.visualize.predict import pictures_in

PHOTOS = CHECKOUT / "examples" / "photos"
NAMES = ["bird.jpg", "cat.jpg", "deer.jpg", "dog.jpg", "horse.jpg", "truck.jpg"]
Conam = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> StagedClassifier:
    return open_model("resnet20_conam.cifar10")


def test_the_arrays_say_what_the_net_does(model: StagedClassifier) -> None:
    (one,) = explain(model, [PHOTOS / "dog.jpg"])
    assert one.image.shape == np.asarray(Image.open(PHOTOS / "dog.jpg")).shape
    assert one.seen.shape == (32, 32, 3)
    assert one.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert one.top[0][0] == one.classes[one.predicted] == "dog"
    assert [value for _, value in one.top] == sorted(one.probabilities, reverse=True)[:5]
    assert [site.site for site in one.sites] == ["layer1.0.attn", "layer2.0.attn", "layer3.0.attn"]
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        logits = model(transform(Image.open(PHOTOS / "dog.jpg").convert("RGB"))[None])
    np.testing.assert_allclose(one.probabilities, logits.softmax(1)[0].numpy(), rtol=1e-4, atol=1e-6)
    last = one.sites[-1]
    assert last.confidence.sum() == pytest.approx(1, abs=1e-5)
    assert last.most is not None
    assert last.least is not None
    assert last.confidence[last.most.row, last.most.column] == last.confidence.max()
    assert last.confidence[last.least.row, last.least.column] == last.confidence.min()


def test_only_the_patch_is_blurred_and_the_net_is_asked_again(model: StagedClassifier) -> None:
    (one,) = explain(model, [PHOTOS / "dog.jpg"])
    effect = one.sites[-1].most
    assert effect is not None
    rows, columns = (slice(8 * index, 8 * index + 8) for index in (effect.row, effect.column))
    smooth = np.asarray(Image.fromarray(one.seen).filter(ImageFilter.GaussianBlur(4)))
    expected = one.seen.copy()
    expected[rows, columns] = smooth[rows, columns]
    np.testing.assert_array_equal(effect.blurred, expected)
    assert (effect.blurred != one.seen).any()
    mean, std = (np.array(model.pretrained_cfg[key], dtype=np.float32) for key in ("mean", "std"))
    x = torch.from_numpy((expected / 255 - mean) / std).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(effect.probabilities, model(x).softmax(1)[0].numpy(), rtol=1e-3, atol=1e-6)


def test_patches_that_do_not_divide_the_map_are_blurred_and_drawn_where_they_are() -> None:
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    model = timm.create_model("resnet20_conam", patch_sizes=(12, 8, 4)).eval()
    with torch.no_grad():
        model.layer1[0].attn.fc1.weight.mul_(30)  # so that patches differ
    (one,) = explain(model, [PHOTOS / "dog.jpg"])
    site = one.sites[0]
    assert (site.confidence.shape, site.patch) == ((3, 3), (12 / 32, 12 / 32))
    assert site.most is not None
    assert site.least is not None
    for effect in (site.most, site.least):
        changed = np.argwhere((effect.blurred != one.seen).any(2))
        starts = np.array([12 * effect.row, 12 * effect.column])
        assert (changed.min(0) == starts).all()
        assert (changed.max(0) == np.minimum(starts + 12, 32) - 1).all()
    axes = Figure().subplots()
    draw_map(axes, one.seen, site.confidence, 2.0, site.patch)
    assert axes.texts[0].get_position() == (5.5, 5.5)
    assert axes.texts[-1].get_position() == (27.5, 27.5)


def test_an_even_map_has_no_most_confident_patch() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet20_conam").eval()
    with torch.no_grad():
        model.layer2[0].attn.fc2.weight.zero_()  # every patch embeds alike
    (one,) = explain(model, [PHOTOS / "dog.jpg"])
    np.testing.assert_allclose(one.sites[1].confidence, 1 / 16)
    assert one.sites[1].most is None
    assert one.sites[1].least is None


def test_sites_can_be_chosen_and_every_block_has_one() -> None:
    model = timm.create_model("resnet20_conam", attn_placement="block").eval()
    assert len(explain(model, [PHOTOS / "dog.jpg"])[0].sites) == 9
    (one,) = explain(model, [PHOTOS / "dog.jpg"], sites=["layer2.1", "layer3.0.attn"])
    assert [site.site for site in one.sites] == ["layer2.1.attn", "layer3.0.attn"]
    with pytest.raises(UserError, match=r"There is no ConAM at 'layer9': the net has layer1.0.attn, "):
        explain(model, [PHOTOS / "dog.jpg"], sites=["layer9"])


def test_a_form_of_conam_is_explained_and_another_attention_is_refused() -> None:
    form = timm.create_model("resnet20_conam", attn_layer="conam_variant", attn_args={"gate": "sigmoid", "heads": 2})
    (one,) = explain(form.eval(), [PHOTOS / "dog.jpg"])
    assert [site.confidence.shape for site in one.sites] == [(4, 4)] * 3
    with pytest.raises(UserError, match="attn_layer 'se' has no confidence maps"):
        explain(timm.create_model("resnet20_conam", attn_layer="se").eval(), [PHOTOS / "dog.jpg"])


def test_the_document_s_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "conam.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert names["plain"].attention_arguments()["attn_layer"] == "none"
    assert names["every_block"].attention_arguments()["attn_placement"] == "block"
    assert names["explanation"].probabilities.shape == names["explanation"].sites[-1].most.probabilities.shape == (10,)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    assert [path.name for path in pictures_in(PHOTOS)] == NAMES
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"holds no pictures"):
        pictures_in(tmp_path)


@pytest.mark.slow
def test_the_drawings_grow_with_the_pictures(model: StagedClassifier, tmp_path: Path) -> None:
    explanations = explain(model, [PHOTOS / "dog.jpg", PHOTOS / "bird.jpg"])
    sizes = {}
    for name, some, contact in (
        ("one", explanations[:1], False),
        ("two", explanations, False),
        ("s", explanations, True),
    ):
        draw_explanations(some, tmp_path / f"{name}.png", "title", contact_sheet=contact)
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes[name] = image.size
    assert sizes["two"][0] == sizes["one"][0]
    assert sizes["two"][1] > 1.7 * sizes["one"][1]
    assert sizes["s"][1] < 0.7 * sizes["two"][1]
    with pytest.raises(UserError, match="150 pictures are too many"):
        draw_explanations(explanations[:1] * 150, tmp_path / "many.png", "title")
    with pytest.raises(UserError, match=r"has to end in \.png"):
        draw_explanations(explanations, tmp_path / "sheet.jpg", "title")


def test_a_map_is_drawn_with_its_numbers_and_the_even_share_in_the_middle_of_the_colours() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    confidence = np.array([[0.125, 0.25], [0.5, 0.125]], dtype=np.float32)
    overlay = draw_map(axes, np.zeros((8, 8, 3), np.uint8), confidence, largest=2.0)
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
        ("12.5", (1.5, 1.5)),
        ("25.0", (5.5, 1.5)),
        ("50.0", (1.5, 5.5)),
        ("12.5", (5.5, 5.5)),
    ]
    np.testing.assert_allclose(overlay.norm(overlay.get_array()), [[0.25, 0.5], [1.0, 0.25]])


def test_a_map_of_gates_has_its_mean_in_the_middle_of_the_colours() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    gates = np.array([[0.25, 0.5], [1.0, 0.25]], dtype=np.float32)  # their mean is 0.5
    overlay = draw_map(axes, np.zeros((8, 8, 3), np.uint8), gates, largest=2.0)
    np.testing.assert_allclose(overlay.norm(overlay.get_array()), [[0.25, 0.5], [1.0, 0.25]])
    assert draw_scale(figure, overlay, [axes], [gates]).ax.get_ylabel() == "gate as a multiple of its map's mean (line)"
    label = draw_scale(figure, overlay, [axes], [gates / 2]).ax.get_ylabel()
    assert label == "confidence as a multiple of the even share, 1/4 (line)"
    np.testing.assert_allclose(relative(np.array([[-1.0, 1.0]])), [[-2.0, 2.0]])  # a gate about zero


def test_the_command_writes_a_picture_and_json(conam: Conam, tmp_path: Path) -> None:
    output, facts = tmp_path / "dog.png", tmp_path / "dog.json"
    arguments = ["explain", "resnet20_conam.cifar10", PHOTOS / "dog.jpg", "--output", output, "--site", "layer3.0"]
    code, out, _ = conam(*arguments, "--json", facts)
    assert code == 0
    assert out.startswith("dog.jpg: dog ")
    assert "with the most confident patch of layer3.0 blurred" in out
    with Image.open(output) as image:
        assert min(image.size) > 500
    (row,) = json.loads(facts.read_text())
    assert row["top"][0]["class"] == "dog"
    (site,) = row["sites"]
    assert np.sum(site["confidence"]) == pytest.approx(1, abs=1e-5)
    assert 0 <= site["most"]["probability_after"] <= 1


@pytest.mark.slow
def test_a_folder_becomes_a_contact_sheet(conam: Conam, tmp_path: Path) -> None:
    code, out, _ = conam("explain", "resnet20_conam.cifar10", PHOTOS, "--output", tmp_path / "sheet.png")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == [*NAMES, "written"]
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height > 1.1 * image.width


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([PHOTOS, PHOTOS / "dog.jpg"], "A folder is explained alone"),
        (["nothing.png"], "no image file nothing.png"),
        ([PHOTOS / "dog.jpg", "--site", "layer4"], "There is no ConAM at 'layer4'"),
    ],
)
def test_bad_input_gives_one_sentence(conam: Conam, tmp_path: Path, arguments: list, sentence: str) -> None:
    code, _, err = conam("explain", "resnet20_conam.cifar10", *arguments, "--output", tmp_path / "x.png")
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_is_named_twice_is_shown_once(conam: Conam, tmp_path: Path) -> None:
    sites = ["--site", "layer3.0", "--site", "layer3.0.attn"]
    code, _, err = conam(
        "explain", "resnet20_conam.cifar10", PHOTOS / "dog.jpg", *sites, "--output", tmp_path / "x.png"
    )
    assert code == 0, err
