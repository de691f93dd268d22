"""The pictures of a report: curves, the confusion matrix, and a sheet of the most confident mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from conam_zoo.files import write_figure
from conam_zoo.finetuning.report import Report
from conam_zoo.training.run_folder import draw_curves
from conam_zoo.visualize.plots import caption
from conam_zoo.visualize.predict import percent

__all__ = ["draw_confusion", "draw_mistakes", "draw_report"]

NUMBERED = 25  # up to so many classes, the cells hold their counts
LABELLED = 100  # up to so many, rows and columns have names
CELLS = 400  # of a side at most: of more classes, several share a cell
MISTAKES = 24
COLUMNS = 6


def draw_report(report: Report, images: Tensor, log: list[dict[str, Any]], folder: Path, title: str) -> list[str]:
    """Draw ``curves.png``, ``confusion.png`` and ``mistakes.png``, each whether or not the others can be drawn.

    Returns:
        A sentence for each picture that could not be drawn.
    """
    pictures = {
        "curves.png": lambda path: draw_curves(log, path, title),
        "confusion.png": lambda path: draw_confusion(report, path),
        "mistakes.png": lambda path: draw_mistakes(report, images, path),
    }
    failures = []
    for name, draw in pictures.items():
        try:
            (folder / name).unlink(missing_ok=True)
            draw(folder / name)
        except Exception as error:  # whatever a drawing library runs into, the training is worth more
            failures.append(f"{name} could not be drawn ({type(error).__name__}: {error}); everything else is there.")
    return failures


def draw_confusion(report: Report, path: Path) -> None:
    """Draw the confusion matrix: a row is a class, its colours are shares of that class, its numbers are images.

    The picture has at most 100 names a side, and 400 cells: of more classes, a cell shows the largest share in it.
    """
    if report.confusion is None:
        return
    counts = np.array(report.confusion)
    classes = len(counts)
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    if classes > CELLS:
        starts = np.arange(0, classes, -(-classes // CELLS))
        shares = np.maximum.reduceat(np.maximum.reduceat(shares, starts, axis=0), starts, axis=1)
    names = [caption(row.name.replace("_", " "), 24) for row in report.classes] if classes <= LABELLED else []
    cell = 0.42 if classes <= NUMBERED else 0.16
    side = max(2.6, cell * min(classes, LABELLED) / (1 if names else 2))
    text = 0.085 * max(map(len, names), default=0) * (1 if classes <= NUMBERED else 0.65) + 0.5
    figure = Figure(figsize=(side + text + 0.9, side + text + 0.5), layout="constrained")
    axes = figure.subplots()
    norm = PowerNorm(0.5, 0, 1)  # rare confusions are what one looks for
    extent = (-0.5, classes - 0.5, classes - 0.5, -0.5)  # the axes count classes, however many share a cell
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", extent=extent)
    size = 9 if classes <= NUMBERED else 6
    if names:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if classes <= NUMBERED:
        digits = len(str(counts.max()))
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize=9 if digits < 4 else 7,
                color="white" if shares[row, column] > 0.3 else "black",
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    bar.set_label("share of the class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    axes.set_title(f"{report.top1_percent:.1f} % of {report.images:,} images", fontsize=10)
    write_figure(path, figure, dpi=130, bbox_inches="tight")


def draw_mistakes(report: Report, images: Tensor, path: Path) -> None:
    """Draw up to 24 mistakes, the most confident first: image, what it is, what it was taken for.

    ``images`` are those that the report is about, uint8 (N, H, W, 3); without mistakes nothing is drawn.
    """
    shown = report.mistakes[:MISTAKES]
    if not shown:
        return
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(4.5, 1.75 * columns), 2.2 * rows + 0.7), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, mistake in zip(figure.axes, shown, strict=False):
        axes.imshow(images[mistake.index].cpu().numpy(), interpolation="nearest")
        axes.set_title(caption(mistake.truth.replace("_", " "), 22), fontsize=9, pad=3)
        axes.text(
            0.5,
            -0.05,
            f"{caption(mistake.predicted.replace('_', ' '), 22)}: {percent(mistake.probability)}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color="#b3261e",
        )
    count = len(report.mistakes)
    what = "all mistakes" if count <= MISTAKES else f"the {MISTAKES} most confident of {count:,} mistakes"
    figure.suptitle(f"{what}: the class, and in red what it was taken for", fontsize=10)
    write_figure(path, figure, dpi=110)
