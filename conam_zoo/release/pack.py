"""From a finished run to shippable weights: the folder that mirrors the Hub repository, and the manifest entry."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from conam_zoo.data import ImageSplit, read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.models import StagedClassifier
from conam_zoo.models.export import export_model
from conam_zoo.models.registry import count_params_and_macs, open_model
from conam_zoo.release.card import model_card
from conam_zoo.training.engine import Scores
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.recipe import list_recipes, load_recipe, recipe_from_dict
from conam_zoo.weights import Metrics, WeightEntry, dump_manifest, find_checkout, load_manifest
from conam_zoo.weights.folder import weights_file

__all__ = ["pack"]

LICENCE = "Apache-2.0"
HALF_PRECISION_TOLERANCE = 0.02  # points of top-1 that storing float16 may change
MAX_SHARD_BYTES = 15 * 2**20  # of tensors in one file; its header comes on top, and no file may have more than 16 MiB


def pack(run: Path, data: str | Path, checkout: Path | None = None) -> WeightEntry:
    """Turn a run into ``weights/<name.tag>/`` and an entry of ``weights_manifest.json``.

    The weights are stored as float16 if their top-1 stays within 0.02 points, else as float32. The metrics of the
    entry are those of the stored file, read back. Existing weights of that name are replaced as a whole, the manifest
    last; if it cannot be written, they come back.

    Args:
        run: A finished run folder.
        data: Where the data set is; its test split is evaluated.
        checkout: The checkout to write to; the one this package runs from if None.

    Raises:
        UserError: If the run is unfinished, was a choosing run (``holdout``), was trained with other settings than the
            packaged recipe of its name (the seed may differ), or has no checkout to go to.
    """
    checkout = checkout or find_checkout()
    if checkout is None:
        raise UserError("Weights are packed into a checkout of conam_zoo: run from one.")
    record_path = run / "run.json"
    if not record_path.is_file():
        raise UserError(f"{run} is not a finished run: it has no run.json.")
    record = json.loads(record_path.read_text())
    recipe = recipe_from_dict(record["recipe"], str(record_path)).to_dict()
    if recipe["holdout"]:
        raise UserError(f"{run} held out {recipe['holdout']} training images: pack a run that trained on all of them.")
    name = f"{recipe['model']}.{recipe['dataset']}"
    recipe_name = _packaged_name(recipe, name, run)
    split = read_split(data, "test", recipe["dataset"])

    with tempfile.TemporaryDirectory(dir=checkout, prefix=".packing-") as scratch:
        folder = Path(scratch) / name
        source = open_model(f"local-dir:{run / 'final'}")
        exact = evaluate_on(source, split)
        dtype, scores, sha256 = _store(source, folder, recipe["dataset"], split, exact)
        file = weights_file(json.loads((folder / "config.json").read_text()), folder)
        params, macs = count_params_and_macs(name, **recipe["model_args"])
        facts = DATASETS[recipe["dataset"]]
        entry = WeightEntry(
            name=name,
            repository=name,
            revision=None,
            file=file,
            sha256=sha256,
            size_bytes=(folder / file).stat().st_size,
            dtype=str(dtype).removeprefix("torch."),
            params=params,
            macs=macs,
            model_args=recipe["model_args"],
            dataset=recipe["dataset"],
            num_classes=len(facts.classes),
            classes=facts.classes,
            input_size=facts.input_size,
            mean=facts.mean,
            std=facts.std,
            metrics=Metrics(**{key: round(value, 4) for key, value in asdict(scores).items()}),
            recipe=recipe_name,
            teacher=recipe["teacher"] or None,
            seed=recipe["seed"],
            epochs=recipe["epochs"],
            hardware=record["hardware"],
            train_minutes=round(record["train_minutes"], 1),
            library_versions=record["library_versions"],
            licence=LICENCE,
        )
        for extra in ("log.csv", "curves.png"):
            shutil.copyfile(run / extra, folder / extra)
        manifest_path = checkout / "weights_manifest.json"
        manifest = load_manifest(manifest_path)
        write_text(folder / "README.md", model_card(entry, manifest))
        destination = checkout / "weights" / name
        updated = replace(manifest, entries={**manifest.entries, name: entry})
        _exchange(folder, destination, Path(scratch) / "former", lambda: dump_manifest(updated, manifest_path))
    return entry


def _exchange(new: Path, destination: Path, former: Path, confirm: Callable[[], None]) -> None:
    """Put a folder into its place and confirm that; if the confirmation fails, what was there comes back."""
    destination.parent.mkdir(exist_ok=True)
    had_former = destination.exists()
    if had_former:
        destination.replace(former)
    try:
        new.replace(destination)
        confirm()
    except BaseException:
        if destination.exists():
            destination.replace(new)
        if had_former:
            former.replace(destination)
        raise


def _packaged_name(recipe: dict[str, Any], name: str, run: Path) -> str:
    """Name of the packaged recipe that the settings of a run are those of: ``name``, or ``name`` with a suffix."""
    changed: list[str] = []
    for candidate in list_recipes():
        if candidate == name or candidate.startswith(f"{name}."):
            packaged = load_recipe(candidate).to_dict()
            differ = sorted(key for key, value in packaged.items() if key != "seed" and recipe[key] != value)
            if not differ:
                return candidate
            changed = differ if candidate == name else changed
    raise UserError(
        f"{run} was trained with other settings than the recipe {name} ({', '.join(changed)} differ): "
        "change the recipe first, so that its command gives these weights."
    )


def _store(
    source: StagedClassifier, folder: Path, tag: str, split: ImageSplit, exact: Scores
) -> tuple[torch.dtype, Scores, str]:
    """Write the folder in half precision if that is good enough, else in full; with the scores of what was written."""
    for dtype in (torch.float16, torch.float32):
        shutil.rmtree(folder, ignore_errors=True)  # the shards of a first try
        sha256 = export_model(source, folder, tag=tag, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
        stored = open_model(f"local-dir:{folder}")
        scores = evaluate_on(stored, split)
        close = abs(scores.top1_percent - exact.top1_percent) <= HALF_PRECISION_TOLERANCE
        if close and math.isfinite(scores.nll):  # overflown weights may hit the right classes by chance
            return dtype, scores, sha256
    raise UserError(f"{folder.name} scores otherwise when it is read back: nothing was packed.")
