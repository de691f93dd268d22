"""The equations of ConAM, one function each, in plain differentiable operations: the reference for everything else.

The source and the equations stand in the docstring of ``conam_zoo.layers.conam``.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds patch means and embeddings: its square times 3e4 channels is still a finite float32. It is handed on as a
# default argument because TorchScript reads no globals.
LIMIT: Final[float] = 1e17


def patch_means(x: Tensor, patch_size: int) -> Tensor:
    """Mean of every patch: (N, C, H, W) -> (N, C, ceil(H/p), ceil(W/p)). Reads the map once.

    PyTorch's average pooling of NCHW maps on a CPU is not vectorised: whole patches are added line by line there.
    """
    n, channels, height, width = x.shape
    if (
        patch_size >= 4
        and height % patch_size == 0
        and width % patch_size == 0
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.is_contiguous()
    ):
        rows, columns = height // patch_size, width // patch_size
        lines = x.reshape(n * channels * rows, patch_size, width)  # no view: what is traced serves any memory format
        if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
            lines = lines.sum(1, dtype=torch.float32)
        else:
            lines = lines.sum(1)
        sums = lines.reshape(n, channels, rows, columns, patch_size).sum(4)
        return (sums / patch_size**2).to(x.dtype)
    return F.avg_pool2d(x, patch_size, stride=patch_size, ceil_mode=True, count_include_pad=False)


def _extents(size: int, patch_size: int, like: Tensor) -> Tensor:
    """Number of real pixels of each patch along one side: (ceil(size/p),)."""
    starts = torch.arange(0, size, patch_size, device=like.device)
    return (size - starts).clamp(max=patch_size).to(like.dtype)


# What follows are leaves for torch.fx: they look at the map's size, which a symbolic tracer does not know, and switch
# autocast off, which a tracer would forget.


@torch.fx.wrap
def contexts_of(x: Tensor, patch_size: int, limit: float = LIMIT) -> Tensor:
    """Local contexts with the global one behind them, in at least float32: (N, C, H, W) -> (N, P + 1, C).

    ``limit`` bounds the local contexts: two infinite sums of opposite sign would make the global one NaN.
    """
    height, width = x.shape[2], x.shape[3]
    means = patch_means(x, patch_size)
    if means.dtype == torch.bfloat16 or means.dtype == torch.float16:
        means = means.float()
    means = means.clamp(-limit, limit)
    local_contexts = means.flatten(2).transpose(1, 2)  # (N, P, C)
    if height % patch_size == 0 and width % patch_size == 0:
        global_context = local_contexts.mean(dim=1, keepdim=True)
    else:  # edge patches hold fewer pixels: weigh each mean by its share of the map
        rows, columns = _extents(height, patch_size, means), _extents(width, patch_size, means)
        shares = (rows[:, None] * columns[None, :] / (height * width)).flatten()  # (P,)
        global_context = (local_contexts * shares[:, None]).sum(dim=1, keepdim=True)
    return torch.cat([local_contexts, global_context], dim=1)


def _embed(contexts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The perceptron, in the type of the contexts: (N, P + 1, C) -> (N, P + 1, C)."""
    dtype = contexts.dtype
    hidden = F.relu(F.linear(contexts, w1.to(dtype), b1.to(dtype)))
    return F.relu(F.linear(hidden, w2.to(dtype), b2.to(dtype)))


@torch.fx.wrap
def confidence_map(x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Confidence of every patch, in at least float32: (N, C, H, W) -> (N, ceil(H/p), ceil(W/p))."""
    contexts = contexts_of(x, patch_size)
    if torch.jit.is_scripting():  # which cannot switch autocast off
        embedded = _embed(contexts, w1, b1, w2, b2).to(contexts.dtype)
    elif x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            embedded = _embed(contexts, w1, b1, w2, b2)
    else:
        embedded = _embed(contexts, w1, b1, w2, b2)
    return confidence_between(embedded, x, patch_size)


@torch.fx.wrap
def confidence_between(embedded: Tensor, x: Tensor, patch_size: int, limit: float = LIMIT) -> Tensor:
    """Confidence from embeddings of any type: (N, P + 1, C), map -> (N, ceil(H/p), ceil(W/p)), at least float32.

    ``limit`` bounds the embeddings.
    """
    if embedded.dtype == torch.bfloat16 or embedded.dtype == torch.float16:
        embedded = embedded.float()
    embedded = embedded.clamp(max=limit)
    logits = (embedded[:, :-1] * embedded[:, -1:]).sum(dim=2)
    return torch.softmax(logits, dim=1).unflatten(1, ((x.shape[2] + patch_size - 1) // patch_size, -1))


def factor_of(confidence: Tensor, x: Tensor) -> Tensor:
    """What ``rescaled`` takes for confidences, in the type of the map: one plus them, or in half precision themselves.

    Beside one, bfloat16 has steps of 1/128, which is an eighth of a sixteenth: most of what patches differ by.
    """
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        return confidence.to(x.dtype)
    return confidence + 1


def rescaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` times one plus the confidences that ``factor_of`` made the factor of; the shapes are broadcast."""
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        return torch.addcmul(x, x, factor)  # rounded once, at the end
    return x * factor


@torch.fx.wrap
def recalibrate(x: Tensor, confidence: Tensor, patch_size: int) -> Tensor:
    """Multiply every pixel by one plus the confidence of its patch: (N, C, H, W) -> (N, C, H, W)."""
    factor = factor_of(confidence, x)
    n, channels, height, width = x.shape
    rows, columns = factor.shape[1], factor.shape[2]
    if height % patch_size == 0 and width % patch_size == 0:
        # Splitting the two sides is a view in every memory format, so the factor broadcasts without being enlarged.
        patches = x.view(n, channels, rows, patch_size, columns, patch_size)
        return rescaled(patches, factor[:, None, :, None, :, None]).reshape(n, channels, height, width)
    enlarged = factor.repeat_interleave(patch_size, dim=1)[:, :height]
    enlarged = enlarged.repeat_interleave(patch_size, dim=2)[:, :, :width]
    return rescaled(x, enlarged.unsqueeze(1))
