"""The attentions that ConAM is compared with, alone and inside the nets."""

from collections.abc import Sequence

import timm
import torch
from torch import nn

from conam_zoo.errors import UserError
from conam_zoo.layers.registry import TIMM_LAYERS, create_attention
from experiments.speed.rearrange import RearrangeConAM, with_rearrange

__all__ = ["ATTENTIONS", "check_choice", "make_attention", "make_net", "memory_format"]

# The rearrange-based formulation, then timm's layers, then the one without parameters.
ATTENTIONS = ("conam", "rearrange", *TIMM_LAYERS, "simam")
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def memory_format(layout: str) -> torch.memory_format:
    """PyTorch's memory format for ``"channels_last"`` or ``"nchw"``."""
    return LAYOUTS[layout]


def make_attention(name: str, channels: int, patch_size: int) -> nn.Module:
    """One attention of ``ATTENTIONS`` for maps of ``channels`` channels; ``patch_size`` is for ConAM alone.

    It is the layer that the nets hold at such a site.
    """
    if name == "rearrange":
        return RearrangeConAM(channels, patch_size)
    return create_attention(name, channels, patch_size)


def make_net(model: str, attention: str, image_size: int = 32) -> nn.Module:
    """A net of this package with ``"none"`` or one of ``ATTENTIONS`` at its sites.

    The patch sides grow with the images, so that the number of patches stays that of 32 x 32 images.
    """
    sides = timm.create_model(model, device="meta").patch_sizes
    scaled = tuple(side * image_size // 32 for side in sides)
    layer = "conam" if attention == "rearrange" else attention
    net: nn.Module = timm.create_model(model, attn_layer=layer, patch_sizes=scaled)
    return with_rearrange(net) if attention == "rearrange" else net


def check_choice(option: str, values: Sequence[object], choices: Sequence[object]) -> None:
    """Refuse what is not among the choices of an option, and an option that chooses nothing.

    Raises:
        UserError: Naming the first such value.
    """
    listed = ", ".join(map(str, choices))
    if not values:
        raise UserError(f"The option {option} chooses nothing: give one of {listed}.")
    for value in values:
        if value not in choices:
            raise UserError(f"The option {option} is {value}, but it must be one of {listed}.")
