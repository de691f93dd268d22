"""The confidence maps of a net, site by site, and how much they differ between patches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def has_confidence(module: nn.Module) -> bool:
    """Whether it is ConAM, or another attention that has a confidence for every patch."""
    return callable(getattr(module, "confidence", None))


Patch = tuple[float, float]  # the sides of a whole patch, as shares of the map's height and width


@contextmanager
def recorded_confidences(
    model: nn.Module, sites: Iterable[str], patches: dict[str, Patch] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The confidences (N, rows, columns) at ``sites``, by module name, in every pass of the net while it is entered.

    ``patches`` gets the size of a patch at each site; a map is cut evenly if its module has no ``patch_size`` that
    gives so many patches.
    """
    maps: dict[str, Tensor] = {}

    def keep(site: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        maps[site] = module.confidence(inputs[0])  # type: ignore[operator]
        if patches is not None:
            side, sizes, counts = getattr(module, "patch_size", 0), inputs[0].shape[-2:], maps[site].shape[-2:]
            whole = isinstance(side, int) and side > 0 and [-(-size // side) for size in sizes] == list(counts)
            height, width = (side / size if whole else 1 / count for size, count in zip(sizes, counts, strict=True))
            patches[site] = height, width

    hooks = [model.get_submodule(site).register_forward_pre_hook(partial(keep, site)) for site in sites]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def confidence_maps(
    model: nn.Module, images: Tensor, patches: dict[str, Patch] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the confidences of every ConAM, or form of it, in a net in evaluation mode.

    Shape: normalised images (N, C, H, W) -> logits (N, classes), and for each site's module name, in order of
    execution, a map (N, rows, columns); ConAM's sum to 1 for each image. For ``patches`` see ``recorded_confidences``.
    """
    sites = [name for name, module in model.named_modules() if has_confidence(module)]
    with recorded_confidences(model, sites, patches) as maps:
        return model(images), maps


def liveness(model: nn.Module, images: Tensor) -> dict[str, float]:
    """How much each site's confidences differ between patches: 0 where the attention is the same everywhere.

    It is the coefficient of variation over the patches (population standard deviation / mean), averaged over normalised
    images (N, C, H, W), for each site's module name in order of execution. Sites with other attentions have none, nor
    have forms of ConAM whose confidences are not positive. The net is measured in evaluation mode and left as it is.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        _, maps = confidence_maps(model, images)
    finally:
        for module, training in modes:
            module.training = training
    confidences = {site: values.double().flatten(1) for site, values in maps.items()}
    return {
        site: (eta.std(dim=1, correction=0) / eta.mean(dim=1)).mean().item()
        for site, eta in confidences.items()
        if (eta.mean(dim=1) > 0).all()
    }
