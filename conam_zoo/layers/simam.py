"""SimAM, an attention without parameters."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.fx.wrap  # a leaf for torch.fx: it looks at the map's size and type
def _simam_gate(x: Tensor, lambda_: float) -> Tensor:
    """What SimAM multiplies each pixel by, between 0.62 and 1: (N, C, H, W) -> (N, C, H, W)."""
    values = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
    deviation = (values - values.mean(dim=(2, 3), keepdim=True)).square()
    degrees = max(x.shape[2] * x.shape[3] - 1, 1)
    variance = deviation.sum(dim=(2, 3), keepdim=True) / degrees
    return torch.sigmoid(deviation / (4 * (variance + lambda_)) + 0.5).to(x.dtype)


class SimAM(nn.Module):
    """Parameter-free attention: pixels far from the mean of their channel get more weight.

    With mean ``mu`` and variance ``v`` over the n pixels of one channel of one image, the inverse energy of a pixel is
    ``1 / e = (x - mu)^2 / (4 (v + lambda)) + 0.5``, and the pixel becomes ``x * sigmoid(1 / e)``. The variance divides
    by n - 1, as the authors' listing does. This project's own, because the paper is silent: a map of one pixel has
    variance 0, and the statistics of a half precision map are computed in float32.

    Shape: (N, C, H, W) -> (N, C, H, W), any H and W, memory format kept. ``lambda_`` is the paper's regulariser, with
    its value; a ValueError if it is not positive.

    >>> SimAM()(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

    Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
    ICML 2021, equations 5 and 6, written here from the equations.
    """

    def __init__(self, lambda_: float = 1e-4) -> None:
        super().__init__()
        if not lambda_ > 0:
            raise ValueError(f"SimAM: lambda_ is {lambda_!r}, but it must be a positive number.")
        self.lambda_ = float(lambda_)

    def forward(self, x: Tensor) -> Tensor:
        return x * _simam_gate(x, self.lambda_)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


def make_simam(
    channels: int, patch_size: int, *, lambda_: float = 1e-4, device: Any = None, dtype: Any = None
) -> nn.Module:
    """SimAM by the arguments of an attention's factory; it has neither patches nor parameters."""
    return SimAM(lambda_)
