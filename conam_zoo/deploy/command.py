"""Exporting by name: what ``conam export`` does, and opening what it wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from conam_zoo.data import read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.deploy.export import EXPORT_OPSET, export
from conam_zoo.deploy.runtime import OnnxClassifier
from conam_zoo.errors import UserError
from conam_zoo.inputs import expand_path, refuse_overwriting
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import open_model, weights_sha256
from conam_zoo.training.evaluate import evaluate
from conam_zoo.weights import load_manifest

__all__ = ["calibration_images", "export_named", "open_classifier"]

CALIBRATION_IMAGES = 500


def open_classifier(name: str) -> StagedClassifier:
    """A model by name, ``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``, or path of an exported ``.onnx`` file.

    Raises:
        UserError: If there is no such model, or the file is not one.
        WeightsError: If no verified weights can be had.
    """
    if ":" not in name and name.lower().endswith(".onnx"):
        return _stand_in(OnnxClassifier(name).eval())
    return open_model(name)


def _stand_in(classifier: nn.Module) -> StagedClassifier:
    """An exported file in place of a net, for callers that ask for logits and configuration alone."""
    return cast(StagedClassifier, classifier)


def export_named(
    name: str,
    output: Path,
    *,
    data: str | Path | None = None,
    int8: bool = False,
    pixels: bool = False,
    confidence: bool = False,
    opset: int = EXPORT_OPSET,
) -> Iterator[str]:
    """Export a model as ``conam_zoo.deploy.export.export`` does, and say in a few lines what came of it.

    Args:
        name: The model: its name, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
        output: The file, ``.onnx`` or ``.pt2``.
        data: With ``int8``: training images for the calibration, and test images for top-1 before and after.
        int8: Quantise to int8.
        pixels: Take raw pixels.
        confidence: Give the confidences as well.
        opset: ONNX operator set.

    Yields:
        Lines for a person.

    Raises:
        UserError: If something does not fit; nothing is written then.
        WeightsError: If no verified weights can be had.
    """
    if int8 and data is None:
        raise UserError("--int8 is calibrated on training images: say where they are with --data.")
    if data is not None and not int8:
        raise UserError("--data is for the calibration of --int8: add --int8, or leave --data out.")
    kind, _, place = name.partition(":")
    folder = expand_path(place if kind == "local-dir" else "")
    weights = [folder / "config.json", *folder.glob("*.safetensors*")] if kind == "local-dir" else []
    refuse_overwriting([expand_path(output)], [*weights, *([expand_path(data)] if data else [])])
    model = open_model(name)
    dataset = _dataset(model)
    calibration = calibration_images(model, data, dataset) if data is not None else None
    done = export(
        model,
        output,
        pixels=pixels,
        confidence=confidence,
        opset=opset,
        calibration=calibration,
        facts=_facts(name, model),
    )
    yield f"written: {done.path}, {done.size_bytes:,} bytes"
    yield f"input: {done.inputs}; outputs: {', '.join(done.outputs)}"
    if calibration is None:
        yield f"checked: at most {done.largest_difference:.1e} from PyTorch's outputs on batches of 1 and 7"
        return
    yield f"calibrated on {len(calibration):,} images; logits within {done.largest_difference:.2f} of the net's"
    assert data is not None
    try:
        before = evaluate(model, data, dataset)
    except UserError as error:
        yield f"top-1 not measured: {error}"
        return
    after = evaluate(open_classifier(str(output)), data, dataset)
    yield (
        f"top-1 on {len(before.split):,} {before.part} images: {before.scores.top1_percent:.2f} % before, "
        f"{after.scores.top1_percent:.2f} % in int8"
    )


def _dataset(model: StagedClassifier) -> str | None:
    """The published data set whose classes a model has, or None."""
    names = tuple(model.pretrained_cfg.get("label_names") or ())
    return next((facts.name for facts in DATASETS.values() if facts.classes == names), None)


def calibration_images(model: StagedClassifier, data: str | Path, dataset: str | None) -> Tensor:
    """Training images, the same ones each time: uint8 (N, H, W, 3)."""
    size = model.pretrained_cfg["input_size"][1]
    images = read_split(data, "train", dataset, image_size=None if dataset else size).images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return images[chosen]


def _facts(name: str, model: StagedClassifier) -> dict[str, Any]:
    """Where the weights came from, for the file's metadata."""
    cfg = model.pretrained_cfg
    facts: dict[str, Any] = {"name": cfg["architecture"] if name.startswith("local-dir:") else name}
    if sha256 := weights_sha256(name):
        facts["sha256"] = sha256
    entry = load_manifest().entries.get(f"{cfg['architecture']}.{cfg.get('tag')}")
    if ":" in name or entry is None:
        return facts
    return facts | {"name": entry.name, "top1_percent": entry.metrics.top1_percent}
