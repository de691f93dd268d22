"""The panels that the sheets are made of: a picture, top-5 bars, and a confidence map over what the net was shown."""

from collections.abc import Sequence

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

from conam_zoo.visualize.predict import percent

__all__ = ["PALE", "STRONG", "draw_bars", "draw_frame", "draw_map", "draw_picture", "draw_scale", "relative"]

# Purple below the mean of a map, white at it, orange above: distinct for every kind of colour vision.
COLOURS = "PuOr_r"
STRONG, PALE = "#6cb4c9", "#d3dfe4"
OUTLINE: list[AbstractPathEffect] = [withStroke(linewidth=1.6, foreground="white")]


def draw_picture(axes: Axes, pixels: NDArray[np.uint8], caption: str = "") -> None:
    """A picture without ticks, scaled down if it is large: (height, width, 3)."""
    image = Image.fromarray(pixels)
    image.thumbnail((400, 400))
    axes.imshow(np.asarray(image))
    axes.set_xlabel(caption, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_bars(axes: Axes, top: list[tuple[str, float]]) -> None:
    """Class names with their probabilities, best first, on one scale from 0 to 1."""
    names = [name.replace("_", " ") for name, _ in top]
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
    scale = TwoSlopeNorm(1, 0, max(largest, 1.5))
    overlay = axes.imshow(relative(confidence), cmap=COLOURS, alpha=0.6, norm=scale, extent=extent)
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
    """The colour bar of all maps, with their mean marked.

    Args:
        figure: Where to draw.
        overlay: What ``draw_map`` gave.
        axes: The panels that the bar stands beside.
        maps: What was drawn.
    """
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
        bar.set_label(f"confidence as a multiple of the even share, {share} (line)", fontsize=8)
    else:
        bar.set_label("gate as a multiple of its map's mean (line)", fontsize=8)
    return bar
