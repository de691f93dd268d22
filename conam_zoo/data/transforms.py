"""Augmentation and normalisation of whole batches on the training device, each image for itself, without a loop.

Sources: random crop and flip as in He et al., "Deep Residual Learning", 2016, section 4.2; Cutout: DeVries and Taylor,
arXiv 1708.04552, 2017; mixup: Zhang et al., arXiv 1710.09412, 2018; CutMix: Yun et al., arXiv 1905.04899, 2019; smaller
images in early epochs: Tan and Le, "EfficientNetV2", arXiv 2104.00298, 2021, section 4, who resize where this crops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conam_zoo.errors import UserError

# What a stream of random numbers is for. They start at 1: numpy's seeding cannot tell a missing word from a zero.
ORDER, IMAGES, MIXING, SPLITTING, FLIPS = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class AugmentationSettings:
    """What is done to training images; 0 turns a step off.

    Cutout's centre may be any pixel, and what would lie outside of the image is lost. With mixup and CutMix on, each
    batch gets one of them, with even chances, as in timm. ``alternate_flip`` is of Jordan, "94% on CIFAR-10 in 3.29
    Seconds on a Single GPU", arXiv 2404.00498, 2024.
    """

    crop_padding: int = 4  # pixels of reflection padding on each side before a random crop back to the old size
    flip: bool = True  # mirror half of the images
    cutout: int = 0  # side in pixels of a square that is replaced by the mean colour
    mixup: float = 0.0  # both parameters of the beta distribution
    cutmix: float = 0.0  # likewise
    early_size: int = 0  # side in pixels of the random crops in the first ``early_epochs`` epochs
    early_epochs: int = 0
    alternate_flip: bool = False  # with ``flip``, show each image plain and mirrored in two epochs in a row
    mix_share: float = 1.0  # share of the batches that mixup or CutMix is applied to

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout", "mixup", "cutmix", "early_size", "early_epochs"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"The augmentation setting {name} is {value!r}, but it must be 0 or more.")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def crop_size(self, epoch: int, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of what is shown of images of the size (H, W) in an epoch, counted from 0."""
        early = self.early_size > 0 and epoch < self.early_epochs
        return (self.early_size, self.early_size) if early else size


def random_stream(purpose: int, seed: int, *position: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone; neighbouring arguments give unrelated streams."""
    return np.random.default_rng([purpose, seed % 2**64, *position])


@dataclass(frozen=True)
class ImageDraws:
    """What is drawn for every image of an epoch, in the order in which they are shown; each (N,)."""

    top: Tensor  # row of the crop's upper edge in the padded image, int64
    left: Tensor  # column of its left edge
    mirrored: Tensor  # bool
    centre_y: Tensor  # row of Cutout's centre
    centre_x: Tensor

    @classmethod
    def draw(
        cls,
        stream: np.random.Generator,
        count: int,
        size: tuple[int, int],
        settings: AugmentationSettings,
        crop: tuple[int, int],
        mirrored: Tensor | None = None,
    ) -> "ImageDraws":
        """Draw for images of the size (H, W), of which ``crop`` (h, w) is shown.

        ``mirrored`` (N,) says which are to be flipped if that is decided already.
        """

        def integers(high: int) -> Tensor:
            return torch.from_numpy(stream.integers(high, size=count))

        offsets = [2 * settings.crop_padding + whole - shown + 1 for whole, shown in zip(size, crop, strict=True)]
        drawn = integers(2) == 1  # whether it is used or not, so that the draws behind it stay the same
        if mirrored is None:
            mirrored = drawn
        return cls(
            integers(offsets[0]),
            integers(offsets[1]),
            mirrored if settings.flip else torch.zeros_like(mirrored),
            integers(crop[0]),
            integers(crop[1]),
        )

    def to(self, device: torch.device | str) -> "ImageDraws":
        return ImageDraws(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def __getitem__(self, part: slice) -> "ImageDraws":
        return ImageDraws(*(tensor[part] for tensor in vars(self).values()))


def alternating_flips(count: int, seed: int, epoch: int) -> Tensor:
    """Which of the images of a set are mirrored in an epoch: bool (count,), the opposite of the epoch before."""
    first = torch.from_numpy(random_stream(FLIPS, seed).integers(2, size=count)) == 1
    return first ^ (epoch % 2 == 1)


def crop_and_flip(images: Tensor, indices: Tensor, draws: ImageDraws, padding: int, crop: tuple[int, int]) -> Tensor:
    """Random windows of reflection-padded images, some mirrored, in one gather: uint8 (B, h, w, 3).

    The padded images are never made: the reflection is in the positions that are read. ``images`` are uint8
    (N, H, W, 3), contiguous; ``indices`` and ``draws`` are (B,); ``padding`` is smaller than H and W; ``crop`` is
    (h, w), at most (H, W).
    """
    height, width, channels = images.shape[1:]
    shown_height, shown_width = crop
    rows = _reflected(draws.top[:, None] - padding + torch.arange(shown_height, device=images.device), height)
    columns = torch.arange(shown_width, device=images.device)
    columns = torch.where(draws.mirrored[:, None], shown_width - 1 - columns, columns)
    columns = _reflected(draws.left[:, None] - padding + columns, width)
    positions = (indices[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]  # (B, h, w)
    return images.view(-1, channels).index_select(0, positions.flatten()).view(-1, shown_height, shown_width, channels)


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Positions outside of 0..size-1 thrown back at the edge pixels, which are not repeated."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def cut_out(images: Tensor, draws: ImageDraws, side: int) -> Tensor:
    """Set a square of every normalised image (B, C, H, W) to 0, the mean colour, in place."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) - (draws.centre_y[:, None] - side // 2)
    columns = torch.arange(width, device=images.device) - (draws.centre_x[:, None] - side // 2)
    inside_y, inside_x = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return images.masked_fill_((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)


def mix(
    images: Tensor, labels: Tensor, num_classes: int, settings: AugmentationSettings, stream: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """mixup or CutMix of a batch with itself in reverse order, with one share for the whole batch.

    The order within a batch is random already, so the reverse is as good as any other pairing. Beside the images
    (B, C, H, W) it gives soft targets (B, classes) in float32 that hold each class's share.
    """
    cut = settings.cutmix > 0 and (settings.mixup == 0 or stream.random() < 0.5)
    alpha = settings.cutmix if cut else settings.mixup
    share = float(stream.beta(alpha, alpha))  # of the image's own class
    partner = images.flip(0)
    if cut:
        height, width = images.shape[2:]
        top, bottom = _span(stream, height, share)
        left, right = _span(stream, width, share)
        images = images.clone(memory_format=torch.preserve_format)
        images[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what the edge cut off is the image's own
    else:
        images = torch.lerp(partner, images, share)
    targets = torch.zeros(len(labels), num_classes, device=images.device)
    targets.scatter_(1, labels[:, None], share)
    other = torch.zeros_like(targets).scatter_(1, labels.flip(0)[:, None], 1 - share)
    return images, targets + other


def _span(stream: np.random.Generator, size: int, share: float) -> tuple[int, int]:
    """First and last pixel of CutMix's box along one side: of the area, ``1 - share`` is cut, before the edges clip."""
    length, centre = int(size * math.sqrt(1 - share)), int(stream.integers(size))
    return max(0, centre - length // 2), min(size, centre - length // 2 + length)


def check_fits(settings: AugmentationSettings, size: Sequence[int], source: str) -> None:
    """Refuse a padding that reflection cannot fill, and crops that are larger than the images."""
    if settings.crop_padding >= min(size):
        raise UserError(
            f"The setting crop_padding is {settings.crop_padding}, but {source} have {size[0]} x {size[1]} pixels: "
            "reflection needs less padding than pixels."
        )
    if settings.early_size > min(size):
        raise UserError(
            f"The setting early_size is {settings.early_size}, but {source} have {size[0]} x {size[1]} pixels: "
            "set it to less, or to 0."
        )


class Normalizer:
    """uint8 images (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last, channel-wise normalised.

    ``mean`` and ``std`` are of each channel, in [0, 1]. The constants are laid out once for a whole row of ``width``
    pixels, so that a batch is one pass of one kernel over long rows.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], width: int, device: torch.device | str = "cpu"
    ) -> None:
        centre, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * spread)).float().repeat(width).to(device)
        self.offset = (-centre / spread).float().repeat(width).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        rows = torch.addcmul(self.offset, images.flatten(2), self.scale)  # (B, H, W * 3)
        return rows.unflatten(2, (-1, images.shape[3])).permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last, channel-wise normalised."""
    return Normalizer(mean, std, images.shape[2], images.device)(images)
