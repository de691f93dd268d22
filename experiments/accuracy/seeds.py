"""Several seeds of one recipe: their results in one JSON file, and the table of mean and deviation made from it."""

import json
import statistics
from pathlib import Path
from typing import Any

from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.training.recipe import list_recipes, load_recipe, recipe_from_dict
from experiments.speed.record import read_rows


def read_seeds(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """For each recipe and seed what its run measured; empty if there is no such file."""
    return read_rows(path, "recipes") or {}


def add_seed(path: Path, recipe: str, run: dict[str, Any]) -> None:
    """Put the result of one finished run, its ``run.json``, into the file; a run of the same seed is replaced.

    It is refused if other seeds of a recipe of this name had other settings, another teacher, a bank of other length or
    another precision, or if the file does not say how they were trained.
    """
    results = read_seeds(path)
    seeds = results.setdefault(recipe, {})
    seed = str(run["recipe"]["seed"])
    trained_by = {
        "recipe": recipe_from_dict(run["recipe"], "of the run").to_dict() | {"seed": None},
        "teacher": run.get("teacher"),
        "bank_epochs": (run.get("teacher_bank") or {}).get("epochs"),
        "precision": run.get("precision"),
    }
    for key, other in seeds.items():
        if key != seed and "trained_by" not in other:
            raise UserError(
                f"{path} does not say how seed {key} of {recipe} was trained, so its teacher may have been another: "
                "train that seed again, or remove it."
            )
        if key != seed and other["trained_by"] != trained_by:
            raise UserError(
                f"{path} holds other seeds of {recipe} that were trained otherwise: remove them from it first."
            )
    seeds[seed] = {
        "trained_by": trained_by,
        "top1_percent": run["scores"]["top1_percent"],
        "nll": run["scores"]["nll"],
        "ece": run["scores"]["ece"],
        "evaluated_on": run["evaluated_on"],
        "epochs": run["recipe"]["epochs"],
        "train_minutes": round(run["train_minutes"], 1),
        "hardware": run["hardware"],
        "library_versions": run["library_versions"],
        "code_commit": run["code_commit"],
    }
    ordered = {name: dict(sorted(results[name].items(), key=lambda item: int(item[0]))) for name in sorted(results)}
    write_text(path, json.dumps({"recipes": ordered}, indent=2) + "\n")


def add_run(path: Path, folder: Path) -> None:
    """Put a finished run folder into the file.

    Its recipe has to be a packaged one as it stands today, but for the seed.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        trained = recipe_from_dict(run["recipe"], str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a finished run folder ({error}).") from error
    for name in list_recipes():
        if load_recipe(name, [f"seed={trained.seed}"]) == trained:
            return add_seed(path, name, run)
    raise UserError(f"{folder} was not trained by a packaged recipe as it stands today.")


def seed_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Mean and standard deviation of top-1 over the seeds of each recipe, in Markdown."""
    lines = ["| recipe | seeds | top-1, mean ± deviation | each seed | on |", "| --- | --: | --: | --- | --- |"]
    for recipe, seeds in results.items():
        top1 = [run["top1_percent"] for run in seeds.values()]
        deviation = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        each = ", ".join(f"{value:.2f} ({seed})" for seed, value in zip(seeds, top1, strict=True))
        hardware = ", ".join(dict.fromkeys(run["hardware"] for run in seeds.values()))
        lines.append(f"| `{recipe}` | {len(top1)} | {statistics.mean(top1):.2f}{deviation} % | {each} | {hardware} |")
    return "\n".join(lines) + "\n"
