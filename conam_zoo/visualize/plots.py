"""Predictions as a picture, and the panels of it: photograph, top-5 bars, confidence map of every ConAM site."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from conam_zoo.escape import for_matplotlib
from conam_zoo.files import write_figure
from conam_zoo.inputs import check_suffix
from conam_zoo.models.registry import open_model
from conam_zoo.visualize.predict import Prediction, percent, predict

__all__ = [
    "COLOURS",
    "PALE",
    "SHEET_ROWS",
    "STRONG",
    "THUMBNAIL",
    "caption",
    "colour_scale",
    "draw_bars",
    "draw_card_picture",
    "draw_frame",
    "draw_map",
    "draw_picture",
    "draw_scale",
    "draw_sheet",
    "relative",
    "sheet_path",
]

SHEET_ROWS = 20  # pictures of one sheet: time and memory of the layout grow faster than their number
THUMBNAIL = 400  # pixels of a photograph's longer side on a sheet
# Both are CC0, so that a card may carry them; see examples/photos/LICENSES.md.
PHOTOGRAPHS = ("bird.jpg", "cat.jpg")

# Purple below the mean of a map, white at it, orange above: distinct for every kind of colour vision.
COLOURS = "PuOr_r"
STRONG, PALE = "#6cb4c9", "#d3dfe4"
OUTLINE: list[AbstractPathEffect] = [withStroke(linewidth=1.6, foreground="white")]
SHORT = 4.0  # inches: in a figure that is lower, the label of the colour bar takes two lines


def caption(text: str, longest: int = 30) -> str:
    """A name for a figure: shortened in its middle, and drawn as it is."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[len(text) - (longest - longest // 2 - 1) :]}"
    return for_matplotlib(text)


def sheet_path(path: Path, number: int) -> Path:
    """The name of one of several sheets: ``sheet.png``, ``sheet-2.png``, ``sheet-3.png``."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def draw_picture(axes: Axes, pixels: NDArray[np.uint8], text: str = "") -> None:
    """A picture (height, width, 3) without ticks, scaled down if it is large; ``text`` comes from ``caption``."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    axes.imshow(np.asarray(image))
    axes.set_xlabel(text, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_bars(axes: Axes, top: list[tuple[str, float]]) -> None:
    """Class names with their probabilities, best first, on one scale from 0 to 1."""
    names = [caption(name.replace("_", " "), 24) for name, _ in top]
    values = [probability for _, probability in top]
    positions = range(len(names))
    axes.barh(list(positions), values, color=[STRONG] + [PALE] * (len(names) - 1), height=0.72)
    for position, name, value in zip(positions, names, values, strict=True):
        axes.text(0.02, position, f"{name}  {percent(value)}", va="center", fontsize=8, color="black")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def relative(confidence: NDArray[np.float32]) -> NDArray[np.float32]:
    """A map as multiples of its mean, which is the even share, one over the number of patches, where it sums to one.

    A map whose mean is not above zero, as that of a gate about zero, is given as multiples of the even share.
    """
    mean = confidence.mean()
    return confidence / mean if mean > 0 else confidence * confidence.size


def colour_scale(largest: float) -> TwoSlopeNorm:
    """Where a multiple of the mean stands in ``COLOURS``: 1 in the middle, ``largest`` at the upper end."""
    return TwoSlopeNorm(1, 0, max(largest, 1.5))


def draw_map(
    axes: Axes, seen: NDArray[np.uint8], confidence: NDArray[np.float32], largest: float, fontsize: float = 7.5
) -> AxesImage:
    """A confidence map over the picture that the net was shown.

    A patch's number is its confidence in percent; its colour is the multiple of the map's mean: white at 1, purple
    below, orange above.

    Args:
        axes: Where to draw.
        seen: The picture, (H, W, 3).
        confidence: The map, (rows, columns).
        largest: Multiple of the mean at the upper end of the colours.
        fontsize: Of the numbers, in points; a map of more than eight patches a side has none.
    """
    rows, columns = confidence.shape
    height, width = seen.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey = np.asarray(Image.fromarray(seen).convert("L"))
    axes.imshow(grey, cmap="gray", vmin=-60, vmax=255, extent=extent)  # no deep black: the colours have to show
    overlay = axes.imshow(relative(confidence), cmap=COLOURS, alpha=0.6, norm=colour_scale(largest), extent=extent)
    if max(rows, columns) <= 8:
        for row in range(rows):
            for column in range(columns):
                text = axes.text(
                    (column + 0.5) * width / columns - 0.5,
                    (row + 0.5) * height / rows - 0.5,
                    f"{100 * confidence[row, column]:.1f}",
                    ha="center",
                    va="center",
                    fontsize=fontsize,
                    color="black",
                )
                text.set_path_effects(OUTLINE)
    axes.set_xticks([])
    axes.set_yticks([])
    return overlay


def draw_frame(axes: Axes, seen: NDArray[np.uint8], patch: tuple[int, int], grid: tuple[int, ...]) -> None:
    """A frame round one patch of a picture (H, W, 3) that is divided into (rows, columns) patches."""
    (row, column), (rows, columns) = patch, grid
    height, width = seen.shape[:2]
    inset = 0.06 * min(width / columns, height / rows)  # inside the patch, so that no edge of the picture cuts it
    corner = (column * width / columns - 0.5 + inset, row * height / rows - 0.5 + inset)
    sides = (width / columns - 2 * inset, height / rows - 2 * inset)
    for colour, line in (("black", 3.0), ("white", 1.2)):
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=line, zorder=3))


def draw_scale(figure: Figure, overlay: AxesImage, axes: list[Axes], maps: Sequence[NDArray[np.float32]]) -> Colorbar:
    """The colour bar of all maps, with their mean marked, beside their panels; ``overlay`` is one of ``draw_map``."""
    bar = figure.colorbar(overlay, ax=axes, shrink=0.9, aspect=40, pad=0.01)
    top = bar.norm.vmax or 1.0
    ticks = [tick for tick in MaxNLocator(5).tick_values(0, top) if 0 <= tick <= top and abs(tick - 1) > 0.15]
    bar.ax.yaxis.set_major_locator(FixedLocator(sorted([*ticks, 1.0])))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=7)
    bar.ax.axhline(1, color="black", linewidth=1)
    patches = {each.size for each in maps}
    if all(abs(each.sum() - 1) < 1e-3 for each in maps):
        share = f"1/{patches.pop()}" if len(patches) == 1 else "1/patches"
        label = ("confidence as a multiple of", f"the even share, {share} (line)")
    else:
        label = ("gate as a multiple", "of its map's mean (line)")
    bar.set_label(("\n" if figure.get_figheight() < SHORT else " ").join(label), fontsize=8)
    return bar


def draw_sheet(predictions: list[Prediction], path: Path, title: str) -> None:
    """Write a PNG with one row for each prediction.

    The maps lie over what the net was shown. A patch's number is its confidence in percent; the colour says how far it
    lies from the map's mean, the even share of one over the number of patches, on one scale for the whole sheet.

    Raises:
        UserError: If the file cannot be written.
    """
    check_suffix(path, ".png")
    sites = list(predictions[0].maps)
    columns = 2 + len(sites)
    figure = Figure(figsize=(2.1 * columns + 1.2, 2.05 * len(predictions) + 0.7), layout="constrained")
    grid = figure.subplots(len(predictions), columns, squeeze=False, width_ratios=[1, 1.25, *[1] * len(sites)])
    maps = [m.numpy() for p in predictions for m in p.maps.values()]
    largest = max((float(relative(each).max()) for each in maps), default=1.0)
    overlay = None
    for row, (axes, prediction) in enumerate(zip(grid, predictions, strict=True)):
        draw_picture(axes[0], np.asarray(prediction.image), caption(prediction.path.name))
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
    figure.suptitle(caption(title, 80), fontsize=11)
    write_figure(path, figure, dpi=130, format="png")


def draw_card_picture(folder: Path, photographs: Path) -> Path:
    """Write the picture of a model card, ``confidence.png``, into a folder of weights.

    Raises:
        UserError: If a photograph is missing or the picture cannot be written.
    """
    picture = folder / "confidence.png"
    predictions = predict(open_model(f"local-dir:{folder}"), [photographs / name for name in PHOTOGRAPHS])
    draw_sheet(predictions, picture, title=folder.name)
    return picture
