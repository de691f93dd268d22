"""ConAM straight from its equations: explicit loops over images and patches, float64 NumPy, no deep-learning library.

Source: arXiv 2110.14369v1, section 3. Slow and obvious on purpose: it shares no code and no trick with the package.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["conam"]

Array = NDArray[np.float64]


def conam(x: Array, patch_size: int, w1: Array, b1: Array, w2: Array, b2: Array) -> tuple[Array, Array]:
    """The rescaled map and the confidence of every patch.

    Shape: (N, C, H, W) -> (N, C, H, W), (N, ceil(H/p), ceil(W/p)).

    Args:
        x: The map.
        patch_size: Side p of the patches; those at the right and lower edge hold what is left.
        w1: First weight of the perceptron, (h, C).
        b1: First bias, (h,).
        w2: Second weight, (C, h).
        b2: Second bias, (C,).
    """
    images, _, height, width = x.shape
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    output = np.empty_like(x)
    confidence = np.empty((images, rows, columns))
    for n in range(images):
        global_embedding = _embed(_mean(x[n]), w1, b1, w2, b2)
        logits = np.empty((rows, columns))
        for row in range(rows):
            for column in range(columns):
                local_context = _mean(_patch(x[n], row, column, patch_size))
                logits[row, column] = sum(_embed(local_context, w1, b1, w2, b2) * global_embedding)
        exponentials = np.exp(logits - logits.max())
        confidence[n] = exponentials / exponentials.sum()
        for row in range(rows):
            for column in range(columns):
                patch = _patch(x[n], row, column, patch_size)
                _patch(output[n], row, column, patch_size)[...] = patch + patch * confidence[n, row, column]
    return output, confidence


def _patch(image: Array, row: int, column: int, side: int) -> Array:
    """The pixels of one patch, (C, <= p, <= p), as a view."""
    return image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]


def _mean(pixels: Array) -> Array:
    """Mean of every channel over all pixels: (C, h, w) -> (C,)."""
    channels, height, width = pixels.shape
    return np.array([sum(pixels[c].ravel()) / (height * width) for c in range(channels)])


def _embed(context: Array, w1: Array, b1: Array, w2: Array, b2: Array) -> Array:
    """The shared perceptron: Linear, ReLU, Linear, ReLU. Shape: (C,) -> (C,)."""
    hidden = np.maximum(w1 @ context + b1, 0.0)
    return np.maximum(w2 @ hidden + b2, 0.0)
