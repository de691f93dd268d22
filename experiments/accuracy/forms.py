"""ConAM with switches: the forms that the paper's ablation compares, and candidates for a better one.

The paper's form is ``conam_zoo.layers.conam.ConAM``; this class equals it when every switch is at its default. It is
written to be read and compared, not to be fast. Importing this module registers it as ``"conam_variant"``. With local
contexts ``l_i``, the global context ``g`` and the perceptron ``e`` of ``conam_zoo.layers.conam``:

1. agreement of patch i with the map:
   ``dot``         z_i = e(l_i) . e(g)
   ``scaled_dot``  z_i = t e(l_i) . e(g) / sqrt(C / heads),   t learned, 1 at the start
   ``cosine``      z_i = t e(l_i) . e(g) / (|e(l_i)| |e(g)|), t learned, 10 at the start
   With ``channel_term`` channel c of patch i has an agreement of its own, z_ic = e(g)_c + z_i - mean_j z_j: the global
   embedding rescales the channels, as in SE, and a patch's deviation from the mean agreement rescales the patch.
2. confidence over the P patches:
   ``softmax``     eta_i = exp(z_i) / sum_j exp(z_j)
   ``sigmoid``     eta_i = 1 / (1 + exp(-z_i))
   ``tanh``        eta_i = tanh(z_i - mean_j z_j), between -1 and 1: a gate that can go below one
   ``tanh_uncentred``  eta_i = tanh(z_i): the same, but it can also rescale all patches alike
3. scaling:
   ``none``        a_i = eta_i
   ``mean_one``    a_i = eta_i / mean_j eta_j; behind a softmax this is P eta_i
   ``mean_zero``   a_i = eta_i / mean_j eta_j - 1
4. every pixel of patch i becomes ``x (1 + a_i)`` with the shortcut, ``x a_i`` without. With ``identity_start`` it
   becomes ``x (1 + s a_i)``, where s is learned and 0 at the start, so that the module begins as the identity.

With several heads, the embedding is cut into as many groups of channels, one for each channel at ``heads`` 0; each
group has its own agreement, t and s, and rescales its own channels of the map. With ``unit_start`` the last layer's
bias starts at one, so that an agreement of a few channels is not a product of two small numbers. A context that is left
out is replaced by a vector of ones in step 1; with the global one alone all patches agree equally, and behind a softmax
the map is multiplied by the constant 1 + 1/P.

What is the paper's: ``dot``, ``softmax``, no scaling, one head, and the ablation of shortcut, second ReLU, contexts and
softmax. The rest is this project's own.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conam_zoo.layers.registry import register_attention

CHOICES = {
    "context": ("both", "local", "global"),
    "agreement": ("dot", "scaled_dot", "cosine"),
    "gate": ("softmax", "sigmoid", "tanh", "tanh_uncentred"),
    "scaling": ("none", "mean_one", "mean_zero"),
}
FIRST_TEMPERATURE = {"scaled_dot": 1.0, "cosine": 10.0}


@dataclass(frozen=True)
class ConAMVariantConfig:
    """The switches. Their defaults are the paper's form.

    A position that a switch does not have is a ``ValueError``, as are two that exclude each other.
    """

    shortcut: bool = True  # ``x (1 + a)`` instead of ``x a``
    second_relu: bool = True  # whether the perceptron ends in a ReLU
    context: str = "both"  # or "local" or "global": the embeddings that meet in the agreement
    agreement: str = "dot"  # or "scaled_dot" or "cosine"
    gate: str = "softmax"  # or "sigmoid", "tanh" or "tanh_uncentred"
    scaling: str = "none"  # or "mean_one" or "mean_zero"
    reduction: int = 1  # bottleneck ratio r: the hidden layer has C / r channels, at least one
    heads: int = 1  # groups of channels with their own confidences, which have to divide C; 0: one for each channel
    unit_start: bool = False  # whether the bias of the perceptron's last layer starts at one, see above
    channel_term: bool = False  # whether the global embedding replaces the mean agreement, channel by channel
    identity_start: bool = False  # whether a learned factor that starts at 0 stands before ``a``

    def __post_init__(self) -> None:
        for switch, value in asdict(self).items():
            if switch in CHOICES:
                good, wanted = value in CHOICES[switch], f"one of {', '.join(CHOICES[switch])}"
            elif switch == "reduction":
                good, wanted = type(value) is int and value >= 1, "a positive integer"
            elif switch == "heads":
                good, wanted = type(value) is int and value >= 0, "a positive integer, or 0 for one for each channel"
            else:
                good, wanted = type(value) is bool, "true or false"
            if not good:
                raise ValueError(f"attn_args: {switch} is {value!r}, but it must be {wanted}.")
        if not self.shortcut and self.identity_start:
            raise ValueError("attn_args: identity_start is on, but it needs the shortcut: set shortcut to true.")
        if not self.shortcut and (self.gate.startswith("tanh") or self.scaling == "mean_zero"):
            raise ValueError(
                f"attn_args: gate is {self.gate!r} and scaling is {self.scaling!r}, so what is added to one goes below "
                "zero, but shortcut is off: set it to true."
            )
        if self.gate.startswith("tanh") and self.scaling != "none":
            raise ValueError(
                f"attn_args: scaling is {self.scaling!r}, but the mean of a {self.gate} gate can be zero: use 'none'."
            )
        if self.channel_term and self.gate not in ("sigmoid", "tanh_uncentred"):
            raise ValueError(
                f"attn_args: channel_term is on, but behind the gate {self.gate!r} what all patches share has no "
                "effect: use 'sigmoid' or 'tanh_uncentred'."
            )

    @classmethod
    def from_args(cls, switches: dict[str, Any]) -> "ConAMVariantConfig":
        """The form that some switches describe; the others keep their defaults.

        An unknown switch is a ``ValueError``.
        """
        known = [field.name for field in fields(cls)]
        for switch in switches:
            if switch not in known:
                raise ValueError(f"attn_args has {switch!r}, but a conam_variant knows only {', '.join(known)}.")
        return cls(**switches)


# Leaves for torch.fx: they look at the map's type and size, and switch autocast off. As in ConAM, patch means and
# embeddings are clamped so that huge activations stay finite in float32.


@torch.fx.wrap
def _local_contexts(x: Tensor, patch_size: int) -> Tensor:
    """Mean of every patch over its real pixels, in at least float32: (N, C, H, W) -> (N, rows, columns, C)."""
    means = F.avg_pool2d(x, patch_size, stride=patch_size, ceil_mode=True, count_include_pad=False)
    if means.dtype == torch.bfloat16 or means.dtype == torch.float16:
        means = means.float()
    return means.clamp(-1e17, 1e17).permute(0, 2, 3, 1)


@torch.fx.wrap
def _global_context(x: Tensor) -> Tensor:
    """Mean of all pixels, in at least float32: (N, C, H, W) -> (N, 1, 1, C)."""
    half = x.dtype == torch.bfloat16 or x.dtype == torch.float16
    means = x.mean(dim=(2, 3), dtype=torch.float32 if half else x.dtype)
    return means.clamp(-1e17, 1e17)[:, None, None, :]


def _perceptron(contexts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, second_relu: bool) -> Tensor:
    dtype = contexts.dtype
    hidden = F.relu(F.linear(contexts, w1.to(dtype), b1.to(dtype)))
    embedded = F.linear(hidden, w2.to(dtype), b2.to(dtype)).to(dtype)
    if second_relu:
        embedded = F.relu(embedded)
    return embedded.clamp(-1e17, 1e17)


@torch.fx.wrap
def _embed(contexts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, second_relu: bool) -> Tensor:
    """The shared perceptron in the precision of the contexts: (..., C) -> (..., C)."""
    if torch.jit.is_scripting():
        return _perceptron(contexts, w1, b1, w2, b2, second_relu)
    if contexts.device.type != "meta" and torch.is_autocast_enabled(contexts.device.type):
        with torch.autocast(contexts.device.type, enabled=False):
            return _perceptron(contexts, w1, b1, w2, b2, second_relu)
    return _perceptron(contexts, w1, b1, w2, b2, second_relu)


def _times(x: Tensor, factors: Tensor, added: bool) -> Tensor:
    return torch.addcmul(x, x, factors) if added else x * factors


@torch.fx.wrap
def _rescale(x: Tensor, factors: Tensor, patch_size: int, shortcut: bool) -> Tensor:
    """Multiply the patches of every group of channels: (N, C, H, W), (N, rows, columns, heads) -> (N, C, H, W).

    With the ``shortcut`` by one plus the factors; see ``conam_equations.factor_of`` for half precision.
    """
    added = shortcut and (x.dtype == torch.bfloat16 or x.dtype == torch.float16)
    if shortcut and not added:
        factors = factors + 1
    factors = factors.to(x.dtype)
    n, channels, height, width = x.shape
    rows, heads = factors.shape[1], factors.shape[3]
    if heads > 1 and height % patch_size == 0:  # repeated along the lines of the map alone, not along its columns
        lines = factors.repeat_interleave(channels // heads, dim=3).repeat_interleave(patch_size, dim=2)[:, :, :width]
        lines = lines.permute(0, 3, 1, 2)  # (N, C, rows, W)
        if x.is_contiguous():
            lines = lines.contiguous()
        return _times(x.view(n, channels, rows, patch_size, width), lines[:, :, :, None], added).reshape(x.shape)
    factors = factors.permute(0, 3, 1, 2)
    factors = factors.repeat_interleave(x.shape[1] // factors.shape[1], dim=1) if factors.shape[1] > 1 else factors
    factors = factors.repeat_interleave(patch_size, dim=2)[:, :, : x.shape[2]]
    return _times(x, factors.repeat_interleave(patch_size, dim=3)[:, :, :, : x.shape[3]], added)


class ConAMVariant(nn.Module):
    """A form of ConAM; the module's docstring has the equations.

    Shape: (N, C, H, W) -> (N, C, H, W), any H and W. The keys of its state dict are those of ``ConAM``, and
    ``log_temperature``, (heads,), and ``gain``, one number for each gate, where the form learns them.

    ``patch_size`` is the side p of the square patches in pixels; without ``form`` it is the paper's. A size that is not
    a positive integer is a ``ValueError``, as are heads that do not divide the channels.

    >>> attention = ConAMVariant(16, patch_size=8, form=ConAMVariantConfig(gate="sigmoid", heads=4))
    >>> attention(torch.randn(2, 16, 32, 32)).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        form: ConAMVariantConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        form = ConAMVariantConfig() if form is None else form
        for name, value in {"channels": channels, "patch_size": patch_size}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"conam_variant: {name} is {value!r}, but it must be a positive integer.")
        heads = form.heads or channels
        if channels % heads:
            raise ValueError(
                f"attn_args: heads is {form.heads}, but it must divide the {channels} channels of every site."
            )
        self.channels = channels
        self.patch_size = patch_size
        # One attribute for each switch: TorchScript does not know data classes.
        self.shortcut = form.shortcut
        self.second_relu = form.second_relu
        self.context = form.context
        self.agreement = form.agreement
        self.gate = form.gate
        self.scaling = form.scaling
        self.heads = heads
        self.unit_start = form.unit_start
        self.channel_term = form.channel_term
        hidden_channels = max(1, channels // form.reduction)
        self.fc1 = nn.Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_channels, channels, device=device, dtype=dtype)
        if form.unit_start:
            nn.init.ones_(self.fc2.bias)
        self.log_temperature: nn.Parameter | None = None
        if form.agreement != "dot":
            first = math.log(FIRST_TEMPERATURE[form.agreement])
            self.log_temperature = nn.Parameter(torch.full((heads,), first, device=device, dtype=dtype))
        self.gain: nn.Parameter | None = None
        if form.identity_start:
            self.gain = nn.Parameter(torch.zeros(channels if form.channel_term else heads, device=device, dtype=dtype))

    def agreement_logits(self, x: Tensor) -> Tensor:
        """Step 1: (N, C, H, W) -> (N, rows, columns, gates), in at least float32; a gate for each head or channel."""
        w1, b1, w2, b2 = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        local_contexts = _embed(_local_contexts(x, self.patch_size), w1, b1, w2, b2, self.second_relu)
        global_context = _embed(_global_context(x), w1, b1, w2, b2, self.second_relu)
        channel_term = global_context
        if self.context == "local":
            global_context = torch.ones_like(global_context)
        elif self.context == "global":
            local_contexts = torch.ones_like(local_contexts)
        local_contexts = local_contexts.unflatten(-1, (self.heads, -1))  # (N, rows, columns, heads, C / heads)
        global_context = global_context.unflatten(-1, (self.heads, -1))
        if self.agreement == "cosine":
            local_contexts = F.normalize(local_contexts, dim=-1, eps=1e-6)
            global_context = F.normalize(global_context, dim=-1, eps=1e-6)
        logits = (local_contexts * global_context).sum(dim=-1)
        if self.agreement == "scaled_dot":
            logits = logits / math.sqrt(self.channels // self.heads)
        if self.log_temperature is not None:
            logits = logits * self.log_temperature.exp()
        if self.channel_term:
            of_patches = logits - logits.mean(dim=(1, 2), keepdim=True)
            logits = of_patches.repeat_interleave(self.channels // self.heads, dim=3) + channel_term
        return logits

    def head_confidence(self, x: Tensor) -> Tensor:
        """Step 2, for every gate: (N, C, H, W) -> (N, rows, columns, gates), in at least float32."""
        logits = self.agreement_logits(x)
        if self.gate == "sigmoid":
            return logits.sigmoid()
        if self.gate == "tanh":
            return (logits - logits.mean(dim=(1, 2), keepdim=True)).tanh()
        if self.gate == "tanh_uncentred":
            return logits.tanh()
        return logits.flatten(1, 2).softmax(dim=1).view_as(logits)

    def confidence(self, x: Tensor) -> Tensor:
        """The confidence map, the mean of the gates: (N, C, H, W) -> (N, rows, columns)."""
        return self.head_confidence(x).mean(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the map: (N, C, H, W) -> (N, C, H, W)."""
        scale = self.head_confidence(x)
        if self.scaling != "none":
            scale = scale / scale.mean(dim=(1, 2), keepdim=True)
        if self.scaling == "mean_zero":
            scale = scale - 1
        if self.gain is not None:
            scale = scale * self.gain
        return _rescale(x, scale, self.patch_size, self.shortcut)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, patch_size={self.patch_size}, shortcut={self.shortcut}, "
            f"second_relu={self.second_relu}, context={self.context}, agreement={self.agreement}, gate={self.gate}, "
            f"scaling={self.scaling}, heads={self.heads}, unit_start={self.unit_start}, "
            f"channel_term={self.channel_term}, identity_start={self.gain is not None}"
        )


def _make(channels: int, patch_size: int, *, device: Any = None, dtype: Any = None, **switches: Any) -> nn.Module:
    """The factory of ``attn_layer="conam_variant"``; ``attn_args`` are the switches of ``ConAMVariantConfig``."""
    form = ConAMVariantConfig.from_args(switches)
    return ConAMVariant(channels, patch_size, form, device=device, dtype=dtype)


register_attention("conam_variant", _make)
