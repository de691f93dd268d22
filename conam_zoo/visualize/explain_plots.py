"""Explanations as a picture: in detail, or as a contact sheet with one row for each picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine

from conam_zoo.errors import UserError
from conam_zoo.files import write_figure
from conam_zoo.inputs import check_suffix
from conam_zoo.visualize.explain import Explanation, PatchEffect, SiteExplanation
from conam_zoo.visualize.plots import (
    PALE,
    STRONG,
    caption,
    draw_bars,
    draw_frame,
    draw_map,
    draw_picture,
    draw_scale,
    relative,
)
from conam_zoo.visualize.predict import percent

__all__ = ["draw_explanations"]

MOST_PICTURES = 100  # two rows each still stay below the 65,535 pixels that a PNG writer takes


def draw_explanations(explanations: list[Explanation], path: Path, title: str, *, contact_sheet: bool = False) -> None:
    """Write a PNG of explanations; all maps share one scale of colours.

    In detail, a picture takes two rows: the picture, its five most probable classes and the confidence maps with the
    most confident patch framed; below, what the net was shown, the probability of its answer after a patch is blurred,
    and the blurred pictures. On a contact sheet a picture takes one row, with the probabilities below the maps.

    Raises:
        UserError: If the file cannot be written, or there are too many pictures for one.
    """
    check_suffix(path, ".png")
    if len(explanations) > MOST_PICTURES:
        raise UserError(f"{len(explanations)} pictures are too many for one sheet: explain at most {MOST_PICTURES}.")
    sites = len(explanations[0].sites)
    lines = 1 if contact_sheet else 2
    rows, columns = lines * len(explanations), 2 + sites
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06)
    figure = Figure(figsize=(2.15 * columns + 1.2, 2.3 * rows + 0.8), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=[1, 1.25, *[1] * sites])
    maps = [site.confidence for explanation in explanations for site in explanation.sites]
    largest = max(float(relative(each).max()) for each in maps)
    overlay = None
    for index, explanation in enumerate(explanations):
        overlay = _draw_upper(grid[lines * index], explanation, largest)
        if contact_sheet:
            _caption_maps(grid[index][2:], explanation)
        else:
            _draw_lower(grid[2 * index + 1], explanation)
    grid[0][0].set_title("image", fontsize=9)
    grid[0][1].set_title("top 5, probability", fontsize=9)
    for panel, site in zip(grid[0][2:], explanations[0].sites, strict=True):
        panel.set_title(site.site.removesuffix(".attn"), fontsize=9)
    assert overlay is not None  # there is at least one explanation with one site
    draw_scale(figure, overlay, list(grid[:, 2:].flat), maps)
    figure.suptitle(caption(title, 80), fontsize=11)
    write_figure(path, figure, dpi=130, format="png")


def _draw_upper(axes: list[Axes], explanation: Explanation, largest: float) -> AxesImage | None:
    overlay = None
    draw_picture(axes[0], explanation.image, caption(explanation.path.name))
    draw_bars(axes[1], explanation.top)
    for panel, site in zip(axes[2:], explanation.sites, strict=True):
        overlay = draw_map(panel, explanation.seen, site.confidence, largest)
        _frame(panel, explanation, site)
    return overlay


def _draw_lower(axes: list[Axes], explanation: Explanation) -> None:
    height, width = explanation.seen.shape[:2]
    draw_picture(axes[0], explanation.seen, f"what the net sees, {width} x {height}")
    _draw_effects(axes[1], explanation)
    for panel, site in zip(axes[2:], explanation.sites, strict=True):
        draw_picture(
            panel, explanation.seen if site.most is None else site.most.blurred, _change(explanation, site.most)
        )
        _frame(panel, explanation, site)


def _frame(panel: Axes, explanation: Explanation, site: SiteExplanation) -> None:
    if site.most is not None:
        draw_frame(panel, explanation.seen, (site.most.row, site.most.column), site.confidence.shape)


def _draw_effects(axes: Axes, explanation: Explanation) -> None:
    """Probability of the answer after blurring, for each site: most confident patch, and least for comparison."""
    answer = explanation.predicted
    names, values, colours = [], [], []
    for site in explanation.sites:
        for word, effect, colour in (("most", site.most, STRONG), ("least", site.least, PALE)):
            if effect is None:
                continue
            names.append(f"{site.site.removesuffix('.attn')}, {word} confident")
            values.append(float(effect.probabilities[answer]))
            colours.append(colour)
    positions = list(range(len(names)))
    axes.barh(positions, values, color=colours, height=0.72)
    axes.axvline(float(explanation.probabilities[answer]), color="black", linewidth=1, linestyle=(0, (4, 2)))
    for position, name, value in zip(positions, names, values, strict=True):
        axes.text(0.02, position, f"{name}  {percent(value)}", va="center", fontsize=6.5, color="black")
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{_name(explanation, answer)} after blurring one patch", fontsize=8)
    axes.set_xlabel("dashed: the picture as it is", fontsize=7)


def _caption_maps(panels: list[Axes], explanation: Explanation) -> None:
    for panel, site in zip(panels, explanation.sites, strict=True):
        panel.set_xlabel(_change(explanation, site.most), fontsize=7.5)


def _change(explanation: Explanation, effect: PatchEffect | None) -> str:
    """What blurring did to the answer, as one line."""
    if effect is None:
        return "all patches alike: none blurred"
    answer, now = explanation.predicted, int(effect.probabilities.argmax())
    before = f"{_name(explanation, answer)} {percent(float(explanation.probabilities[answer]))}"
    change = f"{before} → {percent(float(effect.probabilities[answer]))}"
    if now != answer:
        change += f" ({_name(explanation, now)} {percent(float(effect.probabilities[now]))})"
    return change


def _name(explanation: Explanation, label: int) -> str:
    return caption(explanation.classes[label].replace("_", " "), 24)
