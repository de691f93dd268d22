"""Explaining a classification: where each ConAM is confident, and what the net says when that patch is blurred."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from conam_zoo.errors import UserError
from conam_zoo.layers.confidence import Patch, has_confidence
from conam_zoo.models import StagedClassifier
from conam_zoo.visualize.predict import Prediction, Skip, class_names, edges, predict_each, split_transform

FLAT = 0.01  # a map whose confidences differ by less than this share of their mean has no most confident patch

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class PatchEffect:
    """What the net says when one patch of the picture is blurred."""

    row: int  # of the patch in the confidence map
    column: int
    blurred: Pixels  # the picture with that patch blurred, (H, W, 3)
    probabilities: Values  # of every class, (classes,)


@dataclass(frozen=True)
class SiteExplanation:
    """One ConAM of the net, with the effects of blurring two patches; None where no patch stands out."""

    site: str  # name of the module, such as ``layer3.0.attn``
    confidence: Values  # its map, (rows, columns)
    patch: Patch  # size of a whole patch, as shares of the picture's height and width
    most: PatchEffect | None  # of the patch with the highest confidence
    least: PatchEffect | None  # of the patch with the lowest, to compare ``most`` with


@dataclass(frozen=True)
class Explanation:
    """What a net makes of one picture, and why as far as ConAM tells."""

    path: Path
    image: Pixels  # upright and RGB, in its own size unless a smaller one was asked for, (height, width, 3)
    seen: Pixels  # what the net was shown, (H, W, 3)
    classes: tuple[str, ...]  # in the order of the probabilities
    probabilities: Values  # of every class, (classes,)
    top: list[tuple[str, float]]  # the five most probable classes with their probabilities, best first
    sites: tuple[SiteExplanation, ...]  # in order of execution

    @property
    def predicted(self) -> int:
        """Index of the most probable class."""
        return int(self.probabilities.argmax())

    @property
    def maps(self) -> dict[str, Values]:
        """The confidence maps by site."""
        return {each.site: each.confidence for each in self.sites}

    @property
    def patches(self) -> dict[str, Patch]:
        """The size of a whole patch by site."""
        return {each.site: each.patch for each in self.sites}


def explain(model: StagedClassifier, paths: Iterable[str | Path], sites: list[str] | None = None) -> list[Explanation]:
    """Classify pictures, and for every ConAM blur its most and its least confident patch and classify again.

    A patch is blurred by a Gaussian with half its side as standard deviation, in the picture that the net is shown.
    The net is in evaluation mode and has ConAM, or a form of it, at ``sites`` (module names with or without ``.attn``;
    all if None). The file ``-`` is standard input.
    """
    return list(explain_each(model, paths, sites))


def explain_each(
    model: StagedClassifier,
    paths: Iterable[str | Path],
    sites: list[str] | None = None,
    *,
    side: int | None = None,
    skip: Skip | None = None,
    say: Callable[[str], object] | None = None,
) -> Iterator[Explanation]:
    """The explanations one after the other; for ``side``, ``skip`` and ``say`` see ``predict_each``."""
    known = [name for name, module in model.named_modules() if has_confidence(module)]
    if not known:
        raise UserError(
            f"A net with attn_layer {model.attn_layer!r} has no confidence maps to explain: use 'conam predict'."
        )
    wanted: dict[str, None] = {}
    for site in sites or known:
        if not (found := [name for name in (site, f"{site}.attn") if name in known]):
            raise UserError(f"There is no ConAM at {site!r}: the net has {', '.join(known)}.")
        wanted |= dict.fromkeys(found)
    for prediction in predict_each(model, paths, side=side, skip=skip, say=say):
        yield _explain(model, prediction, list(wanted))


def _explain(model: StagedClassifier, prediction: Prediction, sites: list[str]) -> Explanation:
    maps = {site: prediction.maps[site].numpy() for site in sites}
    places: dict[tuple[str, str], tuple[int, int]] = {}  # of the patches to blur, by site and kind
    for site, map_ in maps.items():
        if np.ptp(map_) > FLAT * abs(map_.mean()):
            for kind, index in (("most", map_.argmax()), ("least", map_.argmin())):
                row, column = np.unravel_index(index, map_.shape)
                places[site, kind] = int(row), int(column)
    blurred = [
        _blur(prediction.seen, place, maps[site].shape, prediction.patches[site]) for (site, _), place in places.items()
    ]
    effects = {
        key: PatchEffect(*place, np.asarray(picture), after)
        for (key, place), picture, after in zip(places.items(), blurred, _classify(model, blurred), strict=True)
    }
    return Explanation(
        path=prediction.path,
        image=np.asarray(prediction.image),
        seen=np.asarray(prediction.seen),
        classes=tuple(class_names(model)),
        probabilities=prediction.probabilities.numpy(),
        top=prediction.top,
        sites=tuple(
            SiteExplanation(
                site,
                maps[site],
                prediction.patches[site],
                most=effects.get((site, "most")),
                least=effects.get((site, "least")),
            )
            for site in sites
        ),
    )


def _classify(model: StagedClassifier, pictures: list[Image.Image]) -> list[Values]:
    """The probabilities of all classes for pictures of the size that the net takes."""
    if not pictures:
        return []
    _, normalize = split_transform(model)
    batch = torch.stack([normalize(picture) for picture in pictures])
    with torch.inference_mode():
        logits = model(batch.to(next(model.parameters()).device))
    return list(logits.float().softmax(1).cpu().numpy())


def _blur(picture: Image.Image, place: tuple[int, int], grid: tuple[int, ...], patch: Patch) -> Image.Image:
    """The picture with one patch of a grid blurred."""
    top, bottom, left, right = (
        round(edge * length)
        for index, count, share, length in zip(place, grid, patch, reversed(picture.size), strict=True)
        for edge in edges(count, share)[index : index + 2]
    )
    box = (left, top, right, bottom)
    # The whole picture is blurred and one patch of it taken: what leaks in comes from around it, as in any blur.
    smooth = picture.filter(ImageFilter.GaussianBlur(max(right - left, bottom - top) / 2))
    result = picture.copy()
    result.paste(smooth.crop(box), box)
    return result
