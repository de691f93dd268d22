"""What this package asks of PyTorch by names that are private, each with an answer for the day when it is gone.

Without a name the answer is the careful one: the equations instead of the fused pass, and no recomputing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["backward_node", "is_called_plainly", "saved_tensors_hooks_are_free", "transforms_are_active"]

_PLAIN_TENSORS: tuple[type, ...] = (Tensor, nn.Parameter, torch.fx.Proxy)
try:  # what stands for plain tensors while a net is exported
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    _PLAIN_TENSORS += (FakeTensor, FunctionalTensor)
except ImportError:
    pass

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def transforms_are_active() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work; True if PyTorch cannot tell."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    level = getattr(forward_ad, "_current_level", None)
    return active is None or level is None or bool(active()) or level >= 0


def backward_node(function: type[torch.autograd.Function]) -> Any:
    """The type of the graph's nodes that a function makes, or None if PyTorch does not tell."""
    return getattr(function, "_backward_cls", None)


def saved_tensors_hooks_are_free() -> bool:
    """Whether no hooks for saved tensors are on, and none forbidden; False if PyTorch cannot tell."""
    engine: Any = getattr(torch._C, "_autograd", None)
    top = getattr(engine, "_top_saved_tensors_default_hooks", None)
    enabled = getattr(engine, "_saved_tensors_hooks_is_enabled", None)
    return top is not None and enabled is not None and top(False) is None and bool(enabled())


def is_called_plainly(layer: nn.Module) -> bool:
    """Whether calling the layer is nothing but ``nn.Linear`` of its own weight and bias.

    It is not for subclasses and replacements (quantised, parametrised, adapted), for layers with hooks, and for weights
    that are no plain tensors.
    """
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    if any(getattr(layer, name, True) for name in HOOKS) or _has_global_hooks():
        return False
    weight, bias = layer.weight, layer.bias
    return type(weight) in _PLAIN_TENSORS and type(bias) in _PLAIN_TENSORS


def _has_global_hooks() -> bool:
    found = getattr(nn.modules.module, "_has_any_global_hook", None)
    return found is None or bool(found())
