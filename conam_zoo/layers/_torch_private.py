"""What this package asks of PyTorch by names that are private, each with an answer for the day when it is gone.

Without a name the answer is the careful one: the equations instead of the fused pass, no recomputing, float32, and
public operations in place of one that does it all.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

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


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for many gradients under vmap; False if PyTorch cannot tell.

    So it is with ``is_grads_batched``, ``jacobian(vectorize=True)``, and ``torch.func.vmap`` of a backward pass.
    """
    kinds = ("is_legacy_batchedtensor", "is_batchedtensor")
    tests = [getattr(getattr(torch._C, "_functorch", None), kind, None) for kind in kinds]
    return any(test is not None and test(gradient) for test in tests)


def saved_tensors_hooks_are_free() -> bool:
    """Whether no hooks for saved tensors are on, and none forbidden; False if PyTorch cannot tell."""
    engine: Any = getattr(torch._C, "_autograd", None)
    top = getattr(engine, "_top_saved_tensors_default_hooks", None)
    enabled = getattr(engine, "_saved_tensors_hooks_is_enabled", None)
    return top is not None and enabled is not None and top(False) is None and bool(enabled())


def is_called_plainly(layer: nn.Module) -> bool:
    """Whether calling the layer is nothing but ``nn.Linear`` of its own weight and bias, which are plain tensors.

    It is not for subclasses and replacements (quantised, parametrised, adapted), and for layers with hooks.
    """
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    has_global_hook = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)
    if any(getattr(layer, name, True) for name in HOOKS) or has_global_hook():
        return False
    return type(layer.weight) in _PLAIN_TENSORS and type(layer.bias) in _PLAIN_TENSORS


def has_bf16_convolutions() -> bool | None:
    """Whether oneDNN convolves in bfloat16 by instructions of this CPU; None if PyTorch does not say.

    Where an x86 CPU has AVX-512 without them oneDNN emulates them, three to four times slower than float32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not torch.backends.mkldnn.is_available():
        return None
    x86 = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if platform.machine().lower() in ("x86_64", "amd64") and None not in x86:
        return bool(supported()) and any(has() for has in x86)  # type: ignore[misc]
    return bool(supported())


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None if PyTorch cannot tell."""
    return getattr(tensor, "_version", None)


def clamp_gradient(gradient: Tensor, output: Tensor, low: float, high: float) -> Tensor:
    """The gradient of ``clamp(low, high)``, given its output; the same bits either way."""
    if together := getattr(torch.ops.aten, "hardtanh_backward", None):
        return together(gradient, output, low, high)
    return gradient.masked_fill((output <= low) | (output >= high), 0)


def lerp_all(ours: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    """``Tensor.lerp_`` of every tensor towards its partner, in one call where PyTorch has it."""
    if together := getattr(torch, "_foreach_lerp_", None):
        together(ours, theirs, weight=weight)
    else:
        for own, other in zip(ours, theirs, strict=True):
            own.lerp_(other, weight)


def copy_all(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """``Tensor.copy_`` of every tensor from its partner, in one call where PyTorch has it."""
    if together := getattr(torch, "_foreach_copy_", None):
        together(ours, theirs)
    else:
        for own, other in zip(ours, theirs, strict=True):
            own.copy_(other)
