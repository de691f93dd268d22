"""The curves of a training as a picture."""

import math
from pathlib import Path
from typing import Any

from conam_zoo.escape import for_matplotlib
from conam_zoo.files import write_figure
from conam_zoo.layers.confidence import EVEN
from conam_zoo.training.run_folder import LIVENESS, liveness_columns

__all__ = ["draw_curves"]


def draw_curves(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss, accuracy, learning rate and, where the log has it, each site's liveness over the epochs as a PNG."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in log]
    style: dict[str, Any] = {"marker": "o"} if len(log) == 1 else {}  # a line of one point cannot be seen
    sites = liveness_columns(log)
    panels = 4 if sites else 3
    figure = Figure(figsize=(3.4 * panels, 3.4), layout="constrained")
    loss, accuracy, rate, *further = figure.subplots(1, panels)
    loss.plot(epochs, [row["loss"] for row in log], color="tab:blue", **style)
    loss.set_ylabel("training loss")
    accuracy.plot(
        epochs, [row["train_top1_percent"] for row in log], color="tab:blue", label="training, augmented", **style
    )
    held = [(row["epoch"], row["holdout_top1_percent"]) for row in log if row["holdout_top1_percent"] is not None]
    if held:
        accuracy.plot(*zip(*held, strict=True), color="tab:orange", label="held out", **style)
    accuracy.set_ylabel("top-1 (%)")
    accuracy.legend(loc="lower right", frameon=False)
    rate.plot(epochs, [row["lr"] for row in log], color="tab:gray", **style)
    rate.set_ylabel("learning rate at the epoch's end")
    for alive in further:
        for column in sites:
            values = [row.get(column) for row in log]
            alive.plot(
                epochs,
                [math.nan if value is None else value for value in values],
                label=column.removeprefix(LIVENESS),
                **style,
            )
        alive.axhline(EVEN, color="black", linewidth=0.8, linestyle="--", label=f"{EVEN:.0%}: even below")
        alive.set_ylabel("liveness: std / mean over the patches")
        alive.set_ylim(bottom=0)
        alive.legend(frameon=False, fontsize="small")
    for axes in (loss, accuracy, rate, *further):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(for_matplotlib(title))
    write_figure(path, figure, dpi=120)
