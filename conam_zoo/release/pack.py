"""From a finished run to shippable weights: the folder that mirrors the Hub repository, and the manifest entry."""

import json
import math
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

from conam_zoo.data import ImageSplit, normalize, read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically, write_text
from conam_zoo.layers.confidence import liveness
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import count_params_and_macs, export_model, open_model, weights_sha256
from conam_zoo.release.documents import generated_files, model_card, our_checkout
from conam_zoo.release.exchange import exchange, packing, scratch_folder
from conam_zoo.training.engine import predict_logits, score
from conam_zoo.training.evaluate import evaluate_on
from conam_zoo.training.recipe import list_recipes, load_recipe, recipe_from_dict
from conam_zoo.training.run_folder import LOG, RUN, read_log, read_run
from conam_zoo.training.train import MONITORED_IMAGES
from conam_zoo.weights import Metrics, WeightEntry, WeightsError, dump_manifest, load_manifest
from conam_zoo.weights.folder import read_config, weights_file
from conam_zoo.weights.manifest import EVEN
from conam_zoo.weights.verify import bytes_of, is_index

LICENCE = "Apache-2.0"
PACKED = "packed"  # in a run folder: the hash of its weights, once they are packed
HALF_PRECISION_TOLERANCE = 0.02  # points of top-1 that storing float16 may change
MAX_TOTAL_BYTES = 96 * 2**20  # of the whole folder weights/
MAX_SHARD_BYTES = 15 * 2**20  # of tensors in one file; its header comes on top, and no file may have more than 16 MiB
SAMPLE_IMAGES = 1000

RUN_FACTS: dict[str, Any] = {
    "recipe": dict,
    "hardware": str,
    "train_minutes": (int, float),
    "library_versions": dict,
    "sha256": str,
}


def pack(run: Path, data: str | Path, checkout: Path | None = None, *, allow_even_sites: bool = False) -> WeightEntry:
    """Turn a run into ``weights/<name.tag>/`` and an entry of ``weights_manifest.json``.

    The weights are stored as float16 if their top-1 stays within 0.02 points, else as float32. The metrics of the
    entry, and the liveness of its sites, are those of the stored file, read back. Everything is checked before anything
    is changed. Existing weights of that name are replaced as a whole, the manifest last; if it cannot be written, they
    come back, and what a killed process left is repaired by the next. A ``UserError`` refuses a run that is unfinished
    or damaged, held out images, had other settings than its packaged recipe (but for the seed), or has an even site.
    """
    checkout = checkout or our_checkout()
    record = _read_finished(run)
    recipe = record["recipe"]
    if recipe["holdout"]:
        raise UserError(f"{run} held out {recipe['holdout']} training images: pack a run that trained on all of them.")
    name = f"{recipe['model']}.{recipe['dataset']}"
    recipe_name = _packaged_name(recipe, name, run)
    source = _open_final(run, record)
    training, test = (read_split(data, split, recipe["dataset"]) for split in ("train", "test"))
    with packing(checkout), scratch_folder(checkout, name) as scratch:
        _check_documents(checkout)
        folder = scratch / name
        dtype, stored, scores, sha256 = _store(source, folder, recipe["dataset"], test)
        measured = _measure(stored, training, test)
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
            total_bytes=bytes_of(folder / file) if is_index(file) else None,
            **measured,
        )
        for extra in (LOG, "curves.png"):
            write_atomically(folder / extra, partial(shutil.copyfile, run / extra))
        manifest_path = checkout / "weights_manifest.json"
        manifest = load_manifest(manifest_path)
        write_text(folder / "README.md", model_card(entry, manifest))
        destination = checkout / "weights" / name
        _check_size(folder, destination)
        updated = replace(manifest, entries={**manifest.entries, name: entry})
        exchange(folder, destination, scratch, lambda: dump_manifest(updated, manifest_path))
    with suppress(UserError):  # where the run may not be written into, conam queue packs it again
        write_text(run / PACKED, record["sha256"])
    return entry


# --- the run, which may be damaged or made up of several -----------------------------------------------------


def _read_finished(run: Path) -> dict[str, Any]:
    """The facts of ``run.json``, with all settings of the recipe, once it, ``log.csv`` and the curves are checked."""
    path, again = run / RUN, "copy the run folder again"
    record = read_run(run)
    if record is None:
        raise UserError(f"{run} is not a finished run: it has no {RUN}.")
    for key, kind in RUN_FACTS.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            raise UserError(f"{path} is no record of a run, its {key!r} is {repr(record.get(key))[:60]}: {again}.")
    if not 0 <= record["train_minutes"] < math.inf:
        raise UserError(f"{path} states {record['train_minutes']} as 'train_minutes': {again}.")
    if not all(isinstance(version, str) for version in record["library_versions"].values()):
        raise UserError(f"{path} states 'library_versions' that are no text: {again}.")
    record["recipe"] = recipe_from_dict(record["recipe"], str(path)).to_dict()
    epochs = record["recipe"]["epochs"]
    try:
        logged = [(int(row["epoch"]), float(row["loss"])) for row in read_log(run)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / LOG} is no log of a training: {again}.") from error
    if [epoch for epoch, _ in logged] != list(range(1, epochs + 1)):
        raise UserError(f"{run / LOG} has {len(logged)} epochs and not those 1 to {epochs} of the run: copy it again.")
    try:
        with Image.open(run / "curves.png", formats=("PNG",)) as picture:
            picture.verify()
    except (OSError, SyntaxError) as error:
        raise UserError(f"{run / 'curves.png'} cannot be read as a PNG: {again}.") from error
    return record


def _open_final(run: Path, record: dict[str, Any]) -> StagedClassifier:
    """The net in ``final/``, if it is the one that ``run.json`` describes."""
    final, recipe = run / "final", record["recipe"]
    try:
        sha256 = weights_sha256(f"local-dir:{final}") or ""
        architecture = read_config(final / "config.json").get("architecture")
    except (OSError, WeightsError) as error:
        raise UserError(f"{final} is not the folder of a net: copy the run folder again.") from error
    if sha256 != record["sha256"]:
        raise UserError(
            f"{final} holds other weights than {run / RUN} states (sha256 {sha256[:12]}, not "
            f"{record['sha256'][:12]}): put this run's own back."
        )
    if architecture != recipe["model"]:
        raise UserError(f"{final} holds a {architecture}, but the run trained a {recipe['model']}: put its own back.")
    model = open_model(f"local-dir:{final}")
    trained = timm.create_model(f"{recipe['model']}.{recipe['dataset']}", **recipe["model_args"])
    expected, found = ({key: value.shape for key, value in net.state_dict().items()} for net in (trained, model))
    if differ := sorted(key for key in expected | found if expected.get(key) != found.get(key)):
        raise UserError(f"{final} is not the net of its recipe, {differ[0]} differs: put this run's own back.")
    return model


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


# --- the checkout ---------------------------------------------------------------------------------------------


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


def _store(
    source: StagedClassifier, folder: Path, tag: str, split: ImageSplit
) -> tuple[torch.dtype, StagedClassifier, Metrics, str]:
    """Write the folder in half precision if that is good enough, else in full; with what was written and its scores."""
    exact = evaluate_on(source, split)
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


def _measure(model: StagedClassifier, training: ImageSplit, test: ImageSplit) -> dict[str, Any]:
    """The fields of a manifest entry that are measured of a stored net, and are not scores.

    Liveness is that on the training images that a training watches, too. What 1,000 test images, spread over the split,
    say is None where there are fewer.
    """
    cfg = model.pretrained_cfg
    watched = normalize(training.spread(MONITORED_IMAGES).images, cfg["mean"], cfg["std"])
    alive = {site: round(value, 6) for site, value in liveness(model, watched).items()}
    correct, nll = None, None
    if len(test) >= SAMPLE_IMAGES:
        sample = test.spread(SAMPLE_IMAGES)
        logits = predict_logits(model, sample.images, cfg["mean"], cfg["std"])
        correct = int(torch.sum(logits.argmax(dim=1) == sample.labels))
        nll = round(score(logits, sample.labels).nll, 5)
    return {"liveness": alive, "correct_of_1000": correct, "nll_of_1000": nll}
