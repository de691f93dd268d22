"""Predictions as a picture: photograph, top-5 bars, and the confidence map of every ConAM site."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from conam_zoo.analysis.predict import Prediction, percent
from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically

__all__ = ["draw_sheet"]


def draw_sheet(predictions: list[Prediction], path: Path, title: str) -> None:
    """Write a PNG with one row for each prediction.

    The maps lie over what the net was shown. A patch's number is its confidence in percent; the colour says how far it
    lies from the even share (one over the number of patches), on one scale for the whole sheet.

    Raises:
        UserError: If the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} cannot be written: the sheet is a PNG, so its name has to end in .png.")
    sites = list(predictions[0].maps)
    columns = 2 + len(sites)
    figure = Figure(figsize=(2.1 * columns + 1.2, 2.05 * len(predictions) + 0.7), layout="constrained")
    grid = figure.subplots(len(predictions), columns, squeeze=False, width_ratios=[1, 1.25, *[1] * len(sites)])
    largest = max((float((m * m.numel()).max()) for p in predictions for m in p.maps.values()), default=1.0)
    overlay = None
    for row, (axes, prediction) in enumerate(zip(grid, predictions, strict=True)):
        _draw_photo(axes[0], prediction)
        _draw_bars(axes[1], prediction)
        for site, panel in zip(sites, axes[2:], strict=True):
            overlay = _draw_map(panel, prediction, prediction.maps[site], largest)
            if row == 0:
                panel.set_title(site.removesuffix(".attn"), fontsize=9)
        if row == 0:
            axes[0].set_title("image", fontsize=9)
            axes[1].set_title("top 5, probability", fontsize=9)
    if overlay is not None:
        bar = figure.colorbar(overlay, ax=grid[:, 2:], shrink=0.9, aspect=40, pad=0.01)
        bar.set_label("confidence as a multiple of the even share", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _draw_photo(axes: Axes, prediction: Prediction) -> None:
    image = prediction.image.copy()
    image.thumbnail((400, 400))
    axes.imshow(np.array(image))
    axes.set_xlabel(prediction.path.name, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_bars(axes: Axes, prediction: Prediction) -> None:
    names = [name.replace("_", " ") for name, _ in prediction.top]
    values = [probability for _, probability in prediction.top]
    positions = range(len(names))
    axes.barh(list(positions), values, color=["#6cb4c9"] + ["#d3dfe4"] * (len(names) - 1), height=0.72)
    for position, name, value in zip(positions, names, values, strict=True):
        axes.text(0.02, position, f"{name}  {percent(value)}", va="center", fontsize=8, color="black")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_map(axes: Axes, prediction: Prediction, confidence: Tensor, largest: float) -> AxesImage:
    rows, columns = confidence.shape
    width, height = prediction.seen.size
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(np.array(prediction.seen.convert("L")), cmap="gray", vmin=0, vmax=255, extent=extent)
    overlay = axes.imshow(
        (confidence * confidence.numel()).numpy(), cmap="viridis", alpha=0.6, vmin=0, vmax=largest, extent=extent
    )
    for row in range(rows):
        for column in range(columns):
            axes.text(
                (column + 0.5) * width / columns - 0.5,
                (row + 0.5) * height / rows - 0.5,
                f"{100 * confidence[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="black" if confidence[row, column] * confidence.numel() > 0.6 * largest else "white",
            )
    axes.set_xticks([])
    axes.set_yticks([])
    return overlay
