"""The forms of ConAM straight from their equations: explicit loops in float64 NumPy, no deep-learning library.

The equations stand in the docstring of ``experiments.accuracy.forms``. Slow and obvious on purpose.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from oracles.conam_oracle import _mean, _patch

__all__ = ["conam_variant"]

Array = NDArray[np.float64]


def conam_variant(
    x: Array,
    patch_size: int,
    w1: Array,
    b1: Array,
    w2: Array,
    b2: Array,
    form: dict[str, Any],
    temperature: Array,
    gain: Array,
) -> Array:
    """The rescaled map: (N, C, H, W) -> (N, C, H, W).

    Args:
        x: The map.
        patch_size: Side of the patches.
        w1: First weight of the perceptron, (h, C).
        b1: First bias, (h,).
        w2: Second weight, (C, h).
        b2: Second bias, (C,).
        form: Every switch by name.
        temperature: t of each head.
        gain: s of each gate, for ``identity_start``.
    """
    images, channels, height, width = x.shape
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    output = np.empty_like(x)
    heads = form["heads"] or channels
    group = channels // heads
    gates = channels if form["channel_term"] else heads
    for n in range(images):
        for gate in range(gates):
            head = gate * heads // gates
            mine = slice(head * group, (head + 1) * group)
            rescaled = slice(gate, gate + 1) if form["channel_term"] else mine
            logits = np.empty((rows, columns))
            for row in range(rows):
                for column in range(columns):
                    local = _embed(_mean(_patch(x[n], row, column, patch_size)), w1, b1, w2, b2, form)[mine]
                    whole = _embed(_mean(x[n]), w1, b1, w2, b2, form)[mine]
                    if form["context"] == "local":
                        whole = np.ones(group)
                    if form["context"] == "global":
                        local = np.ones(group)
                    agreement = sum(local * whole)
                    if form["agreement"] == "scaled_dot":
                        agreement *= temperature[head] / group**0.5
                    if form["agreement"] == "cosine":
                        lengths = (sum(local**2) * sum(whole**2)) ** 0.5
                        agreement = temperature[head] * agreement / lengths if lengths > 0 else 0.0
                    logits[row, column] = agreement
            if form["channel_term"]:
                logits = _embed(_mean(x[n]), w1, b1, w2, b2, form)[gate] + logits - logits.mean()
            if form["gate"] == "softmax":
                eta = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            elif form["gate"] == "sigmoid":
                eta = 1 / (1 + np.exp(-logits))
            elif form["gate"] == "tanh":
                eta = np.tanh(logits - logits.mean())
            else:
                eta = np.tanh(logits)
            scale = {"none": eta, "mean_one": eta / eta.mean(), "mean_zero": eta / eta.mean() - 1}[form["scaling"]]
            if form["identity_start"]:
                scale = gain[gate] * scale
            factor = 1 + scale if form["shortcut"] else scale
            for row in range(rows):
                for column in range(columns):
                    patch = _patch(x[n], row, column, patch_size)[rescaled]
                    _patch(output[n], row, column, patch_size)[rescaled] = patch * factor[row, column]
    return output


def _embed(context: Array, w1: Array, b1: Array, w2: Array, b2: Array, form: dict[str, Any]) -> Array:
    """The shared perceptron: (C,) -> (C,)."""
    embedded = w2 @ np.maximum(w1 @ context + b1, 0.0) + b2
    return np.maximum(embedded, 0.0) if form["second_relu"] else embedded
