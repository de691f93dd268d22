"""The ONNX files beside published weights: made and measured when they are published, and kept on the Hub alone."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from conam_zoo.datasets import DATASETS
from conam_zoo.deploy.export import calibration_images, export
from conam_zoo.deploy.runtime import open_classifier
from conam_zoo.errors import UserError
from conam_zoo.models.registry import open_model
from conam_zoo.training.evaluate import evaluate
from conam_zoo.weights import ONNX_FILES, OnnxFile, WeightEntry

__all__ = ["make_onnx", "write_onnx"]

TOLERANCE_PERCENT = 0.05  # that float32 in another order of additions may change of top-1


def write_onnx(entry: WeightEntry, weights: Path, data: str | Path, folder: Path) -> Iterator[Path]:
    """Export weights to ``ONNX_FILES`` below a folder, one after the other; see ``make_onnx``."""
    model = open_model(f"local-dir:{weights}")
    facts = {"name": entry.name, "sha256": entry.sha256, "top1_percent": entry.metrics.top1_percent}
    images = calibration_images(model, data, entry.dataset)
    for path, calibration in zip(ONNX_FILES, (None, images), strict=True):
        yield export(model, folder / path, calibration=calibration, facts=facts).path


def make_onnx(entry: WeightEntry, weights: Path, data: str | Path) -> dict[str, tuple[OnnxFile, bytes]]:
    """Export weights to ``ONNX_FILES``, and measure each file on the whole test split.

    Args:
        entry: What the manifest says of the weights.
        weights: Their folder.
        data: Their data set, or a folder of data sets by name: training images calibrate int8, test images measure.

    Returns:
        For each file what the manifest is to say of it, and its content.

    Raises:
        UserError: If the packages of the extra ``onnx`` are missing, the images are others than those of the entry's
            figures, or a file does not compute what the net does.
    """
    stated, images = entry.metrics.top1_percent, DATASETS[entry.dataset].test_images
    made: dict[str, tuple[OnnxFile, bytes]] = {}
    with TemporaryDirectory(prefix="conam-onnx-") as scratch:
        for path, file in zip(ONNX_FILES, write_onnx(entry, weights, data, Path(scratch)), strict=True):
            done = evaluate(open_classifier(str(file)), data, entry.dataset, part="test")
            top1 = done.scores.top1_percent
            if len(done.split) != images or (not made and abs(top1 - stated) > TOLERANCE_PERCENT):
                raise UserError(
                    f"The float32 ONNX file of {entry.name} has {top1:.2f} % of {len(done.split):,} test images right, "
                    f"but the manifest says {stated:.2f} % of {images:,}: give the whole {entry.dataset} as data."
                )
            content = file.read_bytes()
            made[path] = OnnxFile(hashlib.sha256(content).hexdigest(), len(content), round(top1, 4)), content
    return made
