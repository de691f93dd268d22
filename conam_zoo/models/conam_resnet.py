"""ResNet for small images, with ConAM on the residual branches.

Two lines of nets share one class. The thin three-stage nets are those of He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, section 4.2 (widths 16/32/64), here with 1x1 projections where the shape changes. The wide
four-stage nets are the ImageNet ResNets with a 3x3 stride-1 stem and without max pooling, as in the ConAM paper
(arXiv 2110.14369v1). The attention stands on the input of the residual branch, the identity path keeps the raw map.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint_seq, register_model
from torch import Tensor, nn

from conam_zoo.models._base import AttendedBlock, StagedClassifier, check_choice
from conam_zoo.models._builder import build, dataset_cfgs

__all__ = ["ConAMResNet"]


class BasicBlock(AttendedBlock):
    """Two 3x3 convolutions and a shortcut. Shape: (N, C, H, W) -> (N, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, attn: nn.Module | None, attn_last: bool, **factory_kwargs: Any
    ) -> None:
        super().__init__(attn_last)
        self.attn = attn if attn is not None else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False, **factory_kwargs)
        self.bn1 = nn.BatchNorm2d(width, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory_kwargs)
        self.bn2 = nn.BatchNorm2d(width, **factory_kwargs)
        self.downsample = _projection(in_channels, width, stride, **factory_kwargs)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act1(self.bn1(self.first_conv(x)))
        residual = self.bn2(self.conv2(residual))
        if self.attn_last:
            residual = self.attn(residual)
        return self.act2(residual + self.downsample(x))


class Bottleneck(AttendedBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 one strides.

    Shape: (N, C, H, W) -> (N, 4 * width, H / stride, W / stride).
    """

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, attn: nn.Module | None, attn_last: bool, **factory_kwargs: Any
    ) -> None:
        super().__init__(attn_last)
        self.attn = attn if attn is not None else nn.Identity()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **factory_kwargs)
        self.bn1 = nn.BatchNorm2d(width, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False, **factory_kwargs)
        self.bn2 = nn.BatchNorm2d(width, **factory_kwargs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False, **factory_kwargs)
        self.bn3 = nn.BatchNorm2d(out_channels, **factory_kwargs)
        self.downsample = _projection(in_channels, out_channels, stride, **factory_kwargs)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act1(self.bn1(self.first_conv(x)))
        residual = self.act2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        if self.attn_last:
            residual = self.attn(residual)
        return self.act3(residual + self.downsample(x))


def _projection(in_channels: int, out_channels: int, stride: int, **factory_kwargs: Any) -> nn.Module:
    """The shortcut: a 1x1 convolution with batch norm where the shape changes (He et al., option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False, **factory_kwargs),
        nn.BatchNorm2d(out_channels, **factory_kwargs),
    )


class ConAMResNet(StagedClassifier):
    """ResNet with a 3x3 stem and an attention on its residual branches; see ``StagedClassifier`` for the rest.

    Args:
        block: ``"basic"`` or ``"bottleneck"``.
        layers: Blocks of each stage; every stage but the first halves the map.
        widths: Width of each stage (of its 3x3 convolutions).
    """

    if TYPE_CHECKING:
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
        self,
        block: str = "basic",
        layers: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        patch_sizes: Sequence[int] = (8, 8, 4),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(len(layers), patch_sizes, **options)
        check_choice("block", block, ("basic", "bottleneck"))
        block_cls: type[BasicBlock | Bottleneck] = Bottleneck if block == "bottleneck" else BasicBlock

        self.conv1 = nn.Conv2d(self.in_chans, widths[0], 3, padding=1, bias=False, **factory_kwargs)
        self.bn1 = nn.BatchNorm2d(widths[0], **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.add_level(["conv1", "bn1", "act1"], widths[0], 1)
        sizes = [(depth, width, width * block_cls.expansion) for depth, width in zip(layers, widths, strict=True)]
        channels = self.add_residual_stages(block_cls, sizes, widths[0], **factory_kwargs)
        if len(layers) == 3:
            self.layer4 = nn.Sequential()  # TorchScript needs the attribute; without children it is the identity
        self.init_head(channels, global_pool, drop_rate, **factory_kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then stages (``coarse``) or blocks."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last map: (N, C, H, W) -> (N, num_features, h, w)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


default_cfgs = dataset_cfgs(
    {
        **{f"resnet{depth}_conam": {"pool_size": (8, 8)} for depth in (20, 32, 44, 56, 110)},
        **{f"resnet{depth}_conam": {"pool_size": (4, 4)} for depth in (18, 34, 50, 101)},
    }
)


def _thin(variant: str, pretrained: bool, depth: int, **kwargs: Any) -> ConAMResNet:
    """A three-stage net of He et al., section 4.2: depth 6n + 2."""
    return build(ConAMResNet, variant, pretrained, layers=((depth - 2) // 6,) * 3, **kwargs)


def _wide(variant: str, pretrained: bool, block: str, layers: Sequence[int], **kwargs: Any) -> ConAMResNet:
    """A four-stage net with the ConAM authors' patch sides."""
    defaults = {"patch_sizes": (8, 8, 4, 0), "widths": (64, 128, 256, 512)}
    return build(ConAMResNet, variant, pretrained, block=block, layers=layers, levels=5, defaults=defaults, **kwargs)


@register_model
def resnet20_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-20 (He et al., section 4.2) with ConAM; 0.28 M parameters."""
    return _thin("resnet20_conam", pretrained, 20, **kwargs)


@register_model
def resnet32_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-32 (He et al., section 4.2) with ConAM; 0.47 M parameters."""
    return _thin("resnet32_conam", pretrained, 32, **kwargs)


@register_model
def resnet44_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-44 (He et al., section 4.2) with ConAM; 0.66 M parameters."""
    return _thin("resnet44_conam", pretrained, 44, **kwargs)


@register_model
def resnet56_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-56 (He et al., section 4.2) with ConAM; 0.86 M parameters."""
    return _thin("resnet56_conam", pretrained, 56, **kwargs)


@register_model
def resnet110_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-110 (He et al., section 4.2) with ConAM; 1.7 M parameters."""
    return _thin("resnet110_conam", pretrained, 110, **kwargs)


@register_model
def resnet18_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-18 with a 3x3 stride-1 stem and ConAM (arXiv 2110.14369v1); 11.2 M parameters."""
    return _wide("resnet18_conam", pretrained, "basic", (2, 2, 2, 2), **kwargs)


@register_model
def resnet34_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-34 with a 3x3 stride-1 stem and ConAM (arXiv 2110.14369v1); 21.3 M parameters."""
    return _wide("resnet34_conam", pretrained, "basic", (3, 4, 6, 3), **kwargs)


@register_model
def resnet50_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-50 with a 3x3 stride-1 stem and ConAM (arXiv 2110.14369v1); 24.2 M parameters."""
    return _wide("resnet50_conam", pretrained, "bottleneck", (3, 4, 6, 3), **kwargs)


@register_model
def resnet101_conam(pretrained: bool = False, **kwargs: Any) -> ConAMResNet:
    """ResNet-101 with a 3x3 stride-1 stem and ConAM (arXiv 2110.14369v1); 43.2 M parameters."""
    return _wide("resnet101_conam", pretrained, "bottleneck", (3, 4, 23, 3), **kwargs)
