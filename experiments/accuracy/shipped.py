"""Are the published accuracies those of the shipped files? Evaluated again, and recorded for a short test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from conam_zoo.data import read_split
from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.models.registry import open_model
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.weights import load_manifest

__all__ = ["FIRST", "check_shipped", "record_shipped"]

FIRST = 1000  # test images, for the short test
TOLERANCES = {"top1_percent": 0.02, "top5_percent": 0.02, "nll": 1e-3, "ece": 1e-3}


def check_shipped(
    names: Sequence[str], data: str | Path, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """Evaluate shipped weights on all test images, and count the right answers among the first ``FIRST``.

    Args:
        names: Weights of the manifest.
        data: A folder with all the data sets.
        progress: Told what is being evaluated.

    Returns:
        For each name the ``sha256`` of the file that was evaluated, ``first_images``, and of those ``correct`` and
        ``nll``.

    Raises:
        UserError: If a figure is not that of the manifest.
    """
    found = {}
    for name in names:
        progress(name)
        entry = load_manifest().entry(name)
        model = open_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
        split = read_split(data, "test", entry.dataset)
        scores = evaluate_on(model, split)
        for figure, tolerance in TOLERANCES.items():
            measured, published = getattr(scores, figure), getattr(entry.metrics, figure)
            if abs(measured - published) > tolerance:
                raise UserError(f"{name} has a {figure} of {measured:.4f} here, but its manifest says {published}.")
        first = evaluate_on(model, split.select(torch.arange(FIRST)))
        correct = round(first.top1_percent / 100 * FIRST)
        found[name] = {"sha256": entry.sha256, "first_images": FIRST, "correct": correct, "nll": round(first.nll, 5)}
    return found


def record_shipped(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Put what ``check_shipped`` found into a JSON file; weights that are no longer shipped leave it."""
    shipped = load_manifest().entries
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {name: facts for name, facts in sorted((earlier | found).items()) if name in shipped}
    write_text(path, json.dumps(kept, indent=2) + "\n")
