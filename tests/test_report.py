"""The report: its figures against counting by hand, its table, its pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conam_zoo.finetuning.report import Report, build_report, draw_report, report_markdown

LOG = [
    {"epoch": epoch, "loss": 1.0, "train_top1_percent": 50.0, "holdout_top1_percent": None, "lr": 0.1}
    for epoch in (1, 2)
]
CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")


def made_up(count: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (count,), generator=generator)  # there is no gnu
    logits = torch.randn(count, 7, generator=generator) + 2.5 * torch.nn.functional.one_hot(labels, 7)
    return logits, torch.randn(count, 7, generator=generator), labels


def report_of(classes: tuple[str, ...] = CLASSES) -> Report:
    logits, flipped, labels = made_up()
    return build_report(logits, flipped, labels, classes, tuple(f"{index}.png" for index in range(len(labels))))


@pytest.mark.slow
def test_figures_agree_with_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

    logits, flipped, labels = made_up()
    report = report_of()
    predicted = logits.argmax(1)
    truth, guess = labels.numpy(), predicted.numpy()
    assert report.top1_percent == pytest.approx(100 * (guess == truth).mean())
    assert report.balanced_percent == pytest.approx(100 * balanced_accuracy_score(truth, guess))
    assert report.confusion == confusion_matrix(truth, guess, labels=range(7)).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, guess, labels=range(7), zero_division=np.nan
    )
    for index, row in enumerate(report.classes):
        assert row.support == support[index]
        for measured, expected in (
            (row.precision_percent, precision),
            (row.recall_percent, recall),
            (row.f1_percent, f1),
        ):
            if measured is None:
                assert np.isnan(expected[index])
            else:
                assert measured == pytest.approx(100 * expected[index])
    assert report.classes[6].recall_percent is None
    top5 = logits.numpy().argsort(1)[:, -5:]
    assert report.top5_percent == pytest.approx(100 * np.mean([t in row for t, row in zip(truth, top5, strict=True)]))
    both = (logits.softmax(1) + flipped.softmax(1)).argmax(1)
    assert report.flip_top1_percent == pytest.approx(100 * (both == labels).double().mean().item())
    assert report.chance_percent == pytest.approx(100 * np.bincount(truth).max() / len(truth))


def test_mistakes_come_with_the_most_confident_first() -> None:
    logits, _, labels = made_up()
    report = report_of()
    probabilities = logits.softmax(1)
    assert len(report.mistakes) == int((logits.argmax(1) != labels).sum()) > 5
    confidences = [mistake.probability for mistake in report.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    for mistake in report.mistakes:
        assert mistake.truth == CLASSES[labels[mistake.index]]
        assert mistake.predicted == CLASSES[logits[mistake.index].argmax()] != mistake.truth
        assert mistake.probability == pytest.approx(float(probabilities[mistake.index].max()), abs=1e-6)
        assert mistake.name == f"{mistake.index}.png"


def test_few_classes_have_no_top5() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    report = build_report(logits, logits, torch.tensor([0, 1]), ("a", "b"))
    assert (report.top1_percent, report.top5_percent, report.flip_top5_percent) == (100.0, None, None)


def written(report: Report, folder: Path) -> str:
    images = torch.randint(256, (report.images, 32, 32, 3), dtype=torch.uint8)
    assert draw_report(report, images, LOG, folder, "A net") == []
    return report_markdown(report, title="A net", about="About.", choices=[("net", "a | b")], usage="Use it.")


def test_what_is_written(tmp_path: Path) -> None:
    report = report_of(("a class | with a bar", *CLASSES[1:]))
    text = written(report, tmp_path)
    assert f"| accuracy (top-1) | {report.top1_percent:.2f} % | {report.flip_top1_percent:.2f} % |" in text
    assert "| a class \\| with a bar | " in text
    assert "| gnu | " in text
    assert "| net | a \\| b |" in text
    assert text.endswith("Use it.\n")
    for name in ("confusion.png", "mistakes.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 250


def test_without_mistakes_there_is_no_sheet_of_them(tmp_path: Path) -> None:
    (tmp_path / "mistakes.png").write_bytes(b"of an earlier report")
    logits = torch.eye(3) * 9
    text = written(build_report(logits, logits, torch.arange(3), ("a", "b", "c")), tmp_path)
    assert not (tmp_path / "mistakes.png").exists()
    assert "None: all 3 images were given the right name." in text


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 100, 101, 1000])
def test_few_and_many_classes_can_be_drawn(tmp_path: Path, count: int) -> None:
    logits = torch.randn(50, count)
    names = tuple(f"a rather long class name, number {index}" for index in range(count))
    written(build_report(logits, logits, torch.randint(count, (50,)), names), tmp_path)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert 250 < max(picture.size) < 4000


@pytest.mark.slow
def test_every_confusion_of_many_classes_can_be_seen(tmp_path: Path) -> None:
    """A single mistake in a thousand classes darkens a cell of the picture."""
    logits = torch.eye(1000)
    labels = torch.arange(1000)
    names = tuple(map(str, range(1000)))
    darkness = []
    for mistaken in (False, True):
        if mistaken:
            labels[700] = 100
        written(build_report(logits, logits, labels, names), tmp_path)
        with Image.open(tmp_path / "confusion.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        rows, columns = pixels.shape[0], pixels.shape[1]
        blue = (pixels[..., 2] - pixels[..., 0] > 60)[: rows // 2, columns // 2 : int(0.8 * columns)]
        darkness.append(int(blue.sum()))
    assert darkness[0] == 0
    assert darkness[1] > 0


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_loses_nothing_else(tmp_path: Path) -> None:
    report = report_of()
    for folder, blocked in ((tmp_path / "a", "confusion.png"), (tmp_path / "b", "curves.png")):
        (folder / blocked / "in the way").mkdir(parents=True)
        images = torch.zeros(report.images, 32, 32, 3, dtype=torch.uint8)
        (failure,) = draw_report(report, images, LOG, folder, "A net")
        assert failure.startswith(f"{blocked} could not be drawn")
        others = {"curves.png", "confusion.png", "mistakes.png"} - {blocked}
        assert all((folder / name).is_file() for name in others)


def test_more_classes_than_a_matrix_holds() -> None:
    logits = torch.randn(10, 3000)
    report = build_report(logits, logits, torch.arange(10), tuple(map(str, range(3000))))
    assert report.confusion is None
    assert sum(row.support for row in report.classes) == 10
    page = report_markdown(report, title="A net", about="About.", choices=[], usage="Use it.")
    assert "confusion.png" not in page


def test_text_of_the_page_is_text_alone() -> None:
    names = ("<script>x</script>", "a | b", "[x](https://a.b)", "\x1b[31m", "$x$", "_y_", "\udcff")
    page = report_markdown(
        report_of(names), title=names[0], about=names[1], choices=[(names[2], names[4])], usage="Use it."
    )
    page.encode("utf-8")
    assert "<script>" not in page
    assert "\x1b" not in page
    for shown in (r"| a \| b | ", r"\[x\](https:\//a.b)", r"\$x\$", r"\_y\_", r"\\xff", r"\\x1b\[31m"):
        assert shown in page
