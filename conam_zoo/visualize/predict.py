"""Classifying picture files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms import Compose

from conam_zoo.data.images import read_image
from conam_zoo.layers.confidence import confidence_maps
from conam_zoo.models import StagedClassifier

__all__ = ["Prediction", "class_names", "percent", "predict", "split_transform"]


@dataclass(frozen=True)
class Prediction:
    """What a net says of one picture.

    Attributes:
        path: The file.
        image: The picture, upright and RGB, in its own size.
        seen: What the net was shown: the picture after resizing, before normalisation.
        probabilities: Of every class, (classes,).
        top: Class names with probabilities, best first, at most five.
        maps: For each ConAM site the confidence map, (rows, columns).
    """

    path: Path
    image: Image.Image
    seen: Image.Image
    probabilities: Tensor
    top: list[tuple[str, float]]
    maps: dict[str, Tensor]


def percent(probability: float) -> str:
    """A probability for people: one decimal, without calling anything certain or impossible."""
    if probability < 0.0005:
        return "<0.1%"
    return ">99.9%" if probability >= 0.9995 else f"{probability:.1%}"


def class_names(model: StagedClassifier) -> list[str]:
    """Names of the classes in the order of the logits, from the model's configuration."""
    return list(model.pretrained_cfg.get("label_names") or [f"class {index}" for index in range(model.num_classes)])


def split_transform(model: StagedClassifier) -> tuple[Compose, Compose]:
    """The model's evaluation transform in two halves: picture to picture seen, and that to a normalised tensor."""
    steps = create_transform(**resolve_model_data_config(model)).transforms
    resizes = [type(step).__name__ in ("Resize", "CenterCrop") for step in steps]
    last = max((index + 1 for index, resize in enumerate(resizes) if resize), default=0)
    return Compose(steps[:last]), Compose(steps[last:])


def predict(model: StagedClassifier, paths: list[Path]) -> list[Prediction]:
    """Classify picture files, resized as the model's configuration says.

    Args:
        model: A classifier in evaluation mode, made by timm.
        paths: Picture files of any size, mode and format that Pillow reads.

    Raises:
        UserError: If a file cannot be read; nothing is classified then.
    """
    images = [read_image(path) for path in paths]
    resize, normalize = split_transform(model)
    names = class_names(model)
    device = next(model.parameters()).device
    predictions = []
    for path, image in zip(paths, images, strict=True):
        seen = resize(image)
        logits, maps = confidence_maps(model, normalize(seen).unsqueeze(0).to(device))
        probabilities = logits.float().softmax(1)[0].cpu()
        best = torch.topk(probabilities, min(5, model.num_classes))
        top = [(names[index], float(p)) for index, p in zip(best.indices.tolist(), best.values, strict=True)]
        sites = {site: m[0].cpu() for site, m in maps.items()}
        predictions.append(Prediction(path, image, seen, probabilities, top, sites))
    return predictions
