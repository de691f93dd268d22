"""SimAM, the attention without parameters that ConAM is compared with.

Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
ICML 2021, equations 5 and 6, written here from the equations. For the pixels ``x`` of one channel of one image, with
mean ``mu`` and variance ``v`` over its n pixels:

1. inverse energy of a pixel: ``1 / e = (x - mu)^2 / (4 (v + lambda)) + 0.5``;
2. the pixel becomes ``x * sigmoid(1 / e)``.

The variance divides by n - 1, as the authors' listing does. This project's own, because the paper is silent: a map of
one pixel has variance 0, and the statistics of a half precision map are computed in float32.
"""

import torch
from torch import Tensor, nn

__all__ = ["SimAM"]


@torch.fx.wrap  # a leaf for torch.fx: it looks at the map's size and type
def _gate(x: Tensor, lambda_: float) -> Tensor:
    """What each pixel is multiplied by, between 0.62 and 1: (N, C, H, W) -> (N, C, H, W)."""
    values = x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x
    deviation = (values - values.mean(dim=(2, 3), keepdim=True)).square()
    degrees = max(x.shape[2] * x.shape[3] - 1, 1)
    variance = deviation.sum(dim=(2, 3), keepdim=True) / degrees
    return torch.sigmoid(deviation / (4 * (variance + lambda_)) + 0.5).to(x.dtype)


class SimAM(nn.Module):
    """Parameter-free attention: a pixel counts the more, the further it lies from the mean of its channel.

    Shape: (N, C, H, W) -> (N, C, H, W), any H and W, memory format kept.

    >>> SimAM()(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

    Source: Yang et al., ICML 2021, equations 5 and 6.
    """

    def __init__(self, lambda_: float = 1e-4) -> None:
        """Args:
            lambda_: The paper's regulariser, positive; 1e-4 is the paper's value.

        Raises:
            ValueError: If it is not positive.
        """
        super().__init__()
        if not lambda_ > 0:
            raise ValueError(f"SimAM: lambda_ is {lambda_!r}, but it must be a positive number.")
        self.lambda_ = float(lambda_)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the map: (N, C, H, W) -> (N, C, H, W)."""
        return x * _gate(x, self.lambda_)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"
