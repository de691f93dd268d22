"""Whether the shipped files reach the published accuracies, evaluated again on all test images."""

from pathlib import Path

import torch

from conam_zoo.data import read_split
from conam_zoo.errors import UserError
from conam_zoo.models.registry import open_model
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.weights import load_manifest

TOLERANCES = {"top1_percent": 0.02, "top5_percent": 0.02, "nll": 1e-3, "ece": 1e-3}


def check_shipped(name: str, data: str | Path) -> None:
    """Evaluate weights of the manifest on all test images; a figure that is not the manifest's is refused.

    ``data`` is a folder with all the data sets. ``TOLERANCES`` says how far a figure may be off.
    """
    entry = load_manifest().entry(name)
    model = open_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
    scores = evaluate_on(model, read_split(data, "test", entry.dataset))
    for figure, tolerance in TOLERANCES.items():
        measured, published = getattr(scores, figure), getattr(entry.metrics, figure)
        if abs(measured - published) > tolerance:
            raise UserError(f"{name} has a {figure} of {measured:.4f} here, but its manifest says {published}.")
