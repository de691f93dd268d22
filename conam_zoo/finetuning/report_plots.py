"""The two pictures of a report: the confusion matrix, and a sheet of the most confident mistakes."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from conam_zoo.files import write_atomically
from conam_zoo.finetuning.report import Report
from conam_zoo.visualize.predict import percent

__all__ = ["draw_confusion", "draw_mistakes"]

NUMBERED = 25  # up to so many classes, the cells hold their counts
MISTAKES = 24
COLUMNS = 6


def draw_confusion(report: Report, path: Path) -> None:
    """Draw the confusion matrix: a row is a class, its colours are shares of that class, its numbers are images."""
    counts = np.array(report.confusion)
    classes = [row.name.replace("_", " ") for row in report.classes]
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    cell = 0.42 if len(classes) <= NUMBERED else 0.16
    longest = min(24, max(map(len, classes)))
    side = max(2.6, cell * len(classes))
    text = 0.085 * longest * (1 if len(classes) <= NUMBERED else 0.65) + 0.5
    figure = Figure(figsize=(side + text + 0.9, side + text + 0.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # rare confusions are what one looks for
    size = 9 if len(classes) <= NUMBERED else 6
    labels = [textwrap.shorten(name, 24, placeholder="…") for name in classes]
    axes.set_xticks(range(len(classes)), labels, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), labels, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if len(classes) <= NUMBERED:
        digits = len(str(counts.max()))
        for row, column in zip(*counts.nonzero(), strict=True):
            dark = shares[row, column] > 0.3
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize=9 if digits < 4 else 7,
                color="white" if dark else "black",
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    bar.set_label("share of the class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    axes.set_title(f"{report.top1_percent:.1f} % of {report.images:,} images", fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, bbox_inches="tight"))


def draw_mistakes(report: Report, images: Tensor, path: Path) -> None:
    """Draw up to 24 mistakes, the most confident first: image, what it is, what it was taken for.

    Args:
        report: What was counted.
        images: The images that it is about, uint8 (N, H, W, 3).
        path: The PNG.
    """
    shown = report.mistakes[:MISTAKES]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(4.5, 1.75 * columns), 2.2 * rows + 0.7), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, mistake in zip(figure.axes, shown, strict=False):
        axes.imshow(images[mistake.index].cpu().numpy(), interpolation="nearest")
        truth, predicted = (
            textwrap.shorten(name.replace("_", " "), 22, placeholder="…") for name in (mistake.truth, mistake.predicted)
        )
        axes.set_title(truth, fontsize=9, pad=3)
        axes.text(
            0.5,
            -0.05,
            f"{predicted}: {percent(mistake.probability)}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color="#b3261e",
        )
    count = len(report.mistakes)
    what = "all mistakes" if count <= MISTAKES else f"the {MISTAKES} most confident of {count:,} mistakes"
    figure.suptitle(f"{what}: the class, and in red what it was taken for", fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
