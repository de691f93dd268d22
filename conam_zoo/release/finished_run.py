"""Reading a finished run folder, which may be damaged or made up of several."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import timm
from PIL import Image

from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import open_model
from conam_zoo.training.recipe import recipe_from_dict
from conam_zoo.training.run_folder import LOG, RUN, read_log, read_run
from conam_zoo.weights.folder import weights_file

__all__ = ["open_final", "read_finished"]

KINDS: dict[str, Any] = {
    "recipe": dict,
    "hardware": str,
    "train_minutes": (int, float),
    "library_versions": dict,
    "sha256": str,
}


def read_finished(run: Path) -> dict[str, Any]:
    """The facts of ``run.json``, with the recipe's settings spelt out, once it, ``log.csv`` and the curves are checked.

    Raises:
        UserError: If one of them is absent or malformed.
    """
    path = run / RUN
    record = read_run(run)
    if record is None:
        raise UserError(f"{run} is not a finished run: it has no {RUN}.")
    for key, kind in KINDS.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            shown = repr(record.get(key))[:60]
            raise UserError(f"{path} is no record of a run, its {key!r} is {shown}: copy the run folder again.")
    if not 0 <= record["train_minutes"] < math.inf:
        raise UserError(f"{path} states {record['train_minutes']} as 'train_minutes': copy the run folder again.")
    if not all(isinstance(version, str) for version in record["library_versions"].values()):
        raise UserError(f"{path} states 'library_versions' that are no text: copy the run folder again.")
    record["recipe"] = recipe_from_dict(record["recipe"], str(path)).to_dict()
    _check_log(run, record["recipe"]["epochs"])
    try:
        with Image.open(run / "curves.png", formats=("PNG",)) as picture:
            picture.verify()
    except (OSError, SyntaxError) as error:
        raise UserError(f"{run / 'curves.png'} cannot be read as a PNG: copy the run folder again.") from error
    return record


def _check_log(run: Path, epochs: int) -> None:
    """Refuse a log that has not one row of numbers for each epoch."""
    path = run / LOG
    try:
        logged = [(int(row["epoch"]), float(row["loss"])) for row in read_log(run)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no log of a training: copy the run folder again.") from error
    if [epoch for epoch, _ in logged] != list(range(1, epochs + 1)):
        raise UserError(f"{path} has {len(logged)} epochs and not those 1 to {epochs} of the run: copy it again.")


def open_final(run: Path, record: dict[str, Any]) -> StagedClassifier:
    """The net in ``final/``, if it is the one that ``run.json`` tells of.

    Raises:
        UserError: If it is another run's or another net's.
        WeightsError: If its files do not fit each other.
    """
    final, recipe = run / "final", record["recipe"]
    try:
        config = json.loads((final / "config.json").read_text(encoding="utf-8"))
        sha256 = hashlib.sha256((final / weights_file(config, final)).read_bytes()).hexdigest()
        architecture = config["architecture"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{final} is not the folder of a net: copy the run folder again.") from error
    if sha256 != record["sha256"]:
        raise UserError(
            f"{final} holds other weights than {run / RUN} states (sha256 {sha256[:12]}, not "
            f"{record['sha256'][:12]}): put this run's own back."
        )
    if architecture != recipe["model"]:
        raise UserError(f"{final} holds a {architecture}, but the run trained a {recipe['model']}: put its own back.")
    model = open_model(f"local-dir:{final}")
    expected = timm.create_model(f"{recipe['model']}.{recipe['dataset']}", **recipe["model_args"]).state_dict()
    found = model.state_dict()
    differ = sorted(
        key
        for key in expected.keys() | found.keys()
        if key not in expected or key not in found or expected[key].shape != found[key].shape
    )
    if differ:
        raise UserError(f"{final} is not the net of its recipe, {differ[0]} differs: put this run's own back.")
    return model
