"""The report on a classifier: accuracy, a table of classes, the confusion matrix, the most confident mistakes.

It is counted from the logits of one set of images with labels; ``report_plots`` draws it.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from conam_zoo.escape import for_markdown

__all__ = ["ClassScores", "Mistake", "Report", "build_report", "report_markdown"]

MOST_CLASSES = 2_000  # of a confusion matrix: it grows with their square
MOST_CONFUSIONS = 20


@dataclass(frozen=True)
class ClassScores:
    """How well one class is told from the others; all in percent but ``support``.

    Attributes:
        name: The class.
        precision_percent: Of the images given this name, how many are right; None if none was given it.
        recall_percent: Of the images of this class, how many are found; None if there are none.
        f1_percent: Harmonic mean of the two; None if both are undefined.
        support: Images of this class.
    """

    name: str
    precision_percent: float | None
    recall_percent: float | None
    f1_percent: float | None
    support: int


@dataclass(frozen=True)
class Mistake:
    """An image that was given a wrong name.

    Attributes:
        index: Its place among the images.
        name: What it is called, or "".
        truth: Its class.
        predicted: The class that it was taken for.
        probability: With which probability.
    """

    index: int
    name: str
    truth: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Report:
    """What is counted.

    Attributes:
        images: How many there are.
        top1_percent: Images whose most probable class is right.
        top5_percent: Images whose class is among the five most probable; None for five classes or fewer.
        balanced_percent: Mean of the recalls of the classes that occur.
        chance_percent: Share of the most frequent class: what saying always the same would reach.
        flip_top1_percent: As ``top1_percent``, with the mean of the probabilities of image and mirror image.
        flip_top5_percent: The same of ``top5_percent``.
        classes: One entry for each class, in label order.
        confusion: Counts (classes, classes): rows are the truth, columns what was predicted; None for more than 2,000
            classes.
        mistakes: All of them, the most confident first.
    """

    images: int
    top1_percent: float
    top5_percent: float | None
    balanced_percent: float
    chance_percent: float
    flip_top1_percent: float
    flip_top5_percent: float | None
    classes: list[ClassScores]
    confusion: list[list[int]] | None
    mistakes: list[Mistake]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_report(
    logits: Tensor, flipped_logits: Tensor, labels: Tensor, classes: tuple[str, ...], names: tuple[str, ...] = ()
) -> Report:
    """Count a report of logits (N, classes), those of the mirrored images, labels (N,) and the images' names."""
    count = len(classes)
    probabilities = logits.double().softmax(1)
    both = (probabilities + flipped_logits.double().softmax(1)) / 2
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
        top1_percent=_top(probabilities, labels, 1),
        top5_percent=_top(probabilities, labels, 5) if count > 5 else None,
        balanced_percent=sum(recalls) / len(recalls),
        chance_percent=100 * float(support.max()) / len(labels),
        flip_top1_percent=_top(both, labels, 1),
        flip_top5_percent=_top(both, labels, 5) if count > 5 else None,
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


def _top(scores: Tensor, labels: Tensor, k: int) -> float:
    hits = (scores.topk(k, dim=1).indices == labels[:, None]).any(1)
    return 100 * float(hits.double().mean())


def report_markdown(report: Report, *, title: str, about: str, choices: list[tuple[str, str]], usage: str) -> str:
    """The report as a page that shows ``curves.png``, ``confusion.png`` and ``mistakes.png`` beside it.

    Args:
        report: What was counted.
        title: Headline.
        about: One sentence that says which images these are.
        choices: What was chosen, as pairs for a table.
        usage: Markdown on how to use the weights; all other texts are plain.
    """

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} %"

    lines = [f"# {for_markdown(title)}", "", for_markdown(about), ""]
    lines += ["| | plain | with the mirror image |", "| --- | --: | --: |"]
    lines.append(f"| accuracy (top-1) | {report.top1_percent:.2f} % | {report.flip_top1_percent:.2f} % |")
    if report.top5_percent is not None:
        lines.append(
            f"| among the first five (top-5) | {report.top5_percent:.2f} % | {report.flip_top5_percent:.2f} % |"
        )
    lines.append(f"| mean over the classes (balanced accuracy) | {report.balanced_percent:.2f} % | |")
    lines.append(f"| always the most frequent class | {report.chance_percent:.2f} % | |")
    lines += ["", "The second column averages the probabilities of each image and its mirror image.", ""]
    lines += ["## Curves", "", "![loss, accuracy and learning rate over the epochs](curves.png)", ""]
    lines += ["## Classes", "", "| class | precision | recall | F1 | images |", "| --- | --: | --: | --: | --: |"]
    lines += [
        f"| {for_markdown(row.name)} | {percent(row.precision_percent)} | {percent(row.recall_percent)} | "
        f"{percent(row.f1_percent)} | {row.support} |"
        for row in report.classes
    ]
    if report.confusion is not None:
        lines += ["", "![confusion matrix](confusion.png)"]
    lines += ["", "## Mistakes", ""]
    if report.mistakes:
        pairs = Counter((mistake.truth, mistake.predicted) for mistake in report.mistakes).most_common(MOST_CONFUSIONS)
        lines += [
            f"{len(report.mistakes)} of {report.images} images were given a wrong name; the most confident first:",
            "",
            "![the most confident mistakes](mistakes.png)",
            "",
            "| class | most often taken for | images |",
            "| --- | --- | --: |",
            *(f"| {for_markdown(truth)} | {for_markdown(other)} | {number} |" for (truth, other), number in pairs),
            "",
        ]
    else:
        lines += [f"None: all {report.images} images were given the right name.", ""]
    lines += ["## Choices", "", "| what | choice |", "| --- | --- |"]
    lines += [f"| {for_markdown(what)} | {for_markdown(choice)} |" for what, choice in choices]
    return "\n".join([*lines, "", "## Use", "", usage]) + "\n"
