"""What does not depend on the family: sites of the attention, and of timm's contract head, intermediates, pruning."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from conam_zoo.layers.conam_fused import recompute_rescaled
from conam_zoo.layers.registry import check_attention, create_attention
from conam_zoo.models.config_schema import check_trained_attention
from conam_zoo.weights import WeightsError, read_safetensors

ATTENTION_PLACEMENTS = ("stage", "block")
ATTENTION_SITES = ("before_first_conv", "after_last_norm")


class AttendedBlock(nn.Module):
    """A block whose first convolution, ``conv1``, may stand behind its attention, ``attn``.

    A family sets ``attn`` in its place among the layers: their order is that of the parameters in optimisers' states.
    With ``attn_last`` the attention stands after the last norm instead; the block calls it there.
    """

    if TYPE_CHECKING:
        attn: nn.Module
        conv1: nn.Conv2d

    def __init__(self, attn_last: bool = False) -> None:
        super().__init__()
        self.attn_last = attn_last

    def first_conv(self, x: Tensor) -> Tensor:
        """The attention, if it stands here, and the convolution, which need not keep the rescaled map."""
        if not self.attn_last:
            x = self.attn(x)
        if torch.jit.is_scripting():
            x = self.conv1(x)
        else:
            with recompute_rescaled(x):
                x = self.conv1(x)
        return x


def attention_parameters(model: nn.Module) -> set[str]:
    """Names of all parameters of attention layers, of each also the one that ``torch.compile`` gives it."""
    names = {name for name, _ in model.named_parameters() if "attn" in name.split(".")[:-1]}
    return names | {f"_orig_mod.{name}" for name in names}


class StagedClassifier(nn.Module):
    """An image classifier made of a stem and stages, with a pooled linear head called ``fc``.

    Besides these every family takes ``global_pool`` (timm's name of a pooling, ``""`` for none), ``drop_rate`` (dropout
    before the classifier), and ``device`` and ``dtype`` of the parameters.

    Args:
        num_stages: Stages of the net.
        patch_sizes: ConAM's patch side on the input of the first block of each stage, in pixels; 0 for a stage without
            attention, whichever it is.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the images.
        attn_layer: Name of a registered attention, see ``conam_zoo.layers.registry``; ``"none"`` for the plain twin.
        attn_placement: ``"stage"`` for the first block of every stage, ``"block"`` for every block.
        attn_args: Arguments of the attention's factory, such as ConAM's ``hidden_channels``.
        attn_site: ``"before_first_conv"`` or ``"after_last_norm"``: where on the residual branch the attention stands.

    A family calls ``super().__init__()``, makes a stem, and says with ``add_level`` what leads to each feature level,
    beginning with the stem; last comes ``init_head``.
    """

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class and does not know these types
        levels: list[list[str]]  # for each feature level the child modules that lead to it, in order of execution
        feature_info: list[dict[str, Any]]  # one for each level, as timm has it
        pretrained_cfg: dict[str, Any]  # set by timm's builder
        global_pool: SelectAdaptivePool2d
        fc: nn.Module
        bn1: nn.BatchNorm2d
        act1: nn.ReLU

    def __init__(
        self,
        num_stages: int,
        patch_sizes: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        attn_layer: str = "conam",
        attn_placement: str = "stage",
        attn_args: Mapping[str, Any] | None = None,
        attn_site: str = "before_first_conv",
    ) -> None:
        super().__init__()
        if not _is_whole(num_classes):
            raise ValueError(f"num_classes is {num_classes!r}, but it must be a whole number, 0 for no classifier.")
        if not _is_whole(in_chans) or in_chans < 1:
            raise ValueError(f"in_chans is {in_chans!r}, but it must be a positive whole number.")
        check_attention(attn_layer, attn_args)
        check_choice("attn_placement", attn_placement, ATTENTION_PLACEMENTS)
        check_choice("attn_site", attn_site, ATTENTION_SITES)
        sizes = tuple(patch_sizes)
        if len(sizes) != num_stages or not all(map(_is_whole, sizes)):
            raise ValueError(
                f"patch_sizes is {sizes!r}, but it must hold one patch side in pixels (0 for none) "
                f"for each of the {num_stages} stages."
            )
        self.attn_layer = attn_layer
        self.attn_placement = attn_placement
        self.patch_sizes = tuple(map(int, sizes))
        self.attn_args = dict(attn_args or {})
        self.attn_site = attn_site
        self.num_classes = int(num_classes)  # NumPy's whole numbers are such, too
        self.in_chans = int(in_chans)
        self.grad_checkpointing = False
        self.levels, self.feature_info = [], []

    def add_level(self, names: list[str], channels: int, reduction: int) -> None:
        """A feature level, with the child modules that lead to it from the one before, by name."""
        self.levels.append(names)
        self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": names[-1]})

    def add_residual_stages(
        self, block: Callable[..., nn.Module], sizes: Iterable[tuple[int, int, int]], channels: int, **kwargs: Any
    ) -> int:
        """The stages ``layer1``, ``layer2``, ...; all but the first halve the map.

        ``sizes`` has for each stage its blocks, their width, and the channels of their result; ``channels`` are those
        behind the stem. Gives those behind the last stage.
        """
        attn_last = self.attn_site == "after_last_norm"
        for stage, (depth, width, out_channels) in enumerate(sizes):
            stride = 1 if stage == 0 else 2
            blocks = []
            for index in range(depth):
                first = index == 0
                at_site = out_channels if attn_last else channels
                shrink = stride if attn_last or not first else 1  # the first block of a stage halves the map
                attn = self.make_attention(at_site, stage, first=first, shrink=shrink, **kwargs)
                blocks.append(block(channels, width, stride if first else 1, attn, attn_last, **kwargs))
                channels = out_channels
            name = f"layer{stage + 1}"
            self.add_module(name, nn.Sequential(*blocks))
            self.add_level([name], channels, 2**stage)
        return channels

    def add_final_norm(self, channels: int, **factory_kwargs: Any) -> None:
        """Norm and activation behind the last stage; they end its level."""
        self.bn1 = nn.BatchNorm2d(channels, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.levels[-1] += ["bn1", "act1"]
        self.feature_info[-1]["module"] = "act1"

    @torch.jit.ignore
    def make_attention(
        self, channels: int, stage: int, *, first: bool, shrink: int = 1, **factory_kwargs: Any
    ) -> nn.Module | None:
        """The attention for a block, the ``first`` of its stage or another; None where there is none.

        The map has ``channels``, and is ``shrink`` times smaller than at the stage's first site. The patch side shrinks
        with it, so that the number of patches stays.
        """
        patch_size = self.patch_sizes[stage]
        if self.attn_layer == "none" or patch_size == 0 or (self.attn_placement == "stage" and not first):
            return None
        patch_size = max(1, patch_size // shrink)
        return create_attention(self.attn_layer, channels, patch_size, **factory_kwargs, **self.attn_args)

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

    def init_head(self, channels: int, global_pool: str, drop_rate: float, **factory_kwargs: Any) -> None:
        """Make the head and initialise all convolutions: normal, variance 2 / fan-out (He et al., 2015)."""
        self.num_features = channels
        self._set_classifier(global_pool, **factory_kwargs)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    def _set_classifier(self, global_pool: str, **factory_kwargs: Any) -> None:
        channels, classes = self.num_features, self.num_classes
        self.global_pool, self.fc = create_classifier(channels, classes, pool_type=global_pool, **factory_kwargs)
        self.head_hidden_size = channels * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the convolutions of the net; an attention layer keeps the initialisation it brings."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and "attn" not in name.split("."):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's; a file that timm reads itself, for ``checkpoint_path``, is checked like those that we read."""
        caller = sys._getframe(1)  # timm hands over the tensors alone; a test holds it to these two names
        path = caller.f_locals.get("checkpoint_path")
        if path and caller.f_globals.get("__name__") == "timm.models._helpers":
            if str(path).endswith(".safetensors"):
                read_safetensors(Path(path))
                if re.search(r"-\d{5}-of-\d{5}\.", Path(path).name) and self.state_dict().keys() - state_dict.keys():
                    raise WeightsError(f"{path} is one of several files: load the model local-dir:{Path(path).parent}.")
            check_trained_attention(Path(path).with_name("config.json"), self.attention_arguments())
        # Not by super(), which a scripted net lacks: TorchScript hands it this method as it is.
        return nn.Module.load_state_dict(self, state_dict, strict=strict, assign=assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of all parameters of attention layers; timm's optimiser factories exempt them from weight decay.

        Decay makes ConAM uniform: its agreement is of degree four in the weights, so that near zero the gradient is
        weaker than any decay. The names stand here also as ``torch.compile`` changes them.
        """
        return attention_parameters(self)

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
        if not _is_whole(num_classes):
            raise ValueError(f"num_classes is {num_classes!r}, but it must be a whole number, 0 for no classifier.")
        self.num_classes = int(num_classes)
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_classifier(pool_type, **get_device_dtype(self))
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
        """The final map of images (N, C, H, W), and a list of the maps at the wanted feature levels.

        ``indices`` are the last n levels if an int, all if None, else those listed. ``stop_early`` does not run what
        lies behind the last of them. ``norm`` has no effect: a level that ends in a norm is always normalised.
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}, but it must be one of {', '.join(choices)}.")
