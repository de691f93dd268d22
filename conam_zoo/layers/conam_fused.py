"""ConAM in few operations, with a backward pass of its own that reads and writes the map as seldom as possible.

Automatic differentiation of the equations writes two gradient maps, one of the scaling and one of the pooling, and adds
them. Here the forward pass reads the map twice (to pool, to scale) and writes it once; the backward pass reads map and
gradient for the patch-wise dot products, and then reads the gradient and writes the sum of both terms at once. (In NCHW
the second term is added in place, which for lines as short as a patch is faster than one pass over both.)

With ``y = x * s``, ``s = 1 + eta(m)`` and ``m`` the patch means of ``x``, for the gradient ``g`` of ``y``:

    ds_i = sum over patch i and channels of g * x
    dx   = g * s + dm / p^2        with dm the gradient of eta(m) for ds

ConAM keeps its input and one factor per patch. A convolution behind it would keep the product of the two, a second map
of the same size; ``recompute_rescaled`` has it multiplied once more in the backward pass instead.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from conam_zoo.layers._torch_private import (
    clamp_gradient,
    is_batched,
    saved_tensors_hooks_are_free,
    transforms_are_active,
    version_of,
)
from conam_zoo.layers.conam_equations import LIMIT, confidence_map, factor_of, patch_means, recalibrate, rescaled


def applies(x: Tensor, patch_size: int) -> bool:
    """Whether ``attend`` is to be used: eagerly, on whole patches; with or without gradients, so that both agree.

    Compilers and tracers get the equations, which they fuse or record; so do transforms of ``torch.func`` and
    forward-mode differentiation, which a function with its own backward pass does not serve.
    """
    return (
        x.dim() == 4
        and x.shape[2] % patch_size == 0
        and x.shape[3] % patch_size == 0
        and x.numel() > 0
        and x.device.type != "meta"
        and type(x) in (Tensor, torch.nn.Parameter)  # no fake, proxy or distributed tensors
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not transforms_are_active()
    )


def attend(x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """ConAM of a map whose sides are multiples of the patch side: (N, C, H, W) -> (N, C, H, W)."""
    output: Tensor
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, b1, w2, b2)):
        output = _InFewPasses.apply(x, patch_size, w1, b1, w2, b2)
    else:
        output = _forward(x, patch_size, w1, b1, w2, b2)[0]
    return output


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _strips(x: Tensor, patch_size: int) -> Tensor:
    """A channels_last map as one row for each line of each patch: (N, C, H, W) -> (N * H * columns, p * C), a view."""
    return x.permute(0, 2, 3, 1).view(-1, patch_size * x.shape[1])


def _per_strip(values: Tensor, patch_size: int) -> Tensor:
    """One value a patch, repeated for each line of it: (N, rows, columns) -> (N * H * columns, 1)."""
    n, rows, columns = values.shape
    return values[:, :, None].expand(n, rows, patch_size, columns).reshape(-1, 1)


def _per_pixel(values: Tensor, patch_size: int) -> Tensor:
    """One value a patch, repeated for each pixel of it: (N, rows, columns) -> (N, 1, H, W)."""
    n, rows, columns = values.shape
    pixels = values[:, :, None, :, None].expand(n, rows, patch_size, columns, patch_size)
    return pixels.reshape(n, 1, rows * patch_size, columns * patch_size)


def _rescale(x: Tensor, factor: Tensor, patch_size: int) -> Tensor:
    """``rescaled`` with one factor a patch: (N, C, H, W), (N, rows, columns) -> (N, C, H, W)."""
    if not _channels_last(x):
        return rescaled(x, _per_pixel(factor, patch_size))
    n, channels, height, width = x.shape
    strips = rescaled(_strips(x, patch_size), _per_strip(factor, patch_size))
    return strips.view(n, height, width, channels).permute(0, 3, 1, 2)


def _patch_dots(gradient: Tensor, x: Tensor, patch_size: int) -> Tensor:
    """Sum of ``gradient * x`` over every patch and all channels: two (N, C, H, W) -> (N, rows, columns)."""
    n, _, height, width = x.shape
    rows, columns = height // patch_size, width // patch_size
    dtype = torch.promote_types(x.dtype, torch.float32)
    if _channels_last(x):
        dots = torch.linalg.vecdot(_strips(gradient, patch_size), _strips(x, patch_size))
        return dots.view(n, rows, patch_size, columns).sum(2, dtype=dtype)
    product = (gradient * x).sum(1, dtype=dtype)  # (N, H, W)
    return product.view(n, rows, patch_size, columns, patch_size).sum((2, 4))


def _input_gradient(gradient: Tensor, scale: Tensor, share: Tensor, patch_size: int) -> Tensor:
    """``gradient * scale + share``: (N, C, H, W), (N, rows, columns), (N, C, rows, columns) -> (N, C, H, W)."""
    n, channels, height, width = gradient.shape
    rows, columns = scale.shape[1:]
    if _channels_last(gradient):
        line = columns * patch_size * channels
        added = share.permute(0, 2, 3, 1)[:, :, :, None].expand(n, rows, columns, patch_size, channels)
        factor = scale[..., None].expand(n, rows, columns, patch_size * channels)
        out = torch.addcmul(
            added.reshape(n, rows, 1, line),
            gradient.permute(0, 2, 3, 1).view(n, rows, patch_size, line),
            factor.reshape(n, rows, 1, line),
        )
        return out.view(n, height, width, channels).permute(0, 3, 1, 2)
    out = gradient * _per_pixel(scale, patch_size)
    # Adding one value to a patch as a product with ones and zeros: (N * C * rows, columns) by (columns, p * W).
    ones = torch.eye(columns, dtype=out.dtype, device=out.device).repeat_interleave(patch_size, 1).repeat(1, patch_size)
    out.view(-1, ones.shape[1]).addmm_(share.reshape(-1, columns), ones)
    return out


def _forward(x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    """The result, and what the backward pass needs besides: contexts, embeddings, confidences, factor.

    Each operation costs a few microseconds before it computes anything, which on small maps is most of the time: so
    there are as few as can be. None of them is one that autocast lowers: it leaves those with ``out`` alone.
    """
    n, channels, height, width = x.shape
    rows, columns = height // patch_size, width // patch_size
    dtype = torch.promote_types(x.dtype, torch.float32)
    contexts = x.new_empty((n, rows * columns + 1, channels), dtype=dtype)
    local_contexts = contexts[:, :-1]
    local_contexts.copy_(patch_means(x, patch_size).flatten(2).transpose(1, 2))
    torch.mean(local_contexts.clamp_(-LIMIT, LIMIT), dim=1, out=contexts[:, -1])
    embedded = _linear(_hidden(contexts, w1, b1), w2, b2).clamp_(0, LIMIT).view(contexts.shape)
    confidence = torch.softmax((embedded[:, :-1] * embedded[:, -1:]).sum(2), dim=1)
    factor = factor_of(confidence, x).view(n, rows, columns)
    return _rescale(x, factor, patch_size), contexts, embedded, confidence, factor


def _hidden(contexts: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """The perceptron's hidden layer: (N, P + 1, C) -> (N * (P + 1), h)."""
    return _linear(contexts.view(-1, contexts.shape[2]), w1, b1).relu_()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer in the type of its input: (N, C) -> (N, D)."""
    out = x.new_empty(len(x), len(weight))
    return torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).t(), out=out)


class _InFewPasses(torch.autograd.Function):
    """Equal to the equations, up to the order of additions, and in half precision the rounding of ``s`` in ``dx``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        output, contexts, embedded, confidence, factor = _forward(x, patch_size, w1, b1, w2, b2)
        ctx.save_for_backward(x, w1, b1, w2, b2, contexts, embedded, confidence, factor)
        ctx.patch_size = patch_size
        ctx.rescales = True  # for recompute_rescaled, to which this object is the result's ``grad_fn``
        ctx.version = version_of(output)
        return output.detach()  # a view that was made in here could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(gradient.device.type):
            with torch.autocast(gradient.device.type, enabled=False):
                return _InFewPasses.backward(ctx, gradient)
        x, w1, b1, w2, b2, contexts, embedded, confidence, _ = ctx.saved_tensors
        patch_size = ctx.patch_size
        if torch.is_grad_enabled() or is_batched(gradient):
            return _by_the_equations(ctx, gradient, x, w1, b1, w2, b2)
        layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)
        n, channels, height, width = x.shape
        rows, columns = height // patch_size, width // patch_size
        dtype = contexts.dtype

        grad_confidence = _patch_dots(gradient, x, patch_size).view(n, -1).to(dtype)
        grad_logits = confidence * (grad_confidence - (confidence * grad_confidence).sum(1, keepdim=True))
        grad_embedded = torch.empty_like(embedded)
        torch.mul(grad_logits[:, :, None], embedded[:, -1:], out=grad_embedded[:, :-1])
        torch.bmm(grad_logits[:, None], embedded[:, :-1], out=grad_embedded[:, -1:])
        grad_embedded = clamp_gradient(grad_embedded, embedded, 0, LIMIT).view(-1, channels)
        hidden = _hidden(contexts, w1, b1)  # made again, not kept
        grad_hidden = grad_embedded @ w2.to(dtype)
        grad_hidden = clamp_gradient(grad_hidden, hidden, 0, math.inf)
        grad_contexts = (grad_hidden @ w1.to(dtype)).view(contexts.shape)
        grad_means = torch.add(grad_contexts[:, :-1], grad_contexts[:, -1:], alpha=1 / (rows * columns))
        grad_means = clamp_gradient(grad_means, contexts[:, :-1], -LIMIT, LIMIT)

        grad_x = None
        if ctx.needs_input_grad[0]:
            share = (grad_means / patch_size**2).to(x.dtype).view(n, rows, columns, channels).permute(0, 3, 1, 2)
            scale = (confidence + 1).to(x.dtype).view(n, rows, columns)
            grad_x = _input_gradient(gradient, scale, share, patch_size)
        grad_w1 = (grad_hidden.t() @ contexts.view(-1, channels)).to(w1.dtype)
        grad_w2 = (grad_embedded.t() @ hidden).to(w2.dtype)
        return grad_x, None, grad_w1, grad_hidden.sum(0).to(b1.dtype), grad_w2, grad_embedded.sum(0).to(b2.dtype)


def _by_the_equations(ctx: Any, gradient: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by way of the equations: for ``create_graph``, and for many of them at once by vmap."""
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: x may itself depend on the parameters, and that path is not this function's.
        aliases = [tensor.view_as(tensor) for tensor in (x, *parameters)]
        confidence = confidence_map(aliases[0], ctx.patch_size, *aliases[1:])
        output = recalibrate(aliases[0], confidence, ctx.patch_size)
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=again))
    grad_x, *grad_parameters = [next(found) if need else None for need in needs]
    return grad_x, None, *grad_parameters


def recompute_rescaled(y: Tensor) -> AbstractContextManager[None]:
    """A context in which autograd does not keep ``y``, if ConAM has just made it from a map that is there anyway.

    Layers that are called in it and would keep ``y`` for their backward pass get it computed again there, bit for bit.
    The context does nothing for a result of anything else than the eager ConAM in training, and inside other hooks for
    saved tensors (activation checkpoints, offloading), which have their own way.

    >>> from conam_zoo.layers.conam import ConAM
    >>> attention, layer = ConAM(16, 8), torch.nn.Conv2d(16, 16, 3)
    >>> y = attention(torch.randn(2, 16, 32, 32))  # nothing may change it in place before it is handed over
    >>> with recompute_rescaled(y):
    ...     z = layer(y)

    Source: saved tensor hooks, https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(y, Tensor):
        return nullcontext()
    node: Any = y.grad_fn
    if not getattr(node, "rescales", False) or not saved_tensors_hooks_are_free():
        return nullcontext()
    if version_of(y) != node.version:  # changed since, by a hook
        return nullcontext()
    saved = node.saved_tensors
    x, factor, patch_size = saved[0].detach(), saved[-1], node.patch_size
    version, key = version_of(x), _key(y)
    if version is None:
        return nullcontext()

    def rescaled() -> Tensor:
        if version_of(x) != version:
            raise RuntimeError(
                "The map that ConAM rescaled has been changed in place since, but its backward pass needs it: "
                "change a copy of it."
            )
        with torch.no_grad():
            return _rescale(x, factor, patch_size)

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return rescaled if _key(tensor) == key else tensor

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return saved_tensors_hooks(pack, unpack)


def _key(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), version_of(tensor)
