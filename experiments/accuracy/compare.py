"""The comparison of attentions and the ablation: their cells, their tables and their plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.training.recipe import Recipe
from experiments.accuracy.ablation_axes import AXES, PAPER, PLAIN, Arguments, settings_of
from experiments.accuracy.compare_plot import Panel, draw_panels
from experiments.accuracy.grid import Cell, Grid, plan_grid, read_grid, run_grid
from experiments.accuracy.statistics import Comparison, compare
from experiments.speed.baselines import attention_layers
from experiments.speed.record import BenchmarkRecord, Row, read_record

TITLES = {
    "none": "plain",
    "conam": "ConAM",
    "se": "SE",
    "eca": "ECA",
    "cbam": "CBAM",
    "gc": "GC",
    "coord": "coordinate",
    "simam": "SimAM",
}
SHORT_EPOCHS = 100  # fewer than this is called short training


def attention_cells(
    models: Sequence[str], datasets: Sequence[str], layers: Sequence[str], seeds: Sequence[int], recipe: Recipe
) -> list[Cell]:
    """The cells of the comparison of attentions."""
    for layer in layers:
        if layer not in attention_layers():
            raise UserError(f"There is no layer {layer!r} to compare: choose from {', '.join(attention_layers())}.")
    variants = {layer: _layer_arguments(layer) for layer in layers}
    return plan_grid(models, datasets, _for_size(variants, recipe.image_size), seeds, recipe)


def _layer_arguments(layer: str) -> Callable[[str], Mapping[str, Any]]:
    return lambda model: {"attn_layer": layer}


def ablation_cells(
    models: Sequence[str],
    datasets: Sequence[str],
    axes: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    only: Sequence[str] = (),
) -> list[Cell]:
    """The cells of the ablation; the paper's form is trained once for all axes."""
    return plan_grid(models, datasets, _for_size(settings_of(axes, only), recipe.image_size), seeds, recipe)


def _for_size(variants: Mapping[str, Arguments], image_size: int) -> dict[str, Arguments]:
    """The same variants for images of another side than the nets' own: as many patches, of at least one pixel."""

    def scaled(arguments: Arguments, model: str) -> Mapping[str, Any]:
        given = arguments(model)
        plain = timm.create_model(model, device="meta")
        own = plain.pretrained_cfg["input_size"][1]
        sides = given.get("patch_sizes", plain.patch_sizes)
        return {**given, "patch_sizes": [max(1, side * image_size // own) for side in sides]}

    return {name: partial(scaled, given) if image_size else given for name, given in variants.items()}


def run_comparison(what: str, cells: Sequence[Cell], data: str | Path, output: Path, **options: Any) -> Grid:
    """Train what is missing of a grid, as ``run_grid`` does, and draw its plot, ``output`` + ``.png``."""
    grid = run_grid(what, cells, data, output, **options)
    panels = attention_panels(grid) if what == "compare" else ablation_panels(grid)
    if panels:
        draw_panels(panels, output.with_name(f"{output.name}.png"), title=_conditions(grid))
    return grid


def comparison_tables(folder: Path) -> dict[str, str]:
    """Markdown for ``compare`` and ``ablation`` from the JSON files in a folder, ratios from its cost records.

    A file that is not what its name says is refused.
    """
    tables = {}
    for what, table in (("compare", attention_table), ("ablation", ablation_table)):
        costs = [read_record(path) for path in sorted(folder.glob("cost*.json"))]
        pieces = []
        for path in sorted(folder.glob(f"{what}*.json")):
            grid = read_grid(path)
            if grid.what != what:
                raise UserError(f"{path} is a grid of 'experiments {grid.what}': rename it.")
            pieces.append(table(asdict(grid), costs))
        tables[what] = "\n\n".join(pieces) or "Not measured yet."
    return tables


def attention_table(benchmark: Mapping[str, Any], costs: Sequence[BenchmarkRecord] = ()) -> str:
    """The comparison of attentions in Markdown, one table for each model on each data set.

    ``benchmark`` is what ``experiments/results/compare.json`` holds; ``costs`` are records of the ``cost`` benchmark,
    for the times as ratios to the plain net.
    """
    grid = Grid(**benchmark)
    pieces = [_conditions(grid) + " Differences are to the plain net, seed by seed."]
    for (model, dataset), cells in _groups(grid).items():
        lines = [
            f"| {_backbone(model)}, {DATASETS[dataset].title} | seeds | top-1 (%) | difference to plain, 95 % interval "
            "| NLL | difference, 95 % interval | parameters | MACs | training step | inference |",
            "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        ]
        nll = _nll(cells, "none")
        for row in compare(cells, "none", attention_layers()):
            scores = _scores(row, nll[row.variant])
            counts = f"{row.facts['params']:,} | {row.facts['macs'] / 1e6:.2f} M"
            times = [_ratio(costs, model, row, which) for which in ("training step", "inference")]
            lines.append(f"| {TITLES.get(row.variant, row.variant)} | {scores} | {counts} | {' | '.join(times)} |")
        pieces.append("\n".join(lines))
    return "\n\n".join(pieces)


def ablation_table(benchmark: Mapping[str, Any], costs: Sequence[BenchmarkRecord] = ()) -> str:
    """The ablation in Markdown, one table for each model on each data set.

    ``benchmark`` is what ``experiments/results/ablation.json`` holds. ``costs`` is not used, since the ``cost``
    benchmark does not measure the forms.
    """
    grid = Grid(**benchmark)
    pieces = [_conditions(grid) + " Differences are to the paper's form, seed by seed."]
    for (model, dataset), cells in _groups(grid).items():
        rows = {row.variant: row for row in compare(cells, PAPER.variant)}
        nll = _nll(cells, PAPER.variant)
        lines = [
            f"| {_backbone(model)}, {DATASETS[dataset].title} | setting | seeds | top-1 (%) | "
            "difference to the paper's form, 95 % interval | NLL | difference, 95 % interval | parameters |",
            "| --- | --- | --: | --: | --: | --: | --: | --: |",
        ]
        for setting in (PAPER, PLAIN):
            if setting.variant in rows:
                row = rows[setting.variant]
                lines.append(f"| | {setting.label} | {_scores(row, nll[row.variant])} | {row.facts['params']:,} |")
        for title, settings in AXES.values():
            present = [setting for setting in settings if setting.variant in rows]
            if all(setting.variant == PAPER.variant for setting in present):
                continue
            for index, setting in enumerate(present):
                row = rows[setting.variant]
                first = title if index == 0 else ""
                scores = _scores(row, nll[row.variant])
                lines.append(f"| {first} | {setting.label} | {scores} | {row.facts['params']:,} |")
        pieces.append("\n".join(lines))
    if forms := _arguments_of_forms(grid):
        pieces.append("Arguments of the forms:\n\n" + "\n".join(forms))
    return "\n\n".join(pieces)


def _arguments_of_forms(grid: Grid) -> list[str]:
    """A line for each setting of the last axis, whose labels are abbreviations: the arguments of its builder."""
    given = {cell["variant"]: cell["recipe"]["model_args"] for cell in grid.cells}
    _, settings = AXES["form"]
    return [
        f"- {setting.label}: `{json.dumps(given[setting.variant])}`"
        for setting in settings
        if setting.variant != PAPER.variant and given.get(setting.variant)
    ]


def attention_panels(grid: Grid) -> list[Panel]:
    """One panel for each model on each data set."""
    panels = []
    for (model, dataset), cells in _groups(grid).items():
        compared = compare(cells, "none", attention_layers())
        rows = {TITLES.get(row.variant, row.variant): row for row in compared if row.values}
        panels.append(Panel(f"{_backbone(model)}, {DATASETS[dataset].title}", rows, reference="plain"))
    return [panel for panel in panels if panel.rows]


def ablation_panels(grid: Grid) -> list[Panel]:
    """One panel for each axis, for each model on each data set."""
    panels = []
    for (model, dataset), cells in _groups(grid).items():
        rows = {row.variant: row for row in compare(cells, PAPER.variant) if row.values}
        for title, settings in AXES.values():
            present = [setting for setting in settings if setting.variant in rows]
            if all(setting.variant == PAPER.variant for setting in present):
                continue
            shown = {setting.label: rows[setting.variant] for setting in present}
            if PLAIN.variant in rows:
                shown[PLAIN.label] = rows[PLAIN.variant]
            reference = next((s.label for s in present if s.variant == PAPER.variant), None)
            where = f"{_backbone(model)}, {DATASETS[dataset].title}"
            panels.append(Panel(f"{title}\n{where}", shown, reference))
    return panels


def _groups(grid: Grid) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in grid.cells:
        groups.setdefault((cell["model"], cell["dataset"]), []).append(cell)
    return groups


def _backbone(model: str) -> str:
    return model.removesuffix("_conam")


def _conditions(grid: Grid) -> str:
    """How and on what the cells were trained, in words."""
    if not grid.cells:
        return "No cell is trained yet."
    epochs = grid.cells[0]["epochs"]
    done = [cell for cell in grid.cells if "failed" not in cell]
    where = sorted({cell["hardware"] for cell in done})
    on = sorted({cell["evaluated_on"] for cell in done})
    length = (
        f"**Short training, {epochs} epoch{'' if epochs == 1 else 's'}**"
        if epochs < SHORT_EPOCHS
        else f"{epochs} epochs"
    )
    if side := grid.cells[0]["recipe"].get("image_size", 0):
        length += f" on images averaged down to {side} x {side} pixels"
    return f"{length} with one cosine; top-1 on {' and '.join(on) or 'nothing'}, last epoch; {' and '.join(where)}."


def _nll(cells: Sequence[dict[str, Any]], baseline: str) -> dict[str, Comparison]:
    return {row.variant: row for row in compare(cells, baseline, metric="nll")}


def _scores(top1: Comparison, nll: Comparison) -> str:
    """Seeds, then mean with deviation and difference with interval, of top-1 and of the NLL: five columns."""
    seeds = str(len(top1.values)) + (f", {top1.failed} failed" if top1.failed else "")
    return f"{seeds} | {_mean_and_difference(top1, 2)} | {_mean_and_difference(nll, 3)}"


def _mean_and_difference(row: Comparison, digits: int) -> str:
    mean = "-" if row.mean is None else f"{row.mean:.{digits}f}"
    if row.deviation is not None:
        mean += f" ± {row.deviation:.{digits}f}"
    difference = "-" if row.difference is None else f"{row.difference:+.{digits}f}"
    if row.half_width is not None:
        difference += f" ± {row.half_width:.{digits}f}"
    return f"{mean} | {difference}"


def _ratio(costs: Sequence[BenchmarkRecord], model: str, row: Comparison, which: str) -> str:
    """Time of the net as a ratio to its plain twin, in layout and precision of the training; "-" if not measured.

    From the first record that has it, whatever the batch.
    """
    wanted = {"part": "net", "model": model, "layout": "channels_last", "pass": which}
    wanted["precision"] = row.facts["recipe"]["precision"]

    def fits(measured: Row) -> bool:
        images = str(measured.group.get("images", ""))
        same = all(measured.group.get(key) == value for key, value in wanted.items())
        return same and measured.name == row.variant and images.endswith("x 32 x 32")

    ratios = [measured.ratio for record in costs for measured in record.rows if fits(measured)]
    return f"{ratios[0]:.2f}" if ratios else "-"
