"""Two initialisations of ConAM on held-out training images: PyTorch's default, and the second bias at one."""

import json
import statistics
from pathlib import Path
from typing import Any

from conam_zoo.data import normalize, read_split
from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.layers.confidence import liveness
from conam_zoo.models.registry import open_model
from conam_zoo.training.train import MONITORED_IMAGES
from experiments.speed.record import read_rows

DEFAULT, UNIT = "PyTorch's", "second bias at one"
COMPARED = "resnet20_conam.cifar100"
KEPT = ("command", "hardware", "library_versions", "code_commit", "evaluated_on")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The runs so far; empty if there is no such file."""
    return read_rows(path, "runs") or []


def add_start(path: Path, folder: Path, data: Path) -> None:
    """Put a finished run with held-out images into the file; one of the same start and seed is replaced.

    Liveness is measured on the training images in ``data``. A run that held nothing out is refused, as is one of
    another net or data set than ``COMPARED``, of another length than the others, or with other ``model_args`` than
    those of the two initialisations.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        recipe, scores = run["recipe"], run["scores"]
        arguments, seed = recipe["model_args"], recipe["seed"]
        facts = {**{key: run[key] for key in KEPT}, "precision": run.get("precision")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a finished run folder ({error}).") from error
    if not recipe["holdout"]:
        raise UserError(f"{folder} held no images out, but initialisations are compared on held-out images.")
    if (name := f"{recipe['model']}.{recipe['dataset']}") != COMPARED:
        raise UserError(f"{folder} holds {name}, but initialisations are compared on {COMPARED}.")
    known = read_starts(path)
    if known and known[0]["epochs"] != recipe["epochs"]:
        raise UserError(f"{folder} has {recipe['epochs']} epochs, but the other runs have {known[0]['epochs']}.")
    # The form with every switch at its default is ConAM with PyTorch's default initialisation.
    form = arguments.get("attn_layer", "conam") == "conam_variant" and not arguments.get("attn_args")
    if not form and arguments:
        raise UserError(f"{folder} has model_args {arguments}, which is neither of the two initialisations.")
    model = open_model(f"local-dir:{folder / 'final'}")
    cfg = model.pretrained_cfg
    watched = read_split(data, "train", recipe["dataset"]).spread(MONITORED_IMAGES).images
    alive = {k: round(v, 4) for k, v in liveness(model, normalize(watched, cfg["mean"], cfg["std"])).items()}
    entry = {"start": DEFAULT if form else UNIT, "seed": seed, **scores, "epochs": recipe["epochs"], "liveness": alive}
    others = [each for each in known if (each["start"], each["seed"]) != (entry["start"], seed)]
    runs = sorted([*others, {**entry, **facts}], key=lambda item: (item["start"], item["seed"]))
    write_text(path, json.dumps({"runs": runs}, indent=2) + "\n")


def start_table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each start, in Markdown."""
    lines = ["| start | seeds | NLL | top-1 (%) | liveness, site by site |", "| --- | --: | --: | --: | --- |"]
    for start in (DEFAULT, UNIT):
        own = [run for run in runs if run["start"] == start]
        if not own:
            continue
        sites = [statistics.mean(run["liveness"][site] for run in own) for site in own[0]["liveness"]]
        alive = ", ".join(f"{value:.2f}" for value in sites)
        nll, top1 = (_spread([run[key] for run in own], digits) for key, digits in (("nll", 3), ("top1_percent", 2)))
        lines.append(f"| {start} | {len(own)} | {nll} | {top1} | {alive} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
