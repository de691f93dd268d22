"""The attentions that ConAM is compared with, alone and inside the nets."""

import timm
import torch
from torch import Tensor, nn

from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.registry import BUILT_IN, attention_names, create_attention


class RearrangeConAM(nn.Module):
    """ConAM in the formulation of its public implementations. Its parameters have the names and shapes of ``ConAM``'s.

    The map is rearranged into (N, P, C, p, p), which copies it, and the product is rearranged back, which copies it
    again. The equations are those of ``conam_zoo.layers.conam``; nothing is fused or clamped. It is kinder than the
    originals in one thing: under autocast the confidences, which softmax gives in float32, are brought to the map's
    type, so that they do not turn the whole map into float32.

    Shape: (N, C, H, W) -> (N, C, H, W), for sides that the patch side divides. ``patch_size`` is the side p of the
    square patches in pixels, ``hidden_channels`` the width of the perceptron's hidden layer, C if None.
    """

    def __init__(self, channels: int, patch_size: int, hidden_channels: int | None = None) -> None:
        super().__init__()
        hidden_channels = channels if hidden_channels is None else hidden_channels
        self.patch_size = patch_size
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def embed(self, contexts: Tensor) -> Tensor:
        """The shared perceptron: (N, P, C) -> (N, P, C)."""
        return torch.relu(self.fc2(torch.relu(self.fc1(contexts))))

    def forward(self, x: Tensor) -> Tensor:
        """Rescale the map: (N, C, H, W) -> (N, C, H, W)."""
        n, channels, height, width = x.shape
        side = self.patch_size
        rows, columns = height // side, width // side
        patches = x.reshape(n, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, rows * columns, channels, side, side)  # copies the map
        local = self.embed(patches.mean(dim=(3, 4)))  # (N, P, C)
        whole = self.embed(x.mean(dim=(2, 3)).unsqueeze(1))  # (N, 1, C)
        confidence = torch.softmax(local @ whole.transpose(1, 2), dim=1)  # (N, P, 1)
        scaled = patches * confidence.to(x.dtype)[..., None, None]
        scaled = scaled.reshape(n, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
        return x + scaled.reshape(n, channels, height, width)  # copies it again


def with_rearrange(model: nn.Module) -> nn.Module:
    """Replace every ``ConAM`` in a model, in place, by this formulation with the same weights; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ConAM):
            weight = module.fc1.weight
            other = RearrangeConAM(module.channels, module.patch_size, module.hidden_channels)
            other = other.to(device=weight.device, dtype=weight.dtype).train(module.training)
            other.load_state_dict(module.state_dict())
            model.set_submodule(name, other)
    return model


# The rearrange-based formulation stands beside ConAM; "none" is the plain twin.
ATTENTIONS = ("conam", "rearrange", *(name for name in BUILT_IN if name not in ("none", "conam")))
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def attention_layers() -> tuple[str, ...]:
    """What can be compared: the plain net and every registered attention but the forms, which ``ablation`` compares."""
    return tuple(name for name in attention_names() if name != "conam_variant")


def memory_format(layout: str) -> torch.memory_format:
    """PyTorch's memory format for ``"channels_last"`` or ``"nchw"``."""
    return LAYOUTS[layout]


def make_attention(name: str, channels: int, patch_size: int) -> nn.Module:
    """One attention of ``ATTENTIONS`` for maps of ``channels`` channels; ``patch_size`` is for ConAM alone.

    It is the layer that the nets hold at such a site.
    """
    if name == "rearrange":
        return RearrangeConAM(channels, patch_size)
    return create_attention(name, channels, patch_size)


def make_net(model: str, attention: str, image_size: int = 32) -> nn.Module:
    """A net of this package with ``"none"`` or one of ``ATTENTIONS`` at its sites.

    The patch sides grow with the images, so that the number of patches stays that of 32 x 32 images.
    """
    sides = timm.create_model(model, device="meta").patch_sizes
    scaled = tuple(side * image_size // 32 for side in sides)
    layer = "conam" if attention == "rearrange" else attention
    net: nn.Module = timm.create_model(model, attn_layer=layer, patch_sizes=scaled)
    return with_rearrange(net) if attention == "rearrange" else net
