"""Predictions and explanations as pictures, and the panels of these: photograph, top-5 bars, confidence maps."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from conam_zoo.errors import UserError
from conam_zoo.escape import for_matplotlib
from conam_zoo.files import check_suffix, write_figure
from conam_zoo.layers.confidence import Patch
from conam_zoo.models.registry import open_model
from conam_zoo.visualize.explain import Explanation, PatchEffect, SiteExplanation
from conam_zoo.visualize.predict import Prediction, edges, percent, predict

SHEET_ROWS = 20  # pictures of one sheet: time and memory of the layout grow faster than their number
MOST_PICTURES = 100  # explained on one sheet: two rows each still stay below the 65,535 pixels that a PNG writer takes
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


def class_label(name: str, longest: int = 24) -> str:
    """The name of a class for a figure."""
    return caption(name.replace("_", " "), longest)


def sheet_paths(path: Path) -> Iterator[Path]:
    """The names of several sheets: ``sheet.png``, ``sheet-2.png``, ``sheet-3.png``, …"""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


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
    axes: Axes, seen: NDArray[np.uint8], confidence: NDArray[np.float32], largest: float, patch: Patch | None = None
) -> ScalarMappable:
    """A confidence map (rows, columns) over the picture (H, W, 3) that the net was shown.

    A patch's number is its confidence in percent; a map of more than eight patches a side has none. Its colour is the
    multiple of the map's mean: white at 1, purple below, orange above, up to ``largest``. ``patch`` is the size of a
    whole patch, as shares of height and width; None for patches of one size.
    """
    rows, columns = confidence.shape
    height, width = seen.shape[:2]
    high, wide = patch or (1 / rows, 1 / columns)
    lower, right = (np.array(edges(*side)) for side in ((rows, high), (columns, wide)))
    y, x = lower * height - 0.5, right * width - 0.5
    grey = np.asarray(Image.fromarray(seen).convert("L"))
    axes.imshow(grey, cmap="gray", vmin=-60, vmax=255)  # no deep black: the colours have to show
    overlay = axes.pcolormesh(x, y, relative(confidence), cmap=COLOURS, alpha=0.6, norm=colour_scale(largest))
    for (row, column), share in np.ndenumerate(confidence if max(rows, columns) <= 8 else confidence[:0]):
        place = x[column : column + 2].mean(), y[row : row + 2].mean()
        text = axes.text(*place, f"{100 * share:.1f}", ha="center", va="center", fontsize=7.5, color="black")
        text.set_path_effects(OUTLINE)
    axes.set_xticks([])
    axes.set_yticks([])
    return overlay


def draw_scale(
    figure: Figure, overlay: ScalarMappable, axes: list[Axes], maps: Sequence[NDArray[np.float32]]
) -> Colorbar:
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
    """Write a PNG with one row for each prediction; all maps share one scale of colours."""
    check_suffix(path, ".png")
    columns = 2 + len(predictions[0].maps)
    figure = Figure(figsize=(2.1 * columns + 1.2, 2.05 * len(predictions) + 0.7), layout="constrained")
    _draw_rows(_grid(figure, len(predictions), columns), predictions)
    _write(figure, path, title)


def draw_explanations(explanations: list[Explanation], path: Path, title: str, *, contact_sheet: bool = False) -> None:
    """Write a PNG of explanations; all maps share one scale of colours.

    In detail, a picture takes two rows: the picture, its five most probable classes and the confidence maps with the
    most confident patch framed; below, what the net was shown, the probability of its answer after a patch is blurred,
    and the blurred pictures. On a contact sheet a picture takes one row, with the probabilities below the maps. More
    pictures than one sheet holds are refused.
    """
    check_suffix(path, ".png")
    if len(explanations) > MOST_PICTURES:
        raise UserError(f"{len(explanations)} pictures are too many for one sheet: explain at most {MOST_PICTURES}.")
    lines = 1 if contact_sheet else 2
    rows, columns = lines * len(explanations), 2 + len(explanations[0].sites)
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06)
    figure = Figure(figsize=(2.15 * columns + 1.2, 2.3 * rows + 0.8), layout=layout)
    grid = _grid(figure, rows, columns)
    _draw_rows(grid, explanations, lines)
    for index, explanation in enumerate(explanations):
        for panel, site in zip(grid[lines * index][2:], explanation.sites, strict=True):
            _draw_frame(panel, explanation, site)
            if contact_sheet:
                panel.set_xlabel(_change(explanation, site.most), fontsize=7.5)
        if not contact_sheet:
            _draw_effects(grid[2 * index + 1], explanation)
    _write(figure, path, title)


def draw_card_picture(folder: Path, photographs: Path) -> Path:
    """Write the picture of a model card, ``confidence.png``, into a folder of weights."""
    picture = folder / "confidence.png"
    predictions = predict(open_model(f"local-dir:{folder}"), [photographs / name for name in PHOTOGRAPHS])
    draw_sheet(predictions, picture, title=folder.name)
    return picture


def _grid(figure: Figure, rows: int, columns: int) -> Any:
    return figure.subplots(rows, columns, squeeze=False, width_ratios=[1, 1.25, *[1] * (columns - 2)])


def _write(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(caption(title, 80), fontsize=11)
    write_figure(path, figure, dpi=130, format="png")


def _draw_rows(grid: Any, shown: Sequence[Prediction | Explanation], lines: int = 1) -> None:
    """Every ``lines`` rows of panels: a picture, its five classes, and its maps, with titles above and their scale."""
    maps = [np.asarray(map_) for each in shown for map_ in each.maps.values()]
    largest = max((float(relative(each).max()) for each in maps), default=1.0)
    overlay = None
    for axes, each in zip(grid[::lines], shown, strict=True):
        _draw_picture(axes[0], np.asarray(each.image), caption(each.path.name))
        bars = [(class_label(name), probability) for name, probability in each.top]
        _draw_bars(axes[1], bars, [STRONG] + [PALE] * (len(bars) - 1), fontsize=8)
        for panel, (site, map_) in zip(axes[2:], each.maps.items(), strict=True):
            overlay = draw_map(panel, np.asarray(each.seen), np.asarray(map_), largest, each.patches[site])
    titles = ("image", "top 5, probability", *(site.removesuffix(".attn") for site in shown[0].maps))
    for panel, title in zip(grid[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    if overlay is not None:
        draw_scale(grid[0][0].figure, overlay, list(grid[:, 2:].flat), maps)


def _draw_picture(axes: Axes, pixels: NDArray[np.uint8], text: str) -> None:
    """A picture (height, width, 3) without ticks, scaled down if it is large; ``text`` comes from ``caption``."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    axes.imshow(np.asarray(image))
    axes.set_xlabel(text, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_bars(axes: Axes, bars: list[tuple[str, float]], colours: list[str], fontsize: float) -> None:
    """Names with their probabilities, on one scale from 0 to 1."""
    axes.barh(list(range(len(bars))), [value for _, value in bars], color=colours, height=0.72)
    for position, (name, value) in enumerate(bars):
        axes.text(0.02, position, f"{name}  {percent(value)}", va="center", fontsize=fontsize, color="black")
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(bars), 1) - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_frame(axes: Axes, explanation: Explanation, site: SiteExplanation) -> None:
    """A frame round the most confident patch of a panel that shows the picture."""
    if site.most is None:
        return
    (height, width), (rows, columns), (high, wide) = explanation.seen.shape[:2], site.confidence.shape, site.patch
    top, bottom = (edge * height for edge in edges(rows, high)[site.most.row : site.most.row + 2])
    left, right = (edge * width for edge in edges(columns, wide)[site.most.column : site.most.column + 2])
    inset = 0.06 * min(right - left, bottom - top)  # inside the patch, so that no edge of the picture cuts it
    corner = (left - 0.5 + inset, top - 0.5 + inset)
    sides = (right - left - 2 * inset, bottom - top - 2 * inset)
    for colour, line in (("black", 3.0), ("white", 1.2)):
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=line, zorder=3))


def _draw_effects(axes: Sequence[Axes], explanation: Explanation) -> None:
    """The lower row: what the net sees, the probabilities of its answer after blurring, and the blurred pictures."""
    height, width = explanation.seen.shape[:2]
    _draw_picture(axes[0], explanation.seen, f"what the net sees, {width} x {height}")
    answer = explanation.predicted
    bars, colours = [], []
    for site in explanation.sites:
        for word, effect, colour in (("most", site.most, STRONG), ("least", site.least, PALE)):
            if effect is not None:
                name = f"{site.site.removesuffix('.attn')}, {word} confident"
                bars.append((name, float(effect.probabilities[answer])))
                colours.append(colour)
    _draw_bars(axes[1], bars, colours, fontsize=6.5)
    axes[1].axvline(float(explanation.probabilities[answer]), color="black", linewidth=1, linestyle=(0, (4, 2)))
    axes[1].set_title(f"{class_label(explanation.classes[answer])} after blurring one patch", fontsize=8)
    axes[1].set_xlabel("dashed: the picture as it is", fontsize=7)
    for panel, site in zip(axes[2:], explanation.sites, strict=True):
        shown = explanation.seen if site.most is None else site.most.blurred
        _draw_picture(panel, shown, _change(explanation, site.most))
        _draw_frame(panel, explanation, site)


def _change(explanation: Explanation, effect: PatchEffect | None) -> str:
    """What blurring did to the answer, as one line."""
    if effect is None:
        return "all patches alike: none blurred"

    def said(label: int) -> str:
        return class_label(explanation.classes[label])

    answer, now = explanation.predicted, int(effect.probabilities.argmax())
    before, after = (percent(float(each[answer])) for each in (explanation.probabilities, effect.probabilities))
    other = f" ({said(now)} {percent(float(effect.probabilities[now]))})" if now != answer else ""
    return f"{said(answer)} {before} → {after}{other}"
