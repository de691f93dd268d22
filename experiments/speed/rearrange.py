"""ConAM in the formulation of its public implementations, to compare with.

The map is rearranged into (N, P, C, p, p), which copies it; everything is computed on the patches; and the product is
rearranged back, which copies it again. The equations are those of ``layers.conam``; nothing is fused or clamped.
One thing is kinder than in the originals: under autocast the confidences, which softmax gives in float32, are brought
to the map's type, so that they do not turn the whole map into float32.
"""

import torch
from torch import Tensor, nn

from conam_zoo.layers.conam import ConAM

__all__ = ["RearrangeConAM", "with_rearrange"]


class RearrangeConAM(nn.Module):
    """ConAM by rearranging the map into patches. Its parameters have the names and shapes of ``ConAM``'s.

    Shape: (N, C, H, W) -> (N, C, H, W), for sides that the patch side divides.
    """

    def __init__(self, channels: int, patch_size: int, hidden_channels: int | None = None) -> None:
        """Args:
        channels: Number of channels C of the map.
        patch_size: Side p of the square patches, in pixels.
        hidden_channels: Width of the perceptron's hidden layer; C if None.
        """
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
