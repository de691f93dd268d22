"""Classifying picture files."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from conam_zoo.analysis.confidence import confidence_maps
from conam_zoo.images import read_image
from conam_zoo.models import StagedClassifier

__all__ = ["Prediction", "percent", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a net says of one picture.

    Attributes:
        path: The file.
        image: The picture, upright and RGB, in its own size.
        seen: What the net was shown: the picture after resizing, before normalisation.
        top: Class names with probabilities, best first, at most five.
        maps: For each ConAM site the confidence map, (rows, columns).
    """

    path: Path
    image: Image.Image
    seen: Image.Image
    top: list[tuple[str, float]]
    maps: dict[str, Tensor]


def percent(probability: float) -> str:
    """A probability for people: one decimal, without calling anything certain or impossible."""
    if probability < 0.0005:
        return "<0.1%"
    return ">99.9%" if probability >= 0.9995 else f"{probability:.1%}"


def predict(model: StagedClassifier, paths: list[Path]) -> list[Prediction]:
    """Classify picture files, resized as the model's configuration says.

    Args:
        model: A classifier in evaluation mode, made by timm.
        paths: Picture files of any size, mode and format that Pillow reads.

    Raises:
        UserError: If a file cannot be read; nothing is classified then.
    """
    images = [read_image(path) for path in paths]
    transform = create_transform(**resolve_model_data_config(model))
    resize = [step for step in transform.transforms if type(step).__name__ in ("Resize", "CenterCrop")]
    names = model.pretrained_cfg.get("label_names") or [f"class {index}" for index in range(model.num_classes)]
    predictions = []
    for path, image in zip(paths, images, strict=True):
        seen = image
        for step in resize:
            seen = step(seen)
        logits, maps = confidence_maps(model, transform(image).unsqueeze(0))
        probabilities, classes = logits.float().softmax(1)[0].topk(min(5, model.num_classes))
        top = [(names[index], float(p)) for index, p in zip(classes.tolist(), probabilities, strict=True)]
        predictions.append(Prediction(path, image, seen, top, {site: m[0].cpu() for site, m in maps.items()}))
    return predictions
