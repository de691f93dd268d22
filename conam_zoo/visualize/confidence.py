"""The confidence maps of a net, site by site."""

from functools import partial

import torch
from torch import Tensor, nn

from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.conam_variant import ConfidenceAttentionVariant

__all__ = ["confidence_maps"]


@torch.inference_mode()
def confidence_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the confidence map of every ConAM, or form of it, in the net.

    Args:
        model: A net in evaluation mode; a plain net gives no maps.
        images: Normalised images, (N, C, H, W).

    Returns:
        Logits (N, classes), and for each site's module name, in order of execution, a map (N, rows, columns) whose
        entries sum to 1 for each image, unless the net has another form of ConAM.
    """
    maps: dict[str, Tensor] = {}

    def keep(site: str, module: ConAM | ConfidenceAttentionVariant, inputs: tuple[Tensor]) -> None:
        maps[site] = module.confidence(inputs[0])

    hooks = [
        module.register_forward_pre_hook(partial(keep, name))
        for name, module in model.named_modules()
        if isinstance(module, ConAM | ConfidenceAttentionVariant)
    ]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, maps
