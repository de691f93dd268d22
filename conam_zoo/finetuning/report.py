"""The report on a classifier, a page with pictures: accuracy, table of classes, confusion matrix, worst mistakes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from conam_zoo.escape import for_markdown
from conam_zoo.files import write_figure
from conam_zoo.training.engine import score
from conam_zoo.training.run_folder import draw_curves
from conam_zoo.visualize.plots import class_label
from conam_zoo.visualize.predict import percent

MOST_CLASSES = 2_000  # of a confusion matrix: it grows with their square
MOST_CONFUSIONS = 20
NUMBERED = 25  # up to so many classes, the cells of the confusion matrix hold their counts
LABELLED = 100  # up to so many, its rows and columns have names
CELLS = 400  # of a side at most: of more classes, several share a cell
MISTAKES = 24  # on their sheet
COLUMNS = 6


@dataclass(frozen=True)
class ClassScores:
    """How well one class is recognised; None where that is undefined."""

    name: str
    precision_percent: float | None  # of the images given this name, how many are right
    recall_percent: float | None  # of the images of this class, how many are found
    f1_percent: float | None  # harmonic mean of the two
    support: int  # images of this class


@dataclass(frozen=True)
class Mistake:
    """An image that was given a wrong name."""

    index: int  # its place among the images
    name: str  # what it is called, or ""
    truth: str  # its class
    predicted: str  # the class that it was taken for
    probability: float  # with which probability


@dataclass(frozen=True)
class Report:
    """What is counted."""

    images: int
    top1_percent: float
    top5_percent: float | None  # None for five classes or fewer
    balanced_percent: float  # mean of the recalls of the classes that occur
    chance_percent: float  # share of the most frequent class: what saying always the same would reach
    flip_top1_percent: float  # with the mean of the probabilities of image and mirror image
    flip_top5_percent: float | None
    classes: list[ClassScores]  # in label order
    confusion: list[list[int]] | None  # counts: rows are the truth, columns the answers; None for > 2,000 classes
    mistakes: list[Mistake]  # all of them, the most confident first


def build_report(
    logits: Tensor, flipped_logits: Tensor, labels: Tensor, classes: tuple[str, ...], names: tuple[str, ...] = ()
) -> Report:
    """Count a report of logits (N, classes), those of the mirrored images, labels (N,) and the images' names."""
    count = len(classes)
    probabilities = logits.double().softmax(1)
    plain = score(logits, labels)
    both = score(((probabilities + flipped_logits.double().softmax(1)) / 2).log(), labels)
    confidence, predicted = probabilities.max(1)
    support, named, right = (
        torch.bincount(of, minlength=count) for of in (labels, predicted, labels[predicted == labels])
    )
    confusion = None
    if count <= MOST_CLASSES:
        confusion = torch.bincount(labels * count + predicted, minlength=count * count).view(count, count).tolist()
    rows = [
        ClassScores(
            name,
            precision_percent=_percent(right[index], named[index]),
            recall_percent=_percent(right[index], support[index]),
            f1_percent=_percent(2 * right[index], support[index] + named[index]),
            support=int(support[index]),
        )
        for index, name in enumerate(classes)
    ]
    recalls = [row.recall_percent for row in rows if row.recall_percent is not None]
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    return Report(
        images=len(labels),
        top1_percent=plain.top1_percent,
        top5_percent=plain.top5_percent if count > 5 else None,
        balanced_percent=sum(recalls) / len(recalls),
        chance_percent=100 * float(support.max()) / len(labels),
        flip_top1_percent=both.top1_percent,
        flip_top5_percent=both.top5_percent if count > 5 else None,
        classes=rows,
        confusion=confusion,
        mistakes=[
            Mistake(
                index=int(index),
                name=names[index] if names else "",
                truth=classes[labels[index]],
                predicted=classes[predicted[index]],
                probability=float(confidence[index]),
            )
            for index in wrong
        ],
    )


def _percent(part: Tensor, whole: Tensor) -> float | None:
    return 100 * int(part) / int(whole) if whole else None


def report_markdown(report: Report, *, title: str, about: str, choices: list[tuple[str, str]], usage: str) -> str:
    """The report as a page that shows the pictures of ``draw_report``; texts are plain, but ``usage`` is Markdown."""

    def percentage(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} %"

    top5 = ""
    if report.top5_percent is not None:
        top5 = f"\n| among the first five (top-5) | {report.top5_percent:.2f} % | {report.flip_top5_percent:.2f} % |"
    classes = "\n".join(
        f"| {for_markdown(row.name)} | {percentage(row.precision_percent)} | {percentage(row.recall_percent)} | "
        f"{percentage(row.f1_percent)} | {row.support} |"
        for row in report.classes
    )
    confusion = "\n\n![confusion matrix](confusion.png)" if report.confusion is not None else ""
    mistakes = f"None: all {report.images} images were given the right name."
    if report.mistakes:
        pairs = Counter((mistake.truth, mistake.predicted) for mistake in report.mistakes).most_common(MOST_CONFUSIONS)
        rows = "\n".join(
            f"| {for_markdown(truth)} | {for_markdown(other)} | {number} |" for (truth, other), number in pairs
        )
        mistakes = f"""\
{len(report.mistakes)} of {report.images} images were given a wrong name; the most confident first:

![the most confident mistakes](mistakes.png)

| class | most often taken for | images |
| --- | --- | --: |
{rows}"""
    table = "\n".join(f"| {for_markdown(what)} | {for_markdown(choice)} |" for what, choice in choices)
    return f"""\
# {for_markdown(title)}

{for_markdown(about)}

| | plain | with the mirror image |
| --- | --: | --: |
| accuracy (top-1) | {report.top1_percent:.2f} % | {report.flip_top1_percent:.2f} % |{top5}
| mean over the classes (balanced accuracy) | {report.balanced_percent:.2f} % | |
| always the most frequent class | {report.chance_percent:.2f} % | |

The second column averages the probabilities of each image and its mirror image.

## Curves

![loss, accuracy and learning rate over the epochs](curves.png)

## Classes

| class | precision | recall | F1 | images |
| --- | --: | --: | --: | --: |
{classes}{confusion}

## Mistakes

{mistakes}

## Choices

| what | choice |
| --- | --- |
{table}

## Use

{usage}
"""


def draw_report(report: Report, images: Tensor, log: list[dict[str, Any]], folder: Path, title: str) -> list[str]:
    """Draw ``curves.png``, ``confusion.png`` and ``mistakes.png``; a sentence for each that could not be drawn.

    ``images`` of the report are uint8 (N, H, W, 3).
    """
    pictures = {
        "curves.png": lambda path: draw_curves(log, path, title),
        "confusion.png": lambda path: _draw_confusion(report, path),
        "mistakes.png": lambda path: _draw_mistakes(report, images, path),
    }
    failures = []
    for name, draw in pictures.items():
        try:
            (folder / name).unlink(missing_ok=True)
            draw(folder / name)
        except Exception as error:  # whatever a drawing library runs into, the training is worth more
            failures.append(f"{name} could not be drawn ({type(error).__name__}: {error}); everything else is there.")
    return failures


def _draw_confusion(report: Report, path: Path) -> None:
    """Draw the confusion matrix: a row is a class, its colours are shares of that class, its numbers are images.

    Of more than 400 classes, several share a cell, which shows the largest share among them.
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
    names = [class_label(row.name) for row in report.classes] if classes <= LABELLED else []
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
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9 if counts.max() < 1000 else 7}
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, str(counts[row, column]), color=colour, **style)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    bar.set_label("share of the class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    axes.set_title(f"{report.top1_percent:.1f} % of {report.images:,} images", fontsize=10)
    write_figure(path, figure, dpi=130, bbox_inches="tight")


def _draw_mistakes(report: Report, images: Tensor, path: Path) -> None:
    """Draw up to 24 mistakes, the most confident first: image, what it is, what it was taken for."""
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
        axes.set_title(class_label(mistake.truth, 22), fontsize=9, pad=3)
        answer = f"{class_label(mistake.predicted, 22)}: {percent(mistake.probability)}"
        axes.text(0.5, -0.05, answer, transform=axes.transAxes, ha="center", va="top", fontsize=9, color="#b3261e")
    count = len(report.mistakes)
    what = "all mistakes" if count <= MISTAKES else f"the {MISTAKES} most confident of {count:,} mistakes"
    figure.suptitle(f"{what}: the class, and in red what it was taken for", fontsize=10)
    write_figure(path, figure, dpi=110)
