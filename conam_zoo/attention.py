"""ConAM, the confidence attention module.

Source: Xue, Yuan, Neri, "ConAM: Confidence Attention Module for Convolutional Neural Networks",
arXiv 2110.14369v1 (2021; the authors withdrew the preprint in 2022). This is an independent reimplementation.

For a map ``x`` of shape (N, C, H, W) and square patches of side ``p``:

1. local context ``l_i``: the mean of patch i, (N, P, C); global context ``g``: the mean of all pixels, (N, 1, C);
2. one shared perceptron embeds both: ``e(v) = relu(W2 relu(W1 v + b1) + b2)``;
3. confidence: ``eta = softmax_i(e(l_i) . e(g))`` over the P patches, one number per patch, (N, P);
4. every pixel of patch i becomes ``x * (1 + eta_i)``.

What is this project's own, because the paper is silent:

- Sizes that ``p`` does not divide: the patches at the right and lower edge are smaller, their mean counts only real
  pixels, and ``g`` stays the mean over all pixels. A map smaller than a patch is one patch.
- The hidden width defaults to C, both linear layers have biases and keep PyTorch's default initialisation.
- Embedding, dot product and softmax are computed in at least float32, also under autocast and in half precision
  models, because the logits are unbounded. The patch means of a half precision map are summed in float32 too, but
  rounded once to the map's type. Patch means and embeddings are clamped to 1e17, so that the global context and the
  dot product of huge activations stay finite in float32; no value below that is touched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConAM"]


def _patch_means(x: Tensor, patch_size: int) -> Tensor:
    """Mean of every patch: (N, C, H, W) -> (N, C, ceil(H/p), ceil(W/p)). Reads the map once."""
    return F.avg_pool2d(x, patch_size, stride=patch_size, ceil_mode=True, count_include_pad=False)


def _extents(size: int, patch_size: int, like: Tensor) -> Tensor:
    """Number of real pixels of each patch along one side: (ceil(size/p),)."""
    starts = torch.arange(0, size, patch_size, device=like.device)
    return (size - starts).clamp(max=patch_size).to(like.dtype)


def _contexts(x: Tensor, patch_size: int, limit: float = 1e17) -> Tensor:
    """Local contexts with the global one behind them, in at least float32: (N, C, H, W) -> (N, P + 1, C).

    ``limit`` bounds the local contexts: two infinite sums of opposite sign would make the global one NaN.
    """
    means = _patch_means(x, patch_size)
    if means.dtype == torch.bfloat16 or means.dtype == torch.float16:
        means = means.float()
    means = means.clamp(-limit, limit)
    local_contexts = means.flatten(2).transpose(1, 2)  # (N, P, C)
    height, width = x.shape[2], x.shape[3]
    if height % patch_size == 0 and width % patch_size == 0:
        global_context = local_contexts.mean(dim=1, keepdim=True)
    else:  # edge patches hold fewer pixels: weigh each mean by its share of the map
        rows, columns = _extents(height, patch_size, means), _extents(width, patch_size, means)
        shares = (rows[:, None] * columns[None, :] / (height * width)).flatten()  # (P,)
        global_context = (local_contexts * shares[:, None]).sum(dim=1, keepdim=True)
    return torch.cat([local_contexts, global_context], dim=1)


def _agreement(contexts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, limit: float = 1e17) -> Tensor:
    """Dot product of each embedded local context with the embedded global one: (N, P + 1, C) -> (N, P).

    ``limit`` bounds the embeddings: its square times 3e4 channels is still a finite float32.
    """
    dtype = contexts.dtype
    hidden = F.relu(F.linear(contexts, w1.to(dtype), b1.to(dtype)))
    embedded = F.relu(F.linear(hidden, w2.to(dtype), b2.to(dtype)))
    embedded = embedded.to(dtype).clamp(max=limit)  # TorchScript cannot switch autocast off: there it comes in bf16
    return (embedded[:, :-1] * embedded[:, -1:]).sum(dim=2)


# The two halves of the forward pass are leaves for torch.fx: they look at the map's size, which a symbolic tracer
# does not know, and switch autocast off, which a tracer would forget.


@torch.fx.wrap
def _confidence(x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Confidence of every patch, in at least float32: (N, C, H, W) -> (N, ceil(H/p), ceil(W/p))."""
    contexts = _contexts(x, patch_size)
    if torch.jit.is_scripting():
        logits = _agreement(contexts, w1, b1, w2, b2)
    elif x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            logits = _agreement(contexts, w1, b1, w2, b2)
    else:
        logits = _agreement(contexts, w1, b1, w2, b2)
    rows = (x.shape[2] + patch_size - 1) // patch_size
    return torch.softmax(logits, dim=1).unflatten(1, (rows, -1))


@torch.fx.wrap
def _recalibrate(x: Tensor, confidence: Tensor, patch_size: int) -> Tensor:
    """Multiply every pixel by one plus the confidence of its patch: (N, C, H, W) -> (N, C, H, W)."""
    scale = (confidence + 1).to(x.dtype)
    n, channels, height, width = x.shape
    rows, columns = scale.shape[1], scale.shape[2]
    if height % patch_size == 0 and width % patch_size == 0:
        # Splitting the two sides is a view in every memory format, so the scale broadcasts without being enlarged.
        patches = x.view(n, channels, rows, patch_size, columns, patch_size)
        return (patches * scale[:, None, :, None, :, None]).reshape(n, channels, height, width)
    enlarged = scale.repeat_interleave(patch_size, dim=1)[:, :height]
    enlarged = enlarged.repeat_interleave(patch_size, dim=2)[:, :, :width]
    return x * enlarged.unsqueeze(1)


class ConAM(nn.Module):
    """Confidence attention: rescales every patch of a map by how well it agrees with the whole map.

    Shape: (N, C, H, W) -> (N, C, H, W), any H and W, memory format kept. The map is read once to pool and once to
    scale. The linear layers are applied functionally: hooks registered on ``fc1`` and ``fc2`` do not fire.

    >>> attention = ConAM(channels=16, patch_size=8)
    >>> x = torch.randn(2, 16, 32, 32)
    >>> attention(x).shape
    torch.Size([2, 16, 32, 32])
    >>> attention.confidence(x).shape
    torch.Size([2, 4, 4])

    Source: arXiv 2110.14369v1, section 3; see the module's docstring for the equations and our additions.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        hidden_channels: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Args:
            channels: Number of channels C of the map.
            patch_size: Side p of the square patches, in pixels.
            hidden_channels: Width h of the perceptron's hidden layer; C if None.
            device: Where the parameters are made.
            dtype: Their floating-point type.

        Raises:
            ValueError: If a size is not a positive integer.
        """
        super().__init__()
        hidden_channels = channels if hidden_channels is None else hidden_channels
        sizes = {"channels": channels, "patch_size": patch_size, "hidden_channels": hidden_channels}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ConAM: {name} is {value!r}, but it must be a positive integer.")
        self.channels = channels
        self.patch_size = patch_size
        self.hidden_channels = hidden_channels
        self.fc1 = nn.Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_channels, channels, device=device, dtype=dtype)

    def confidence(self, x: Tensor) -> Tensor:
        """The confidence map: (N, C, H, W) -> (N, ceil(H/p), ceil(W/p)), at least float32, summing to 1 per image."""
        return _confidence(x, self.patch_size, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the map: (N, C, H, W) -> (N, C, H, W)."""
        return _recalibrate(x, self.confidence(x), self.patch_size)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, patch_size={self.patch_size}"
