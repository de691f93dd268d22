"""The part of timm's model contract that does not depend on the family: head, intermediates, pruning."""

from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from conam_zoo.layers.placement import AttentionSites

__all__ = ["StagedClassifier"]


class StagedClassifier(nn.Module):
    """An image classifier made of a stem and stages, with a pooled linear head called ``fc``.

    A family sets, after ``super().__init__()`` and before ``init_head``:

    - ``levels``: for each feature level the names of the child modules that lead to it, in order of execution;
    - ``feature_info``: one dict for each level (``num_chs``, ``reduction``, ``module``), as timm has it;
    - ``num_features``: channels of the last map.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class and does not know these types
        levels: list[list[str]]
        pretrained_cfg: dict[str, Any]  # set by timm's builder
        global_pool: SelectAdaptivePool2d
        fc: nn.Module
        feature_info: list[dict[str, Any]]
        num_features: int

    def __init__(self, sites: AttentionSites, num_classes: int, in_chans: int) -> None:
        super().__init__()
        given: object = num_classes
        if not isinstance(given, Integral) or isinstance(given, bool) or num_classes < 0:
            raise ValueError(f"num_classes is {num_classes!r}, but it must be a whole number, 0 for no classifier.")
        self.attn_layer = sites.attn_layer
        self.attn_placement = sites.attn_placement
        self.patch_sizes = sites.patch_sizes
        self.attn_args = sites.attn_args
        self.attn_site = sites.attn_site
        self.num_classes = int(num_classes)  # NumPy's whole numbers are such, too
        self.in_chans = in_chans
        self.grad_checkpointing = False

    @torch.jit.ignore
    def attention_arguments(self) -> dict[str, Any]:
        """The arguments of the builder that say which attention stands where, ready for JSON."""
        arguments: dict[str, Any] = {
            "attn_layer": self.attn_layer,
            "attn_placement": self.attn_placement,
            "patch_sizes": list(self.patch_sizes),
        }
        if self.attn_args:
            arguments["attn_args"] = dict(self.attn_args)
        if self.attn_site != "before_first_conv":
            arguments["attn_site"] = self.attn_site
        return arguments

    def init_head(
        self, global_pool: str, drop_rate: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Make the head and initialise all convolutions: normal, variance 2 / fan-out (He et al., 2015)."""
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the convolutions of the net; an attention layer keeps the initialisation it brings."""
        attention = {m for name, site in self.named_modules() if name.endswith("attn") for m in site.modules()}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in attention:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of all parameters of attention layers; timm's optimiser factories exempt them from weight decay.

        Decay puts ConAM to sleep: its agreement is of degree four in the weights, so that near zero the gradient is
        weaker than any decay.
        """
        return {name for name, _ in self.named_parameters() if "attn" in name.split(".")[:-1]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head: ``num_classes`` 0 removes it; the pooling is kept if ``global_pool`` is None."""
        placement = get_device_dtype(self)
        self.num_classes = num_classes = int(num_classes)
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **placement
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps at the wanted feature levels.

        Args:
            x: Images, (N, C, H, W).
            indices: The last n levels if an int, all if None, else those listed.
            norm: Without effect: a level that ends in a norm is always normalised.
            stop_early: Do not run what lies behind the last wanted level.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Return the list alone.

        Returns:
            The final map and the list of maps, or the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, but only 'NCHW' is possible.")
        wanted, last = feature_take_indices(len(self.levels), indices)
        intermediates = []
        for level, names in enumerate(self.levels[: last + 1] if stop_early else self.levels):
            for name in names:
                x = self._run(getattr(self, name), x)
            if level in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """One child module, its blocks checkpointed one by one if that is switched on."""
        if self.grad_checkpointing and isinstance(stage, nn.Sequential):
            return checkpoint_seq(stage, x)
        return stage(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what lies behind the last wanted feature level, and the head; returns the level indices."""
        wanted, last = feature_take_indices(len(self.levels), indices)
        for names in self.levels[last + 1 :]:
            for name in names:
                setattr(self, name, nn.Sequential())
        shortened = last < len(self.levels) - 1
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map: (N, C, H, W) -> (N, num_features, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map to logits: (N, num_features, h, w) -> (N, num_classes)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits: (N, C, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
