"""Picture files through a net: classes with confidence maps, or pooled features."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms import Compose

from conam_zoo.data.images import MAX_PIXELS, NOTE, PICTURE_SUFFIXES, decode_image, read_image
from conam_zoo.errors import UserError
from conam_zoo.files import expand_path
from conam_zoo.layers.confidence import Patch, confidence_maps
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import check_takes_rgb

BATCH = 16  # pictures in a pass of the net
RESIZES = ("Resize", "CenterCrop", "ResizeKeepRatio", "CenterCropOrPad")  # timm's and torchvision's, by the crop mode
STANDARD_INPUT = Path("-")

Skip = Callable[[Path, UserError], object]  # called for a picture that cannot be read, which is left out then


@dataclass(frozen=True)
class Prediction:
    """What a net says of one picture."""

    path: Path
    image: Image.Image  # upright and RGB, in its own size unless a smaller one was asked for
    seen: Image.Image  # what the net was shown: after resizing, before normalisation
    probabilities: Tensor  # of every class, (classes,)
    top: list[tuple[str, float]]  # class names with probabilities, best first, at most five
    maps: dict[str, Tensor]  # for each ConAM site the confidence map, (rows, columns)
    patches: dict[str, Patch]  # and the size of a whole patch; those at the right and lower edge may be smaller


def edges(count: int, share: float) -> list[float]:
    """Where ``count`` patches begin and end along a side, as shares of it, if a whole one covers ``share`` of it."""
    return [min(index * share, 1.0) for index in range(count + 1)]


def percent(probability: float) -> str:
    """A probability for people: one decimal, without calling anything certain or impossible."""
    if probability < 0.0005:
        return "<0.1%"
    return ">99.9%" if probability >= 0.9995 else f"{probability:.1%}"


def class_names(model: StagedClassifier) -> list[str]:
    """Names of the classes in the order of the logits, from the model's configuration."""
    names = list(model.pretrained_cfg.get("label_names") or ())  # with a new head they are those of the old one
    return names if len(names) == model.num_classes else [f"class {index}" for index in range(model.num_classes)]


def split_transform(model: StagedClassifier, scale: int = 1) -> tuple[Compose, Compose]:
    """The model's evaluation transform in two halves: picture to picture seen, and that to a normalised tensor.

    With ``scale`` the picture seen is the same part of the picture with so many times the pixels, for people.
    """
    check_takes_rgb(model)
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    steps = create_transform(**config | {"input_size": (channels, height * scale, width * scale)}).transforms
    resizes = [type(step).__name__ in RESIZES for step in steps]
    last = max((index + 1 for index, resize in enumerate(resizes) if resize), default=0)
    return Compose(steps[:last]), Compose(steps[last:])


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder by name, without its sub-folders and hidden files; it has to hold some."""
    try:
        paths = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check its rights.") from error
    if not paths:
        raise UserError(f"The folder {folder} holds no pictures: name one that does.")
    return paths


def predict(model: StagedClassifier, paths: Iterable[str | Path]) -> list[Prediction]:
    """Classify picture files as ``predict_each`` does; ``-`` is standard input."""
    return list(predict_each(model, paths))


def predict_each(
    model: StagedClassifier,
    paths: Iterable[str | Path],
    *,
    side: int | None = None,
    skip: Skip | None = None,
    say: Callable[[str], object] | None = None,
) -> Iterator[Prediction]:
    """Classify picture files one after the other, in memory that does not grow with their number.

    The model is in evaluation mode; its configuration says how pictures, of any size and mode, are resized. ``side`` is
    the longer side, in pixels, to which ``Prediction.image`` is scaled down; None for its own size. ``say`` is called
    with what a person should know about a picture, such as that it is dark.
    """
    if model.num_classes == 0:
        raise UserError("The net has no classifier, so it names no class: 'conam features' gives what it sees.")
    resize, normalize = split_transform(model)

    def prepared() -> Iterator[tuple[Path, Image.Image, Image.Image]]:
        for path, image in _read_each(paths, skip, say):
            seen = resize(image)
            if side is not None:
                image = image.copy() if image is seen else image
                image.thumbnail((side, side))
            yield path, image, seen

    pictures = prepared()
    while batch := list(islice(pictures, BATCH)):
        yield from _predict_batch(model, batch, normalize)


def _read_each(
    paths: Iterable[str | Path], skip: Skip | None, say: Callable[[str], object] | None
) -> Iterator[tuple[Path, Image.Image]]:
    for path in map(Path, paths):
        try:
            image = _read_standard_input() if path == STANDARD_INPUT else read_image(path)
        except UserError as error:
            if skip is None:
                raise
            skip(path, error)
            continue
        if say is not None and NOTE in image.info:
            say(image.info[NOTE])
        yield path, image


def _read_standard_input() -> Image.Image:
    largest = 4 * MAX_PIXELS
    try:
        content = sys.stdin.buffer.read(largest + 1)
    except (OSError, AttributeError) as error:  # sys.stdin is None where it is closed
        raise UserError("Standard input is closed or a folder: pass a picture by a pipe or by < FILE.") from error
    if len(content) > largest:
        raise UserError(f"Standard input holds more than {largest / 1e6:,.0f} MB: pass a picture.")
    return decode_image(io.BytesIO(content), "standard input")


def _predict_batch(
    model: StagedClassifier, pictures: list[tuple[Path, Image.Image, Image.Image]], normalize: Compose
) -> Iterator[Prediction]:
    names = class_names(model)
    batch = torch.stack([normalize(seen) for _, _, seen in pictures])
    patches: dict[str, Patch] = {}
    logits, maps = confidence_maps(model, batch.to(next(model.parameters()).device), patches)
    shares = logits.float().softmax(1).cpu()
    best = torch.topk(shares, min(5, model.num_classes))
    maps = {site: each.cpu() for site, each in maps.items()}
    for index, (path, image, seen) in enumerate(pictures):
        pairs = zip(best.indices[index].tolist(), best.values[index].tolist(), strict=True)
        top = [(names[label], share) for label, share in pairs]
        sites = {site: each[index] for site, each in maps.items()}
        yield Prediction(path, image, seen, shares[index], top, sites, patches)


def expand_pictures(paths: list[Path]) -> list[Path]:
    """Folders replaced by their pictures, and home folders written out."""
    expanded: list[Path] = []
    for path in map(expand_path, paths):
        is_folder = path != STANDARD_INPUT and os.path.isdir(path)  # which raises nothing, unlike Path.is_dir
        expanded += pictures_in(path) if is_folder else [path]
    if expanded.count(STANDARD_INPUT) > 1:
        raise UserError("Standard input (-) was named twice: it can be read once.")
    return expanded


@torch.inference_mode()
def pooled_features(
    model: StagedClassifier,
    paths: Iterable[Path],
    *,
    skip: Skip | None = None,
    say: Callable[[str], object] | None = None,
) -> tuple[Tensor, list[Path]]:
    """What the classifier of a net sees of each picture, float32 (N, head_hidden_size), and the files that are read.

    For ``skip`` and ``say`` see ``predict_each``.
    """
    resize, normalize = split_transform(model)
    device = next(model.parameters()).device
    inputs = ((path, normalize(resize(image))) for path, image in _read_each(paths, skip, say))
    kept: list[Path] = []
    parts = [torch.empty(0, model.head_hidden_size)]
    while batch := list(islice(inputs, BATCH)):
        kept += [path for path, _ in batch]
        maps = model.forward_features(torch.stack([picture for _, picture in batch]).to(device))
        parts.append(model.forward_head(maps, pre_logits=True).float().cpu())
    return torch.cat(parts), kept
