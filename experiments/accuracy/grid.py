"""A grid of trainings under one recipe: planning its cells, training the missing ones, recording the results.

A grid is one JSON file, rewritten after every cell, and a folder of the same name with the run folders. A finished cell
in the file or the folder is not trained again; an interrupted or failed one goes on from its checkpoint, if it has one.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch

from conam_zoo.errors import UserError
from conam_zoo.files import make_folder, write_text
from conam_zoo.models.registry import check_model_name, count_params_and_macs, model_names
from conam_zoo.training.queue import Job, run_queue
from conam_zoo.training.recipe import Recipe, load_recipe, parse_settings, recipe_from_dict

RECIPES = ("short", "full")
FORMER_NAMES = {"attention": "compare"}
ATTENTION = "no weight decay, ConAM's second bias at one"  # what no setting of a recipe says; earlier cells lack it
OWN_TO_A_CELL = {"model", "dataset", "model_args", "seed"}  # all other settings are those of the whole grid


@dataclass(frozen=True)
class Cell:
    """One training of a grid."""

    variant: str  # what the grid compares: a layer or a form of ConAM, by its short name
    recipe: Recipe  # everything else

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.recipe.model}.{self.recipe.dataset}.{self.variant}.seed{self.recipe.seed}"


@dataclass(frozen=True)
class Grid:
    """Results, as the JSON file holds them.

    A finished cell has ``name``, ``model``, ``dataset``, ``variant``, ``seed``, ``epochs``, ``recipe``, ``attention``,
    ``params`` and ``macs``, and of its run ``evaluated_on``, ``top1_percent``, ``top5_percent``, ``nll``, ``ece``,
    ``minutes`` (of the clock, with whatever ran beside it), ``precision`` (that of the device), ``compiled``,
    ``hardware``, ``library_versions`` and ``code_commit``. One that failed has ``failed``, the reason, instead of those
    of its run.
    """

    what: str  # "compare" or "ablation"
    command: str  # the command line that was last given
    cells: list[dict[str, Any]]

    def to_json(self) -> str:
        """The file: one line for each cell, so that a change shows which."""
        lines = ",\n".join(f"    {json.dumps(cell)}" for cell in sorted(self.cells, key=lambda cell: str(cell["name"])))
        head = f'{{\n  "what": {json.dumps(self.what)},\n  "command": {json.dumps(self.command)},\n  "cells": [\n'
        return f"{head}{lines}\n  ]\n}}\n" if lines else f"{head}  ]\n}}\n"


def grid_recipe(name: str, settings: Sequence[str] = (), *, holdout: int = 0) -> Recipe:
    """One of ``RECIPES``, with settings such as ``"epochs=5"`` replaced.

    Settings that differ between cells are refused, and so is ``holdout``, which has an argument of its own.
    """
    if name not in RECIPES:
        raise UserError(f"There is no recipe {name!r} for a grid: choose {' or '.join(RECIPES)}.")
    given = parse_settings(list(settings)).keys()
    if own := given & OWN_TO_A_CELL:
        raise UserError(f"The setting {min(own)} is not one of the whole grid: each cell has its own.")
    if "holdout" in given:
        raise UserError("The setting holdout is an option of its own: write --holdout instead of --set holdout.")
    path = Path(__file__).parent / "recipes" / f"{name}.toml"
    return load_recipe(str(path), [*settings, f"holdout={holdout}"])


def plan_grid(
    models: Sequence[str],
    datasets: Sequence[str],
    variants: Mapping[str, Callable[[str], Mapping[str, Any]]],
    seeds: Sequence[int],
    recipe: Recipe,
) -> list[Cell]:
    """All cells, seed by seed, so that a grid that is cut short has whole comparisons.

    ``models`` are builders, with or without ``_conam``, and ``datasets`` their tags. ``variants`` has for each short
    name a function from the builder's name to its arguments; a model that cannot be built as a variant is refused.
    """
    full = [name if name in model_names() else f"{name}_conam" for name in models]
    for model in full:
        for dataset in datasets:
            check_model_name(f"{model}.{dataset}")
    for model in full:
        for variant, arguments in variants.items():
            try:
                with torch.device("meta"):
                    timm.create_model(model, **arguments(model))
            except (TypeError, ValueError) as error:
                raise UserError(f"{model} cannot be built as {variant} ({error}): leave one of them out.") from error
    return [
        Cell(
            variant,
            replace(recipe, model=model, dataset=dataset, model_args=dict(arguments(model)), seed=seed),
        )
        for model in full
        for dataset in datasets
        for seed in dict.fromkeys(seeds)
        for variant, arguments in variants.items()
    ]


def read_grid(path: Path) -> Grid:
    """Read a grid's JSON file."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["what"] = FORMER_NAMES.get(facts["what"], facts["what"])
        grid = Grid(**{field.name: facts[field.name] for field in fields(Grid)})
        for cell in grid.cells:
            recipe_from_dict(cell["recipe"], cell["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a grid of trainings ({error}): remove it, or choose another output.") from error
    return grid


def run_grid(
    what: str,
    cells: Sequence[Cell],
    data: str | Path,
    output: Path,
    *,
    parallel: int = 1,
    compile: bool = False,
    command: str = "",
    on_event: Callable[[str, str], None] = lambda name, event: None,
) -> Grid:
    """Train the missing cells, and update ``output`` + ``.json`` after each; all cells of the file are returned.

    ``output`` is a path without ending: ``results/compare`` makes ``results/compare.json`` and the run folders in
    ``results/compare/``, which lose their checkpoints once they are finished. For ``data`` see
    ``conam_zoo.data.read_split``. ``parallel`` is how many trainings run at a time, each in a process; the cores are
    divided evenly. ``on_event`` gets a cell's name and ``is there``, ``started``, ``resumed``, ``done``, ``stopped`` or
    ``failed: ...``. A file or a run folder with cells of another recipe is refused.
    """
    file = output.with_name(f"{output.name}.json")
    earlier = read_grid(file).cells if file.exists() else []
    results = {cell["name"]: cell for cell in earlier}
    _check_recipes(file, earlier, cells)
    missing = []
    for cell in cells:
        if "top1_percent" in results.get(cell.name, {}):
            on_event(cell.name, "is there")
        else:
            missing.append(cell)
    make_folder(output)
    by_folder = {output / cell.name: cell for cell in missing}

    def keep(cell: Cell, outcome: dict[str, Any]) -> None:
        results[cell.name] = _facts(cell) | outcome
        write_text(file, Grid(what, command, list(results.values())).to_json())

    def on_done(job: Job) -> None:
        keep(by_folder[job.folder], _outcome(by_folder[job.folder], job.folder))

    queue = [_job(cell, output) for cell in missing]
    try:
        outcomes = run_queue(
            queue,
            str(data),
            parallel=parallel,
            compile=compile,
            on_event=lambda job, event: on_event(by_folder[job.folder].name, event),
            on_done=on_done,
        )
    finally:
        for job in queue:
            if job.is_done():  # nothing resumes it, and hundreds of checkpoints are large
                for checkpoint in job.folder.glob("checkpoint*.safetensors"):
                    checkpoint.unlink()
    for job in queue:
        outcome = outcomes.get(job.name, "stopped")
        if outcome.startswith("failed"):
            keep(by_folder[job.folder], {"failed": outcome.partition(": ")[2]})
    grid = Grid(what, command, sorted(results.values(), key=lambda cell: str(cell["name"])))
    if grid.cells:
        write_text(file, grid.to_json())  # with the command that was last given, even if it trained nothing
    return grid


def _check_recipes(file: Path, earlier: Iterable[dict[str, Any]], cells: Sequence[Cell]) -> None:
    """Refuse to put cells of different recipes into one file."""
    wanted = {cell.name: cell for cell in cells}
    for old in earlier:
        if old.get("attention") != ATTENTION:
            raise UserError(
                f"{file} holds {old['name']}, whose attention was decayed or initialised otherwise: "
                "choose another output."
            )
        recipe = recipe_from_dict(old["recipe"], old["name"]).to_dict()
        new = wanted.get(old["name"], cells[0] if cells else None)
        if new is None:
            return
        shared = new.recipe.to_dict()
        own: set[str] = set() if old["name"] in wanted else OWN_TO_A_CELL
        changed = [key for key in recipe if key not in own and recipe[key] != shared[key]]
        if changed:
            raise UserError(
                f"{file} holds {old['name']} by another recipe ({', '.join(changed)} differ): choose another output."
            )


def _job(cell: Cell, output: Path) -> Job:
    """The cell as a job of the queue; its recipe is written beside the run folder."""
    folder = output / cell.name
    recipe = output / f"{cell.name}.toml"
    if not recipe.is_file() or recipe.read_text(encoding="utf-8") != cell.recipe.to_toml():
        if folder.exists():
            raise UserError(f"{folder} was trained by another recipe: remove it, or choose another output.")
        write_text(recipe, cell.recipe.to_toml())
    return Job(str(recipe), cell.recipe, (), folder, ships=False, program="experiments.conam")


def _facts(cell: Cell) -> dict[str, Any]:
    recipe = cell.recipe
    params, macs = count_params_and_macs(
        f"{recipe.model}.{recipe.dataset}", pretrained_cfg_overlay=recipe.cfg_overlay, **recipe.model_args
    )
    return {
        "name": cell.name,
        "model": recipe.model,
        "dataset": recipe.dataset,
        "variant": cell.variant,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "params": params,
        "macs": macs,
        "recipe": recipe.to_dict(),
        "attention": ATTENTION,
    }


def _outcome(cell: Cell, folder: Path) -> dict[str, Any]:
    """What a finished run folder says."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if recipe_from_dict(run["recipe"], cell.name) != cell.recipe:
        raise UserError(f"{folder} was trained by another recipe: remove it, or choose another output.")
    return {
        "evaluated_on": run["evaluated_on"],
        **run["scores"],
        "minutes": round(run["train_minutes"], 2),
        "precision": run.get("precision", cell.recipe.precision),  # earlier runs had no other than the recipe's
        "compiled": run.get("compile_seconds") is not None,
        **{key: run[key] for key in ("hardware", "library_versions", "code_commit")},
    }
