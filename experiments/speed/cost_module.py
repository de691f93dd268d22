"""What an attention costs alone: forward, and forward with backward, on maps as they occur in the nets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from experiments.speed.baselines import ATTENTIONS, make_attention, memory_format
from experiments.speed.measure import time_in_turns
from experiments.speed.record import Row, time_rows

# (channels, side of the map, patch side) of maps that stages put out, cut into 4 x 4 patches: the three stages of the
# CIFAR ResNets on 32 x 32 images, and the first two of an ImageNet ResNet on 224 x 224 images. Its later maps, of side
# 14 and 7, cannot be cut into 4 x 4 equal patches, which the rearrange formulation needs. At the nets' own sites,
# before the first convolution, the map is still that of the stage before.
SITES = {32: ((16, 32, 8), (32, 16, 4), (64, 8, 2)), 224: ((64, 56, 14), (128, 28, 7))}
FORWARD, BOTH = "forward", "forward + backward"


def attention_calls(
    attention: nn.Module, x: Tensor, gradient: Tensor, precision: str
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """What is timed of one attention, by the name of the pass.

    ``"forward"`` gives the result, without a graph; ``"forward + backward"`` the gradients of the map and of every
    parameter. The attention is in training mode, the map ``x``, (N, C, H, W), has ``requires_grad``, and ``gradient``
    is that of the result, of the same shape. ``"bf16"`` runs under autocast, as in a training.
    """
    inputs = [x, *attention.parameters()]

    def cast() -> AbstractContextManager[object]:
        return torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def forward() -> Sequence[Tensor]:
        with torch.no_grad(), cast():
            return [attention(x)]

    def both() -> Sequence[Tensor]:
        with cast():
            y = attention(x)
        return torch.autograd.grad(y, inputs, gradient)

    return {FORWARD: forward, BOTH: both}


def _copy_calls(x: Tensor) -> dict[str, Callable[[], object]]:
    """The least that any attention does: read the map once and write it once, in the backward pass once more."""
    source, target = x.detach(), torch.empty_like(x)

    def twice() -> None:
        target.copy_(source)
        target.copy_(source)

    return {FORWARD: lambda: target.copy_(source), BOTH: twice}


def measure_modules(
    *,
    image_sizes: Sequence[int],
    layouts: Sequence[str],
    precisions: Sequence[str],
    batch_size: int,
    repeats: int,
    min_seconds: float,
    compile: bool,
    device: torch.device,
    sites: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Time every attention of ``ATTENTIONS`` and a plain copy of the map; ratios refer to ConAM.

    ``image_sizes`` are keys of ``SITES``, and ``sites`` says how many of the sites of each are measured, all if None.
    ``batch_size`` counts images of 32 x 32; at 224 x 224 it is an eighth, so that the maps are of similar size in all.
    A measurement lasts about ``min_seconds`` or longer. With ``compile``, ConAM under ``torch.compile`` is timed as
    well.
    """
    for image_size in image_sizes:
        count = batch_size if image_size == 32 else max(1, batch_size // 8)
        for channels, side, patch_size in SITES[image_size][:sites]:
            for layout in layouts:
                for precision in precisions:
                    progress(f"module on {channels} x {side} x {side}, {layout}, {precision}")
                    torch.manual_seed(0)
                    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                    shape, layout_format = (count, channels, side, side), memory_format(layout)
                    x, gradient = (torch.randn(shape).to(device, dtype, memory_format=layout_format) for _ in range(2))
                    x.requires_grad_()
                    modules = {n: make_attention(n, channels, patch_size).to(device) for n in ATTENTIONS}
                    calls = {n: attention_calls(m, x, gradient, precision) for n, m in modules.items()}
                    if compile:
                        torch.compiler.reset()
                        compiled: nn.Module = torch.compile(modules["conam"])  # type: ignore[assignment]
                        calls["conam compiled"] = attention_calls(compiled, x, gradient, precision)
                    for which in (FORWARD, BOTH):
                        timed: dict[str, Callable[[], object]] = {n: c[which] for n, c in calls.items()}
                        timed["copy"] = _copy_calls(x)[which]
                        times = time_in_turns(timed, repeats=repeats, device=device, min_seconds=min_seconds)
                        yield from time_rows(
                            times,
                            group={
                                "part": "module",
                                "map": f"{count} x {channels} x {side} x {side}",
                                "layout": layout,
                                "precision": precision,
                                "pass": which,
                            },
                            reference="conam",
                        )
