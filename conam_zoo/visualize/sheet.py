"""Predictions as a picture: photograph, top-5 bars, and the confidence map of every ConAM site."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically
from conam_zoo.visualize.panels import draw_bars, draw_map, draw_picture, draw_scale, relative
from conam_zoo.visualize.predict import Prediction

__all__ = ["check_png", "draw_sheet"]


def check_png(path: Path) -> None:
    """Refuse a name for a sheet that is none of a PNG.

    Raises:
        UserError: If the name does not end in ``.png``.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} cannot be written: the sheet is a PNG, so its name has to end in .png.")


def draw_sheet(predictions: list[Prediction], path: Path, title: str) -> None:
    """Write a PNG with one row for each prediction.

    The maps lie over what the net was shown. A patch's number is its confidence in percent; the colour says how far it
    lies from the map's mean, the even share of one over the number of patches, on one scale for the whole sheet.

    Raises:
        UserError: If the file cannot be written.
    """
    check_png(path)
    sites = list(predictions[0].maps)
    columns = 2 + len(sites)
    figure = Figure(figsize=(2.1 * columns + 1.2, 2.05 * len(predictions) + 0.7), layout="constrained")
    grid = figure.subplots(len(predictions), columns, squeeze=False, width_ratios=[1, 1.25, *[1] * len(sites)])
    maps = [m.numpy() for p in predictions for m in p.maps.values()]
    largest = max((float(relative(each).max()) for each in maps), default=1.0)
    overlay = None
    for row, (axes, prediction) in enumerate(zip(grid, predictions, strict=True)):
        draw_picture(axes[0], np.asarray(prediction.image), prediction.path.name)
        draw_bars(axes[1], prediction.top)
        for site, panel in zip(sites, axes[2:], strict=True):
            overlay = draw_map(panel, np.asarray(prediction.seen), prediction.maps[site].numpy(), largest)
            if row == 0:
                panel.set_title(site.removesuffix(".attn"), fontsize=9)
        if row == 0:
            axes[0].set_title("image", fontsize=9)
            axes[1].set_title("top 5, probability", fontsize=9)
    if overlay is not None:
        draw_scale(figure, overlay, list(grid[:, 2:].flat), maps)
    figure.suptitle(title, fontsize=11)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
