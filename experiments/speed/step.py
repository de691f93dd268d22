"""Where the time of a training step goes, and how much fewer passes over the maps save."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.models.conam_resnet import BasicBlock
from conam_zoo.models.registry import check_model_name
from conam_zoo.training.distributed import precision_on
from experiments.speed.baselines import make_net
from experiments.speed.cost_net import image_batch, training_step
from experiments.speed.measure import benchmark_device, check_least, operator_shares, time_in_turns
from experiments.speed.record import BenchmarkRecord, make_record, time_rows

EAGER, IN_PLACE = "eager", "eager, joined in place"
# Options of torch.compile; None where the step is not compiled.
VARIANTS: dict[str, dict[str, Any] | None] = {
    EAGER: None,
    IN_PLACE: None,
    "compiled": {},
    "compiled, aggressive fusion": {"aggressive_fusion": True, "max_fusion_size": 256},
    "compiled, max autotune": {"max_autotune": True},
    "compiled, unsafe math": {"cpp.enable_unsafe_math_opt_flag": True},
}
# Patterns of the operators whose shares of the time are stated.
OPERATORS = {
    "convolution_percent": ("*conv*",),
    "batch_norm_percent": ("*batch_norm*",),
    "relu_percent": ("relu*", "clamp_min*", "threshold_backward"),
    "sum_percent": ("add", "add_"),
}


def _joined_in_place(block: BasicBlock, x: Tensor) -> Tensor:
    """``BasicBlock.forward``, which adds the shortcut to the residual in place."""
    residual = block.act1(block.bn1(block.first_conv(x)))
    residual = block.bn2(block.conv2(residual))
    residual += block.downsample(x)
    joined: Tensor = block.act2(residual)
    return joined


def step_net(model: str, variant: str, device: torch.device) -> nn.Module:
    """The net of one of ``VARIANTS`` in training mode, with the same weights for all."""
    torch.manual_seed(0)
    net = make_net(model, "conam").to(device).to(memory_format=torch.channels_last).train()
    if variant == IN_PLACE:
        for block in net.modules():
            if isinstance(block, BasicBlock):
                block.forward = MethodType(_joined_in_place, block)  # type: ignore[method-assign]
    options = VARIANTS[variant]
    return net if options is None else torch.compile(net, options=options)  # type: ignore[return-value]


def benchmark_step(
    model: str = "resnet20_conam",
    *,
    batch_size: int = 128,
    repeats: int = 15,
    quick: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkRecord:
    """Time a training step of a ResNet as it is, joined in place, and compiled in several ways.

    ``model`` has to be a ResNet of basic blocks, since those are what is joined in place; a step has ``batch_size``
    images of 32 x 32. ``quick`` leaves out the compiled variants.
    """
    check_least(batch_size=(batch_size, 2), repeats=(repeats, 1))
    check_model_name(model)
    device = benchmark_device()
    if not any(isinstance(block, BasicBlock) for block in make_net(model, "conam").modules()):
        raise UserError(
            f"The option --model is {model}, which has no basic blocks: take a ResNet such as resnet20_conam."
        )
    names = list(VARIANTS)
    if quick:
        batch_size, repeats, names = 2, 1, names[:2]
    precision = precision_on(device)
    images = image_batch(batch_size, 32, "channels_last", device)
    steps, prepared = {}, {}
    for name in names:
        progress(f"preparing {name}")
        started = time.perf_counter()
        steps[name] = training_step(step_net(model, name, device), images, precision)
        steps[name]()
        prepared[name] = time.perf_counter() - started if VARIANTS[name] is not None else None
    progress(f"training steps of {model}, {batch_size} images, {repeats} rounds")
    times = time_in_turns(steps, repeats=repeats, device=device, settle=1)
    shares = {name: operator_shares(steps[name], OPERATORS, device) for name in names if VARIANTS[name] is None}
    rows = [
        replace(
            row,
            facts={
                "precision": precision,
                "images_per_second": 1000 * batch_size / row.median,
                "seconds_to_prepare": prepared[row.name],
                **shares.get(row.name, dict.fromkeys(OPERATORS)),
            },
        )
        for row in time_rows(times, group={"model": model, "batch": batch_size}, reference=EAGER)
    ]
    settings = {"model": model, "batch_size": batch_size, "repeats": repeats, "device": device.type, "quick": quick}
    return make_record("step", rows, settings=settings, command=command)
