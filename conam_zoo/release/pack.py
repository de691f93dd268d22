"""From a finished run to shippable weights: the folder that mirrors the Hub repository, and the manifest entry."""

import json
import math
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conam_zoo.data import ImageSplit, read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically, write_text
from conam_zoo.layers.confidence import EVEN
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import count_params_and_macs, export_model, open_model
from conam_zoo.release.card import model_card
from conam_zoo.release.documents import generated_files
from conam_zoo.release.exchange import exchange, packing, scratch_folder
from conam_zoo.release.finished_run import open_final, read_finished
from conam_zoo.release.measure import measure
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.recipe import list_recipes, load_recipe
from conam_zoo.weights import Metrics, WeightEntry, dump_manifest, find_checkout, load_manifest
from conam_zoo.weights.folder import weights_file

__all__ = ["pack"]

LICENCE = "Apache-2.0"
HALF_PRECISION_TOLERANCE = 0.02  # points of top-1 that storing float16 may change
MAX_TOTAL_BYTES = 96 * 2**20  # of the whole folder weights/
MAX_SHARD_BYTES = 15 * 2**20  # of tensors in one file; its header comes on top, and no file may have more than 16 MiB


def pack(run: Path, data: str | Path, checkout: Path | None = None, *, allow_even_sites: bool = False) -> WeightEntry:
    """Turn a run into ``weights/<name.tag>/`` and an entry of ``weights_manifest.json``.

    The weights are stored as float16 if their top-1 stays within 0.02 points, else as float32. The metrics of the
    entry, and the liveness of its sites, are those of the stored file, read back. Everything is checked before anything
    is changed. Existing weights of that name are replaced as a whole, the manifest last; if it cannot be written, they
    come back, and what a killed process left is mended by the next.

    Args:
        run: A finished run folder.
        data: Where the data set is; its test split is evaluated.
        checkout: The checkout to write to; the one this package runs from if None.
        allow_even_sites: Pack a net one of whose ConAMs gives all patches about the same confidence, too.

    Raises:
        UserError: If the run is unfinished, damaged or not one run's, was a choosing run (``holdout``), was trained
            with other settings than the packaged recipe of its name (the seed may differ), has an even site, or has no
            checkout to go to.
    """
    checkout = checkout or find_checkout()
    if checkout is None:
        raise UserError("Weights are packed into a checkout of conam_zoo: run from one.")
    record = read_finished(run)
    recipe = record["recipe"]
    if recipe["holdout"]:
        raise UserError(f"{run} held out {recipe['holdout']} training images: pack a run that trained on all of them.")
    name = f"{recipe['model']}.{recipe['dataset']}"
    recipe_name = _packaged_name(recipe, name, run)
    source = open_final(run, record)
    training, test = (read_split(data, split, recipe["dataset"]) for split in ("train", "test"))
    with packing(checkout), scratch_folder(checkout, name) as scratch:
        _check_documents(checkout)
        folder = scratch / name
        exact = evaluate_on(source, test)
        dtype, stored, scores, sha256 = _store(source, folder, recipe["dataset"], test, exact)
        measured = measure(stored, training, test)
        even = [f"{site} ({alive:.2%})" for site, alive in measured["liveness"].items() if alive < EVEN]
        if even and not allow_even_sites:
            raise UserError(
                f"{run} has a ConAM whose confidences differ by less than {EVEN:.0%} between patches, "
                f"{' and '.join(even)}: train it again, or add --allow-even-sites."
            )
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
            **measured,
        )
        for extra in ("log.csv", "curves.png"):
            write_atomically(folder / extra, partial(shutil.copyfile, run / extra))
        manifest_path = checkout / "weights_manifest.json"
        manifest = load_manifest(manifest_path)
        write_text(folder / "README.md", model_card(entry, manifest))
        destination = checkout / "weights" / name
        _check_size(folder, destination)
        updated = replace(manifest, entries={**manifest.entries, name: entry})
        exchange(folder, destination, scratch, lambda: dump_manifest(updated, manifest_path))
    return entry


def _check_documents(checkout: Path) -> None:
    """Refuse a checkout whose manifest or documents could not be written again afterwards."""
    try:
        generated_files(checkout)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The documents of {checkout} cannot be read ({error}): restore them first.") from error


def _check_size(folder: Path, destination: Path) -> None:
    """Refuse weights that would make the checkout too large to clone with ease."""
    others = [path for path in destination.parent.rglob("*") if destination not in path.parents]
    total = sum(path.stat().st_size for path in [*others, *folder.rglob("*")] if path.is_file())
    if total > MAX_TOTAL_BYTES:
        raise UserError(
            f"{destination.parent} would take {total / 2**20:.1f} MiB with {folder.name}, and may take "
            f"{MAX_TOTAL_BYTES / 2**20:.0f}: remove other weights first."
        )


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
    source: StagedClassifier, folder: Path, tag: str, split: ImageSplit, exact: Metrics
) -> tuple[torch.dtype, StagedClassifier, Metrics, str]:
    """Write the folder in half precision if that is good enough, else in full; with what was written and its scores."""
    fits = all(tensor.half().isfinite().all() for tensor in source.state_dict().values() if tensor.is_floating_point())
    for dtype in (torch.float16, torch.float32) if fits else (torch.float32,):
        shutil.rmtree(folder, ignore_errors=True)  # the shards of a first try
        sha256 = export_model(source, folder, tag=tag, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
        stored = open_model(f"local-dir:{folder}")
        scores = evaluate_on(stored, split)
        close = abs(scores.top1_percent - exact.top1_percent) <= HALF_PRECISION_TOLERANCE
        if close and math.isfinite(scores.nll):  # overflown weights may hit the right classes by chance
            return dtype, stored, scores, sha256
    raise UserError(f"{folder.name} scores otherwise when it is read back: nothing was packed.")
