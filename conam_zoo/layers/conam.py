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
- The hidden width defaults to C and both linear layers have biases. They start as PyTorch has them, but for the second
  bias, which starts at one: the agreement is of degree four in the weights, so from PyTorch's start every patch gets
  about the same confidence, and its gradient is small. Nets learn alike from both, but confidences vary more from this
  one (docs/conam.md).
- Weight decay pulls such weights to zero, where the gradient vanishes with their cube and all confidences stay even. So
  the nets exempt them from it: see ``no_weight_decay`` of the models.
- Embedding, dot product and softmax are computed in at least float32, also under autocast and in half precision models,
  because the logits are unbounded; only TorchScript, which cannot switch autocast off, embeds in its type. The patch
  means of a half precision map are summed in float32 too, but rounded once to the map's type. Such a map is scaled as
  ``x + x * eta``, because ``1 + eta`` would round most of ``eta`` away in bfloat16. Patch means and embeddings are
  clamped to 1e17, so that the global context and the dot product of huge activations stay finite in float32; no value
  below that is touched.
"""

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conam_zoo.layers._torch_private import is_called_plainly
from conam_zoo.layers.conam_equations import confidence_between, confidence_map, contexts_of, recalibrate
from conam_zoo.layers.conam_fused import applies, attend

for _name in ("confidence_between", "contexts_of", "recalibrate"):  # leaves for torch.fx in this module, too
    torch.fx.wrap(_name)


@torch.fx.wrap
def _attend(x: Tensor, patch_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The whole module; a leaf for torch.fx, as the parts are. (N, C, H, W) -> (N, C, H, W)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile the other half of an "and")
        if applies(x, patch_size):
            return attend(x, patch_size, w1, b1, w2, b2)
    return recalibrate(x, confidence_map(x, patch_size, w1, b1, w2, b2), patch_size)


def _call_layers(fc1: nn.Module, fc2: nn.Module, contexts: Tensor) -> Tensor:
    """The perceptron by calling its layers, each with inputs of its weights' type: (N, P + 1, C) -> (N, P + 1, C)."""

    def call(layer: nn.Module, inputs: Tensor) -> Tensor:
        dtypes = [parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()]
        return F.relu(layer(inputs.to(dtypes[0]) if dtypes else inputs))

    if isinstance(contexts, torch.fx.Proxy):
        return F.relu(fc2(F.relu(fc1(contexts))))
    if contexts.device.type == "meta":
        return call(fc2, call(fc1, contexts))
    with torch.autocast(contexts.device.type, enabled=False):
        return call(fc2, call(fc1, contexts))


class ConAM(nn.Module):
    """Confidence attention: rescales every patch of a map by how well it agrees with the whole map.

    Shape: (N, C, H, W) -> (N, C, H, W), any H and W, memory format kept. The map is read once to pool and once to
    scale. Plain linear layers are computed in one pass with the rest; layers that were replaced, parametrised or given
    hooks are called.

    ``patch_size`` is the side p of the square patches in pixels, ``hidden_channels`` the width of the perceptron's
    hidden layer, C if None. A size that is not a positive integer is a ``ValueError``.

    >>> attention = ConAM(channels=16, patch_size=8)
    >>> x = torch.randn(2, 16, 32, 32)
    >>> attention(x).shape
    torch.Size([2, 16, 32, 32])
    >>> attention.confidence(x).shape
    torch.Size([2, 4, 4])

    Source: arXiv 2110.14369v1, section 3; see the module's docstring for the equations and our additions.
    """

    # TorchScript reads the answer when it compiles, and compiles the branch that applies.
    __constants__ = ("has_plain_layers",)
    __jit_unused_properties__ = ("has_plain_layers",)

    def __init__(
        self,
        channels: int,
        patch_size: int,
        hidden_channels: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_channels = channels if hidden_channels is None else hidden_channels
        sizes: dict[str, Any] = {"channels": channels, "patch_size": patch_size, "hidden_channels": hidden_channels}
        for name, value in sizes.items():
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ConAM: {name} is {value!r}, but it must be a positive integer.")
        channels, patch_size, hidden_channels = map(int, sizes.values())  # NumPy's whole numbers are such, too
        self.channels = channels
        self.patch_size = patch_size
        self.hidden_channels = hidden_channels
        self.fc1 = nn.Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_channels, channels, device=device, dtype=dtype)
        nn.init.ones_(self.fc2.bias)

    def reset_parameters(self) -> None:
        """Initialise both layers anew, as the constructor does."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        nn.init.ones_(self.fc2.bias)

    @property
    def has_plain_layers(self) -> bool:
        """Whether both linear layers are computed with the rest, and not called."""
        return is_called_plainly(self.fc1) and is_called_plainly(self.fc2)

    @torch.jit.export
    def confidence(self, x: Tensor) -> Tensor:
        """The confidence map: (N, C, H, W) -> (N, ceil(H/p), ceil(W/p)), at least float32, summing to 1 per image."""
        if self.has_plain_layers:
            return confidence_map(x, self.patch_size, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        else:
            contexts = contexts_of(x, self.patch_size)
            if torch.jit.is_scripting():
                embedded = F.relu(self.fc2(F.relu(self.fc1(contexts))))
            else:
                embedded = _call_layers(self.fc1, self.fc2, contexts)
            return confidence_between(embedded, x, self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_plain_layers:
            return recalibrate(x, self.confidence(x), self.patch_size)
        else:
            return _attend(x, self.patch_size, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, patch_size={self.patch_size}"
