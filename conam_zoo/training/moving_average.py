"""timm's moving average of the weights, with its lists of tensors made once instead of in every step."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from conam_zoo.layers._torch_private import copy_all, lerp_all

__all__ = ["MovingAverage"]


class MovingAverage(ModelEmaV3):
    """``timm.utils.ModelEmaV3`` for one model in one place and type, in two calls of the device for each update.

    The decay grows over the first steps as timm's ``use_warmup`` has it. Integer buffers are copied.

    Args:
        model: The model; it must stay on its device.
        decay: Share of the average that a step keeps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        self._model: nn.Module | None = None
        self._pairs: list[Any] = []

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if model is not self._model:
            pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
            floating = [pair for pair in pairs if pair[0].is_floating_point()]
            counters = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._pairs = [[list(side) for side in zip(*group, strict=True)] for group in (floating, counters)]
            self.__dict__["_model"] = model  # not as a sub-module
        (ours, theirs), *copied = filter(None, self._pairs)
        lerp_all(ours, theirs, 1.0 - decay)
        for our_counters, their_counters in copied:
            copy_all(our_counters, their_counters)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
