"""Golden values of the models, and how they are made: ``python tests/golden/make.py`` rewrites the file beside it.

Parameters, statistics and images are filled by formulas of sines, not by a generator of random numbers, so that the
outputs can be remade with any version of PyTorch. ``outputs.json`` holds the first ten logits of some models.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import conam_zoo  # noqa: F401 (registers the models)

__all__ = ["MODELS_WITH_OUTPUTS", "count", "fill", "image", "logits", "read_golden"]

FOLDER = Path(__file__).parent
MODELS_WITH_OUTPUTS = (
    "resnet20_conam",
    "resnet18_conam",
    "resnet50_conam",
    "wide_resnet16_4_conam",
    "densenet40_12_conam",
    "densenetbc100_12_conam",
)
DECIMALS = 8


def _sines(shape: torch.Size | tuple[int, ...], name: str) -> Tensor:
    """Numbers in [-1, 1] that depend on the flat index and on the name, in float64.

    The angle is quadratic in the index, in whole numbers modulo a prime: neighbours look unrelated, so that sums over
    many of them stay small, and no angle is so large that its sine loses digits.
    """
    index = torch.arange(math.prod(shape))
    angle = (index * index * 7919 + index * 104_729 + zlib.crc32(name.encode())) % 65_537
    return torch.sin(angle.double() * (2 * math.pi / 65_537)).reshape(shape)


def fill(model: nn.Module) -> nn.Module:
    """Fill every parameter and statistic by formula, with sizes that keep the maps of order one; returns the model."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            kind = name.rpartition(".")[2]
            values = _sines(tensor.shape, name)
            if kind == "num_batches_tracked":
                values = torch.ones_like(values)
            elif kind == "running_var" or (kind == "weight" and tensor.ndim == 1):
                values = 1 + values / 4
            elif kind in ("running_mean", "bias"):
                values = values / 8
            else:  # a convolution or linear layer: unit gain behind a ReLU
                values = values * 2 / math.sqrt(tensor[0].numel())
            tensor.copy_(values)
    return model


def image(channels: int = 3, side: int = 32) -> Tensor:
    """One image by formula: (1, channels, side, side), float64."""
    return _sines((1, channels, side, side), "image")


def logits(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The first ten logits of a model filled by formula: (10,)."""
    model = fill(timm.create_model(name).to(dtype)).eval()
    with torch.no_grad():
        return model(image().to(dtype))[0, :10]


def count(name: str, **kwargs: Any) -> dict[str, int]:
    """Parameters, and multiply-accumulates for one image; nothing is allocated."""
    model = timm.create_model(name, device="meta", **kwargs).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


def read_golden(file: str) -> dict[str, Any]:
    """The content of a golden file; one that is missing is an error."""
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def main() -> None:
    """Rewrite the file."""
    content = {name: [round(value, DECIMALS) for value in logits(name).tolist()] for name in MODELS_WITH_OUTPUTS}
    (FOLDER / "outputs.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
