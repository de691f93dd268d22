"""Computing ConAM's result again in the backward pass, instead of keeping it for the layer behind it.

ConAM keeps its input and one scale per patch. A convolution behind it would keep the product of the two, a second map
of the same size; from what ConAM keeps that product is one multiplication away.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ._torch_private import saved_tensors_hooks_are_free
from .conam_fused import rescale

__all__ = ["recompute_rescaled"]


def recompute_rescaled(y: Tensor) -> AbstractContextManager[None]:
    """A context in which autograd does not keep ``y``, if ConAM has just made it from a map that is there anyway.

    Layers that are called in it and would keep ``y`` for their backward pass get it computed again there, bit for bit.
    Everything else is kept as always. The context does nothing for a result of anything else than the eager ConAM in
    training, and inside other hooks for saved tensors (activation checkpoints, offloading), which have their own way.

    Args:
        y: What ``ConAM.forward`` returned, before anything is done to it in place.

    >>> from conam_zoo.layers.conam import ConAM
    >>> attention, layer = ConAM(16, 8), torch.nn.Conv2d(16, 16, 3)
    >>> y = attention(torch.randn(2, 16, 32, 32))
    >>> with recompute_rescaled(y):
    ...     z = layer(y)

    Source: saved tensor hooks, https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(y, Tensor):
        return nullcontext()
    node: Any = y.grad_fn
    if not getattr(node, "rescales", False) or not saved_tensors_hooks_are_free():
        return nullcontext()
    saved = node.saved_tensors
    return _forgetting(y, _again(saved[0].detach(), saved[-1], node.patch_size))


def _again(x: Tensor, scale: Tensor, patch_size: int) -> Callable[[], Tensor]:
    """A function that multiplies the map by its scales once more."""
    version = x._version

    def rescaled() -> Tensor:
        if x._version != version:
            raise RuntimeError(
                "The map that ConAM rescaled has been changed in place since, but its backward pass needs it: "
                "change a copy of it."
            )
        with torch.no_grad():
            return rescale(x, scale, patch_size)

    return rescaled


@contextmanager
def _forgetting(y: Tensor, rescaled: Callable[[], Tensor]) -> Iterator[None]:
    """Replace ``y`` among the tensors that autograd saves by the function that makes it."""
    key = _key(y)

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return rescaled if _key(tensor) == key else tensor

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        yield


def _key(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version
