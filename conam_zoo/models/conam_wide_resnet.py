"""Wide residual networks with ConAM.

Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv 1605.07146): pre-activation basic blocks,
widths 16k/32k/64k, optional dropout between the two convolutions. Where the attention stands is this project's own
decision: directly before the first convolution of the residual branch, on the activated map; the shortcut sees the map
without it.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint_seq, register_model
from torch import Tensor, nn

from conam_zoo.models._base import AttendedBlock, StagedClassifier
from conam_zoo.models._builder import build, dataset_cfgs

__all__ = ["ConAMWideResNet"]


class PreActBlock(AttendedBlock):
    """Norm, activation and 3x3 convolution, twice. Shape: (N, C, H, W) -> (N, width, H / stride, W / stride).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated map; else it is the raw map.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        attn: nn.Module | None,
        attn_last: bool,
        drop_rate: float,
        **factory_kwargs: Any,
    ) -> None:
        super().__init__(attn_last)
        self.bn1 = nn.BatchNorm2d(in_channels, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.attn = attn if attn is not None else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False, **factory_kwargs)
        self.bn2 = nn.BatchNorm2d(width, **factory_kwargs)
        self.act2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory_kwargs)
        self.projects = stride != 1 or in_channels != width
        self.downsample: nn.Module = nn.Identity()
        if self.projects:
            self.downsample = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False, **factory_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        shortcut = self.downsample(activated) if self.projects else x
        residual = self.act2(self.bn2(self.first_conv(activated)))
        if self.attn_last:  # the last norm of a pre-activation block stands before its second convolution
            residual = self.attn(residual)
        return self.conv2(self.drop(residual)) + shortcut


class ConAMWideResNet(StagedClassifier):
    """Wide ResNet with an attention on its residual branches; see ``StagedClassifier`` for the rest.

    Args:
        depth: 6n + 4 layers, n blocks in each of the three stages.
        widen_factor: k of the paper; the stages have 16k, 32k and 64k channels.
        block_drop_rate: Dropout between the two convolutions of a block (the paper's dropout).
    """

    if TYPE_CHECKING:
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential

    def __init__(
        self,
        depth: int = 16,
        widen_factor: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        patch_sizes: Sequence[int] = (8, 8, 4),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(3, patch_sizes, **options)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth!r}, but it must be 4 more than a multiple of 6, such as 16.")
        self.conv1 = nn.Conv2d(self.in_chans, 16, 3, padding=1, bias=False, **factory_kwargs)
        self.add_level(["conv1"], 16, 1)
        block = partial(PreActBlock, drop_rate=block_drop_rate)
        widths = [16 * widen_factor * 2**stage for stage in range(3)]
        sizes = [((depth - 4) // 6, width, width) for width in widths]
        channels = self.add_residual_stages(block, sizes, 16, **factory_kwargs)
        self.add_final_norm(channels, **factory_kwargs)
        self.init_head(channels, global_pool, drop_rate, **factory_kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then stages (``coarse``) or blocks, then the final norm."""
        blocks = r"^layer(\d+)" if coarse else [(r"^layer(\d+)\.(\d+)", None), (r"^bn1", (99999,))]
        return {"stem": r"^conv1", "blocks": blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map, behind the final norm: (N, C, H, W) -> (N, num_features, h, w)."""
        x = self.conv1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.act1(self.bn1(x))


default_cfgs = dataset_cfgs(
    {f"wide_resnet{name}_conam": {"pool_size": (8, 8)} for name in ("16_4", "16_8", "28_10", "40_4")}
)


@register_model
def wide_resnet16_4_conam(pretrained: bool = False, **kwargs: Any) -> ConAMWideResNet:
    """WRN-16-4 with ConAM; 2.8 M parameters."""
    return build(ConAMWideResNet, "wide_resnet16_4_conam", pretrained, depth=16, widen_factor=4, **kwargs)


@register_model
def wide_resnet16_8_conam(pretrained: bool = False, **kwargs: Any) -> ConAMWideResNet:
    """WRN-16-8 with ConAM; 11.1 M parameters."""
    return build(ConAMWideResNet, "wide_resnet16_8_conam", pretrained, depth=16, widen_factor=8, **kwargs)


@register_model
def wide_resnet28_10_conam(pretrained: bool = False, **kwargs: Any) -> ConAMWideResNet:
    """WRN-28-10 with ConAM; 36.7 M parameters."""
    return build(ConAMWideResNet, "wide_resnet28_10_conam", pretrained, depth=28, widen_factor=10, **kwargs)


@register_model
def wide_resnet40_4_conam(pretrained: bool = False, **kwargs: Any) -> ConAMWideResNet:
    """WRN-40-4 with ConAM; 9.0 M parameters."""
    return build(ConAMWideResNet, "wide_resnet40_4_conam", pretrained, depth=40, widen_factor=4, **kwargs)
