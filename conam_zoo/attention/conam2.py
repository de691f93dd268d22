"""ConAM2: ConAM with an agreement for every channel, and a gate that can suppress.

This project's own form, found by comparing forms on held-out training images (docs/conam.md has the evidence). Local
contexts ``l_i``, the global context ``g`` and the perceptron are those of ConAM, but for a second ReLU, so that an
agreement can be negative:

1. embedding: ``e(v) = W2 relu(W1 v + b1) + b2``, (N, P, C) and (N, 1, C);
2. agreement of patch i with the map, channel by channel: ``z_i = e(l_i) * e(g)``, (N, P, C), where ConAM has the sum
   over the channels;
3. gate: ``a_i = 1 / (1 + exp(-z_i))``, (N, P, C), where ConAM has a softmax over the patches;
4. every pixel of patch i becomes ``x * a_i``, channel by channel, where ConAM has ``x * (1 + eta_i)``.

So a patch is rescaled by between 0 and 1, whatever the other patches are, and each channel by itself; ConAM multiplies
all channels alike, by between 1 and 2, and shares a sum of one among the patches. Parameters: 2hC + h + C, as ConAM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .equations import LIMIT, _contexts, _patch_means

__all__ = ["ConAM2"]


def _embedded(contexts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, limit: float = LIMIT) -> Tensor:
    """The perceptron in the precision of the contexts: (N, P + 1, C) -> (N, P + 1, C). ``limit`` bounds the result."""
    dtype = contexts.dtype
    hidden = F.relu(F.linear(contexts, w1.to(dtype), b1.to(dtype)))
    return F.linear(hidden, w2.to(dtype), b2.to(dtype)).to(dtype).clamp(-limit, limit)


# Leaves for torch.fx, as in ConAM: they look at the map's size and layout, and switch autocast off.


@torch.fx.wrap
def _gates(x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Steps 1 to 3, in at least float32: (N, C, H, W) -> (N, rows, columns, C)."""
    means = _patch_means(x, patch_size)
    contexts = _contexts(means, x.shape[2], x.shape[3], patch_size)  # (N, P + 1, C)
    if torch.jit.is_scripting():
        embedded = _embedded(contexts, w1, b1, w2, b2)
    elif x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            embedded = _embedded(contexts, w1, b1, w2, b2)
    else:
        embedded = _embedded(contexts, w1, b1, w2, b2)
    return (embedded[:, :-1] * embedded[:, -1:]).sigmoid().unflatten(1, (means.shape[2], -1))


@torch.fx.wrap
def _gated(x: Tensor, gates: Tensor, patch_size: int) -> Tensor:
    """Step 4: (N, C, H, W), (N, rows, columns, C) -> (N, C, H, W).

    The gates are repeated along the lines of the map alone: what is multiplied is then one long line for each line of
    patches, whatever the layout.
    """
    n, channels, height, width = x.shape
    rows, columns = gates.shape[1], gates.shape[2]
    gates = gates.to(x.dtype)
    lines = gates[:, :, :, None].expand(n, rows, columns, patch_size, channels)
    lines = lines.reshape(n, rows, columns * patch_size, channels)[:, :, :width].permute(0, 3, 1, 2)  # (N, C, rows, W)
    if x.is_contiguous():
        lines = lines.contiguous()
    if height % patch_size == 0:
        return (x.view(n, channels, rows, patch_size, width) * lines[:, :, :, None]).reshape(n, channels, height, width)
    return x * lines.repeat_interleave(patch_size, dim=2)[:, :, :height]


class ConAM2(nn.Module):
    """ConAM with an agreement for every channel, and a gate between 0 and 1; see the module's docstring.

    Shape: (N, C, H, W) -> (N, C, H, W), any H and W, memory format kept. The keys of its state dict are ConAM's. The
    linear layers are applied functionally: hooks registered on ``fc1`` and ``fc2`` do not fire.

    >>> attention = ConAM2(channels=16, patch_size=8)
    >>> x = torch.randn(2, 16, 32, 32)
    >>> attention(x).shape
    torch.Size([2, 16, 32, 32])
    >>> attention.gates(x).shape
    torch.Size([2, 4, 4, 16])
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
                raise ValueError(f"ConAM2: {name} is {value!r}, but it must be a positive integer.")
        self.channels = channels
        self.patch_size = patch_size
        self.hidden_channels = hidden_channels
        self.fc1 = nn.Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_channels, channels, device=device, dtype=dtype)

    @torch.jit.export
    def gates(self, x: Tensor) -> Tensor:
        """The gate of every patch and channel: (N, C, H, W) -> (N, ceil(H/p), ceil(W/p), C), at least float32."""
        return _gates(x, self.patch_size, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    @torch.jit.export
    def confidence(self, x: Tensor) -> Tensor:
        """The mean gate of every patch: (N, C, H, W) -> (N, ceil(H/p), ceil(W/p)). It does not sum to one."""
        return self.gates(x).mean(dim=3)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the map: (N, C, H, W) -> (N, C, H, W)."""
        return _gated(x, self.gates(x), self.patch_size)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, patch_size={self.patch_size}"
