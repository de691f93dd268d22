"""What is measured of weights beyond their scores, and recorded with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conam_zoo.data import ImageSplit, normalize, read_split
from conam_zoo.errors import UserError
from conam_zoo.layers.confidence import liveness
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import open_model
from conam_zoo.release.exchange import packing
from conam_zoo.training.engine import predict_logits, score
from conam_zoo.training.train import MONITORED_IMAGES
from conam_zoo.weights import dump_manifest, find_checkout, load_manifest

__all__ = ["measure", "remeasure"]

FIRST_IMAGES = 1000


def measure(model: StagedClassifier, training: ImageSplit, test: ImageSplit) -> dict[str, Any]:
    """The fields of a manifest entry that are not scores.

    Args:
        model: The net, as it was stored.
        training: The training images; liveness is measured on those that a training watches, too.
        test: The test images; the first 1,000 are answered.

    Returns:
        ``liveness``, rounded to six digits; ``correct_of_first_1000`` and ``nll_of_first_1000``, None where there are
        fewer test images.
    """
    cfg = model.pretrained_cfg
    watched = normalize(training.spread(MONITORED_IMAGES).images, cfg["mean"], cfg["std"])
    alive = {site: round(value, 6) for site, value in liveness(model, watched).items()}
    correct, nll = None, None
    if len(test) >= FIRST_IMAGES:
        logits = predict_logits(model, test.images[:FIRST_IMAGES], cfg["mean"], cfg["std"])
        labels = test.labels[:FIRST_IMAGES]
        correct = int(torch.sum(logits.argmax(dim=1) == labels))
        nll = round(score(logits, labels).nll, 5)
    return {"liveness": alive, "correct_of_first_1000": correct, "nll_of_first_1000": nll}


def remeasure(data: Path, names: list[str] | None = None, checkout: Path | None = None) -> dict[str, dict[str, Any]]:
    """Measure weights of the manifest again and write the values into it.

    Args:
        data: A data set, or a folder of data sets by name.
        names: Which weights; all if None.
        checkout: The checkout whose manifest is written; the one this package runs from if None.

    Returns:
        What was measured, by name.

    Raises:
        UserError: If there is no checkout, or the data cannot be read.
        ManifestError: If the manifest has no such weights.
        WeightsError: If no verified weights can be had.
    """
    checkout = checkout or find_checkout()
    if checkout is None:
        raise UserError("Weights are measured for a checkout's manifest: run from a checkout of conam_zoo.")
    path = checkout / "weights_manifest.json"
    manifest = load_manifest(path)
    measured: dict[str, dict[str, Any]] = {}
    for name in names or sorted(manifest.entries):
        dataset = manifest.entry(name).dataset
        where = data / dataset if (data / dataset).is_dir() else data
        training, test = (read_split(where, split, dataset) for split in ("train", "test"))
        measured[name] = measure(open_model(f"local-dir:{checkout / 'weights' / name}"), training, test)
    with packing(checkout):
        manifest = load_manifest(path)
        entries = {n: replace(e, **measured.get(n, {})) for n, e in manifest.entries.items()}
        dump_manifest(replace(manifest, entries=entries), path)
    return measured
