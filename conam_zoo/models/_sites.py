"""Which attention stands at a site, by name: the ConAM of this project, timm's layers at the same sites, or none."""

from collections.abc import Sequence

import torch
from timm.layers import create_attn
from torch import nn

from conam_zoo.attention import ConAM

__all__ = ["ATTENTION_LAYERS", "ATTENTION_PLACEMENTS", "AttentionSites"]

ATTENTION_LAYERS = ("conam", "none", "se", "eca", "cbam", "gc", "coord")
ATTENTION_PLACEMENTS = ("stage", "block")


class AttentionSites:
    """Decides for every block of a net whether an attention stands on its residual branch, and which.

    Args:
        attn_layer: One of ``ATTENTION_LAYERS``. ``"none"`` makes the plain twin; ``se``, ``eca``, ``cbam``, ``gc`` and
            ``coord`` are timm's layers with timm's defaults.
        attn_placement: ``"stage"`` for the first block of every stage, ``"block"`` for every block.
        patch_sizes: ConAM's patch side on the input of the first block of each stage, in pixels; 0 for a stage without
            attention, whichever layer it is.
        num_stages: How many patch sides there have to be.

    Raises:
        ValueError: If an argument is none of those.
    """

    def __init__(self, attn_layer: str, attn_placement: str, patch_sizes: Sequence[int], num_stages: int) -> None:
        if attn_layer not in ATTENTION_LAYERS:
            raise ValueError(f"attn_layer is {attn_layer!r}, but it must be one of {', '.join(ATTENTION_LAYERS)}.")
        if attn_placement not in ATTENTION_PLACEMENTS:
            raise ValueError(
                f"attn_placement is {attn_placement!r}, but it must be one of {', '.join(ATTENTION_PLACEMENTS)}."
            )
        sizes = tuple(patch_sizes)
        if len(sizes) != num_stages or any(not isinstance(size, int) or size < 0 for size in sizes):
            raise ValueError(
                f"patch_sizes is {sizes!r}, but it must hold one patch side in pixels (0 for none) "
                f"for each of the {num_stages} stages."
            )
        self.attn_layer = attn_layer
        self.attn_placement = attn_placement
        self.patch_sizes = sizes

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
        if self.attn_layer == "conam":
            return ConAM(channels, max(1, patch_size // shrink), device=device, dtype=dtype)
        return create_attn(self.attn_layer, channels, device=device, dtype=dtype)
