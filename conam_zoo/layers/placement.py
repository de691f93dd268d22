"""Which attention stands at a site, by name: this project's own, timm's layers at the same sites, or none."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import create_attn
from torch import nn

from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.conam_variant import ConAMVariantConfig, ConfidenceAttentionVariant
from conam_zoo.layers.simam import SimAM

__all__ = ["ATTENTION_LAYERS", "ATTENTION_PLACEMENTS", "ATTENTION_SITES", "AttentionSites"]

ATTENTION_LAYERS = ("conam", "none", "se", "eca", "cbam", "gc", "coord", "simam", "conam_variant")
ATTENTION_PLACEMENTS = ("stage", "block")
ATTENTION_SITES = ("before_first_conv", "after_last_norm")


class AttentionSites:
    """Decides for every block of a net whether an attention stands on its residual branch, and which.

    Args:
        attn_layer: One of ``ATTENTION_LAYERS``. ``"none"`` makes the plain twin; ``se``, ``eca``, ``cbam``, ``gc`` and
            ``coord`` are timm's layers with timm's defaults; ``simam`` has no parameters; ``conam_variant`` is the form
            of ConAM that ``attn_args`` describes.
        attn_placement: ``"stage"`` for the first block of every stage, ``"block"`` for every block.
        patch_sizes: ConAM's patch side on the input of the first block of each stage, in pixels; 0 for a stage without
            attention, whichever layer it is.
        num_stages: How many patch sides there have to be.
        attn_args: For ``conam_variant``, the switches of ``ConAMVariantConfig`` by name; nothing for other layers.
        attn_site: ``"before_first_conv"`` or ``"after_last_norm"``: where on the residual branch it stands.

    Raises:
        ValueError: If an argument is none of those.
    """

    def __init__(
        self,
        attn_layer: str,
        attn_placement: str,
        patch_sizes: Sequence[int],
        num_stages: int,
        attn_args: Mapping[str, Any] | None = None,
        attn_site: str = "before_first_conv",
    ) -> None:
        if attn_layer not in ATTENTION_LAYERS:
            raise ValueError(f"attn_layer is {attn_layer!r}, but it must be one of {', '.join(ATTENTION_LAYERS)}.")
        if attn_placement not in ATTENTION_PLACEMENTS:
            raise ValueError(
                f"attn_placement is {attn_placement!r}, but it must be one of {', '.join(ATTENTION_PLACEMENTS)}."
            )
        if attn_site not in ATTENTION_SITES:
            raise ValueError(f"attn_site is {attn_site!r}, but it must be one of {', '.join(ATTENTION_SITES)}.")
        if attn_args and attn_layer != "conam_variant":
            raise ValueError(
                f"attn_args is {dict(attn_args)!r}, but it must be empty for attn_layer {attn_layer!r}: "
                "only 'conam_variant' has switches."
            )
        self.form = ConAMVariantConfig.from_args(dict(attn_args or {}))
        sizes = tuple(patch_sizes)
        if len(sizes) != num_stages or any(not isinstance(size, int) or size < 0 for size in sizes):
            raise ValueError(
                f"patch_sizes is {sizes!r}, but it must hold one patch side in pixels (0 for none) "
                f"for each of the {num_stages} stages."
            )
        self.attn_layer = attn_layer
        self.attn_placement = attn_placement
        self.patch_sizes = sizes
        self.attn_args = dict(attn_args or {})
        self.attn_site = attn_site

    def build(
        self,
        channels: int,
        stage: int,
        *,
        first: bool,
        shrink: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        """The attention for one block, or None where there is none.

        Args:
            channels: Channels of the map at the site.
            stage: Index of the stage.
            first: Whether the block is the first of its stage.
            shrink: How much smaller the map is than at the stage's first site; the patch side shrinks with it, so
                that the number of patches stays.
            device: Where the parameters are made.
            dtype: Their floating-point type.
        """
        patch_size = self.patch_sizes[stage]
        if self.attn_layer == "none" or patch_size == 0 or (self.attn_placement == "stage" and not first):
            return None
        patch_size = max(1, patch_size // shrink)
        if self.attn_layer == "conam":
            return ConAM(channels, patch_size, device=device, dtype=dtype)
        if self.attn_layer == "conam_variant":
            return ConfidenceAttentionVariant(channels, patch_size, self.form, device=device, dtype=dtype)
        if self.attn_layer == "simam":
            return SimAM()
        return create_attn(self.attn_layer, channels, device=device, dtype=dtype)
