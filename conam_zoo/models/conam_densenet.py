"""DenseNet for small images, with ConAM.

Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017 (arXiv 1608.06993), the CIFAR nets: three
dense blocks; the basic form (3x3 layers, no compression, 16 initial channels) and the BC form (1x1 bottleneck of
4 * growth, transitions that halve the channels, 2 * growth initial channels). Where the attention stands is this
project's own decision: on the input of each dense block, or, for ``attn_placement="block"``, on the input of the first
convolution of every dense layer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint, register_model
from torch import Tensor, nn

from conam_zoo.layers.conam_fused import recompute_rescaled
from conam_zoo.models._base import AttendedBlock, StagedClassifier
from conam_zoo.models._builder import build, dataset_cfgs

__all__ = ["ConAMDenseNet"]


class DenseLayer(AttendedBlock):
    """One layer: its input with ``growth`` new channels behind. Shape: (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(
        self,
        in_channels: int,
        growth: int,
        bottleneck: bool,
        drop_rate: float,
        attn: nn.Module | None,
        **factory_kwargs: Any,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.attn = attn if attn is not None else nn.Identity()
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False, **factory_kwargs)
            self.bn2: nn.Module = nn.BatchNorm2d(4 * growth, **factory_kwargs)
            self.act2: nn.Module = nn.ReLU(inplace=True)
            self.conv2: nn.Module = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False, **factory_kwargs)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False, **factory_kwargs)
            self.bn2 = self.act2 = self.conv2 = nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.grad_checkpointing = False

    def new_features(self, x: Tensor) -> Tensor:
        """The new channels alone: (N, C, H, W) -> (N, growth, H, W)."""
        x = self.first_conv(self.act1(self.bn1(x)))
        return self.drop(self.conv2(self.act2(self.bn2(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return torch.cat([x, checkpoint(self.new_features, x)], dim=1)
        return torch.cat([x, self.new_features(x)], dim=1)


class Transition(nn.Sequential):
    """Norm, activation, 1x1 convolution, 2x2 average pooling. Shape: (N, C, H, W) -> (N, out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels, **factory_kwargs)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory_kwargs)
        self.pool = nn.AvgPool2d(2)


class DenseBlock(nn.Sequential):
    """An optional attention, then dense layers. Shape: (N, C, H, W) -> (N, C + layers * growth, H, W)."""

    def __init__(self, attn: nn.Module | None, layers: Sequence[DenseLayer]) -> None:
        super().__init__()
        if attn is not None:
            self.attn = attn
        for index, layer in enumerate(layers, start=1):
            self.add_module(f"layer{index}", layer)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
        else:
            for module in self:
                with recompute_rescaled(x):
                    x = module(x)
        return x


class ConAMDenseNet(StagedClassifier):
    """DenseNet with an attention on the input of its three dense blocks; see ``StagedClassifier`` for the rest.

    Args:
        depth: 3n + 4 layers (basic) or 6n + 4 (bottleneck), n dense layers in each block.
        growth: Growth rate k: channels that each dense layer adds.
        bottleneck: The BC form instead of the basic one.
        block_drop_rate: Dropout behind each dense layer (the paper's dropout).
    """

    if TYPE_CHECKING:
        block1: nn.Sequential
        block2: nn.Sequential
        block3: nn.Sequential
        transition1: nn.Sequential
        transition2: nn.Sequential

    def __init__(
        self,
        depth: int = 40,
        growth: int = 12,
        bottleneck: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        patch_sizes: Sequence[int] = (8, 4, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(3, patch_sizes, **options)
        if self.attn_site != "before_first_conv":
            raise ValueError(f"attn_site is {self.attn_site!r}, but it must be before_first_conv in a DenseNet.")
        step = 6 if bottleneck else 3
        layers_per_block, left = divmod(depth - 4, step)
        if layers_per_block < 1 or left:
            raise ValueError(f"depth is {depth!r}, but it must be 4 more than a multiple of {step}, such as 40.")
        per_layer = self.attn_placement == "block"

        channels = 2 * growth if bottleneck else 16
        self.conv1 = nn.Conv2d(self.in_chans, channels, 3, padding=1, bias=False, **factory_kwargs)
        self.add_level(["conv1"], channels, 1)
        for stage in range(3):
            names = [f"block{stage + 1}"]
            if stage > 0:
                out_channels = channels // 2 if bottleneck else channels
                names = [f"transition{stage}", *names]
                self.add_module(names[0], Transition(channels, out_channels, **factory_kwargs))
                channels = out_channels
            attn = None if per_layer else self.make_attention(channels, stage, first=True, **factory_kwargs)
            layers = []
            for index in range(layers_per_block):
                inner = self.make_attention(channels, stage, first=index == 0, **factory_kwargs) if per_layer else None
                layers.append(DenseLayer(channels, growth, bottleneck, block_drop_rate, inner, **factory_kwargs))
                channels += growth
            self.add_module(names[-1], DenseBlock(attn, layers))
            self.add_level(names, channels, 2**stage)
        self.add_final_norm(channels, **factory_kwargs)
        self.init_head(channels, global_pool, drop_rate, **factory_kwargs)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the new channels of every dense layer in the backward pass instead of keeping what led to them."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, DenseLayer):
                module.grad_checkpointing = enable

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return stage(x)  # the dense layers checkpoint themselves

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then blocks (``coarse``) or dense layers, then the final norm."""
        stages = [(r"^(?:block|transition)(\d+)", None)]
        layers = [(r"^block(\d+)\.layer(\d+)", None), (r"^block(\d+)\.attn", (0,)), (r"^transition(\d+)", (99998,))]
        return {"stem": r"^conv1", "blocks": [*(stages if coarse else layers), (r"^bn1", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map, behind the final norm: (N, C, H, W) -> (N, num_features, h, w)."""
        x = self.block1(self.conv1(x))
        x = self.block2(self.transition1(x))
        x = self.block3(self.transition2(x))
        return self.act1(self.bn1(x))


default_cfgs = dataset_cfgs(
    {
        name: {"pool_size": (8, 8)}
        for name in ("densenet40_12_conam", "densenetbc100_12_conam", "densenetbc190_40_conam")
    }
)


@register_model
def densenet40_12_conam(pretrained: bool = False, **kwargs: Any) -> ConAMDenseNet:
    """DenseNet-40 (k = 12) with ConAM; 1.3 M parameters."""
    return build(ConAMDenseNet, "densenet40_12_conam", pretrained, depth=40, growth=12, **kwargs)


@register_model
def densenetbc100_12_conam(pretrained: bool = False, **kwargs: Any) -> ConAMDenseNet:
    """DenseNet-BC-100 (k = 12) with ConAM; 0.84 M parameters."""
    return build(ConAMDenseNet, "densenetbc100_12_conam", pretrained, depth=100, growth=12, bottleneck=True, **kwargs)


@register_model
def densenetbc190_40_conam(pretrained: bool = False, **kwargs: Any) -> ConAMDenseNet:
    """DenseNet-BC-190 (k = 40) with ConAM; 28.3 M parameters."""
    return build(ConAMDenseNet, "densenetbc190_40_conam", pretrained, depth=190, growth=40, bottleneck=True, **kwargs)
