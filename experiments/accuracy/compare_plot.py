"""Results of grids as a picture: a dot for each seed, the mean, the interval of its difference to the reference."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conam_zoo.files import write_atomically
from experiments.accuracy.statistics import Comparison

DOT, MEAN, REFERENCE = "#6cb4c9", "#1c4f63", "#b35806"


@dataclass(frozen=True)
class Panel:
    """One comparison."""

    title: str  # stands above
    rows: dict[str, Comparison]  # by label: top-1 in percent, seed by seed, beside the reference; at least one seed
    reference: str | None  # label of the row at whose mean a line is drawn


def draw_panels(panels: list[Panel], path: Path, title: str) -> None:
    """Write a PNG with the panels in a grid of at most three columns."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = ceil(len(panels) / columns)
    most = [max(len(panel.rows) for panel in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [0.3 * count + 1.0 for count in most]
    width = 4.6 * columns if columns > 1 else 6.4  # a single panel still has room for the words around it
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(fill(title.replace("**", ""), int(13 * width)), fontsize=9)
    legend = (
        "top-1 (%); light dots: seeds; dashed: mean of the reference; dark: their mean as its difference to the "
        "reference, over the seeds that both have, with its 95 % interval"
    )
    figure.supxlabel(fill(legend, int(15 * width)), fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw one panel into the axes."""
    labels = list(panel.rows)
    reference = fmean(panel.rows[panel.reference].values) if panel.reference in panel.rows else None
    for position, label in enumerate(labels):
        row = panel.rows[label]
        mean = fmean(row.values)
        if reference is not None and row.difference is not None:
            mean = reference + row.difference  # the same, unless the reference has seeds that this one lacks
        axes.plot(row.values, [position] * len(row.values), "o", color=DOT, markersize=4, alpha=0.8, zorder=2)
        if row.half_width is not None:
            ends = [mean - row.half_width, mean + row.half_width]
            axes.plot(ends, [position] * 2, color=MEAN, linewidth=1.4, zorder=3)
        axes.plot([mean], [position], "D", color=MEAN, markersize=5, zorder=4)
    if reference is not None:
        axes.axvline(reference, color=REFERENCE, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    axes.set_yticks(range(len(labels)), [fill(label, 26) for label in labels], fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(panel.title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
