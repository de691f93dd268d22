"""From uint8 images to what a net reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Normalizer", "normalize"]


class Normalizer:
    """uint8 images (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last, channel-wise normalised.

    The constants are laid out once for a whole row of pixels, so that a batch is one pass of one kernel over long rows.

    Args:
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel.
        width: Width W of the images, in pixels.
        device: Where the images are.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], width: int, device: torch.device | str = "cpu"
    ) -> None:
        centre, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * spread)).float().repeat(width).to(device)
        self.offset = (-centre / spread).float().repeat(width).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch; see the class."""
        rows = torch.addcmul(self.offset, images.flatten(2), self.scale)  # (B, H, W * 3)
        return rows.unflatten(2, (-1, images.shape[3])).permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last, channel-wise normalised."""
    return Normalizer(mean, std, images.shape[2], images.device)(images)
