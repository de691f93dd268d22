"""The curves of a training as a picture."""

from pathlib import Path
from typing import Any

from conam_zoo.files import write_atomically

__all__ = ["draw_curves"]


def draw_curves(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss, accuracy and learning rate over the epochs as a PNG."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in log]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot(epochs, [row["loss"] for row in log], color="tab:blue")
    loss.set_ylabel("training loss")
    accuracy.plot(epochs, [row["train_top1_percent"] for row in log], color="tab:blue", label="training, augmented")
    held = [(row["epoch"], row["holdout_top1_percent"]) for row in log if row["holdout_top1_percent"] is not None]
    if held:
        accuracy.plot(*zip(*held, strict=True), color="tab:orange", label="held out")
    accuracy.set_ylabel("top-1 (%)")
    accuracy.legend(loc="lower right", frameon=False)
    rate.plot(epochs, [row["lr"] for row in log], color="tab:gray")
    rate.set_ylabel("learning rate at the epoch's end")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
