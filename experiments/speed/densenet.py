"""A DenseNet's training step beside that of torchvision's of the same configuration: time, its parts, and memory."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet

from conam_zoo.errors import UserError
from conam_zoo.models.conam_densenet import ConAMDenseNet
from conam_zoo.training.distributed import precision_on
from experiments.speed.baselines import memory_format
from experiments.speed.cost_net import image_batch, kept_bytes, training_step
from experiments.speed.measure import (
    benchmark_device,
    check_least,
    fresh_processes,
    operator_shares,
    peak_growth_bytes,
    time_in_turns,
)
from experiments.speed.record import BenchmarkRecord, make_record, time_rows

# Depth and growth rate. torchvision has the form with bottlenecks and compression alone.
CONFIGURATIONS = {"densenetbc100_12_conam": (100, 12), "densenetbc190_40_conam": (190, 40)}
OURS, TORCHVISION, RECOMPUTING, PLAIN = "conam_zoo", "torchvision", "recomputing", "plain twin"
# For each net its layout, its precision (fp32 on devices without instructions for it), and whether it recomputes
# features in the backward pass.
COMPARED = {
    OURS: ("channels_last", "bf16", False),
    f"{OURS}, {RECOMPUTING}": ("channels_last", "bf16", True),
    f"{OURS}, {PLAIN}": ("channels_last", "bf16", False),
    TORCHVISION: ("channels_last", "bf16", False),
    f"{TORCHVISION}, {RECOMPUTING}": ("channels_last", "bf16", True),
    f"{TORCHVISION}, fp32, nchw": ("nchw", "fp32", False),
}
# Patterns of the operators whose shares of the time are stated.
OPERATORS = {
    "convolution_percent": ("*conv*",),
    "batch_norm_percent": ("*batch_norm*",),
    "sum_percent": ("add", "add_"),
    "concatenation_percent": ("cat",),
}
MIB = 2**20


def torchvision_densenet(depth: int, growth: int, recompute: bool = False) -> nn.Module:
    """torchvision's DenseNet-BC for 32 x 32 images: three blocks, a 3x3 stem without pooling, 10 classes.

    ``depth`` is 6n + 4 layers, ``growth`` the channels that each dense layer adds, ``recompute`` torchvision's
    ``memory_efficient``.
    """
    layers = (depth - 4) // 6
    net = DenseNet(growth, (layers,) * 3, 2 * growth, bn_size=4, num_classes=10, memory_efficient=recompute)
    parts = dict(net.features.named_children())
    for name in ("norm0", "relu0", "pool0"):
        del parts[name]
    parts["conv0"] = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    net.features = nn.Sequential(OrderedDict(parts))
    return net


def _step(name: str, depth: int, growth: int, batch_size: int) -> tuple[nn.Module, Tensor, str, Callable[[], None]]:
    """One of ``COMPARED``, its batch, the precision it computes in here, and one training step on it."""
    layout, precision, recompute = COMPARED[name]
    device = benchmark_device()
    torch.manual_seed(0)
    if name.startswith(TORCHVISION):
        net = torchvision_densenet(depth, growth, recompute)
    else:
        attention = "none" if name.endswith(PLAIN) else "conam"
        net = ConAMDenseNet(depth, growth, bottleneck=True, attn_layer=attention)
        net.set_grad_checkpointing(recompute)
    net = net.to(device).to(memory_format=memory_format(layout)).train()
    images = image_batch(batch_size, 32, layout, device)
    precision = precision_on(device, precision)
    return net, images, precision, training_step(net, images, precision)


def densenet_memory(name: str, depth: int, growth: int, batch_size: int, threads: int) -> dict[str, float]:
    """MiB that autograd keeps for the backward pass, and by which the first steps raise the peak of this process."""
    torch.set_num_threads(threads)
    net, images, precision, step = _step(name, depth, growth, batch_size)

    def work() -> None:
        step()
        step()

    peak = peak_growth_bytes(work, images.device)
    return {"kept_for_backward_mib": kept_bytes(net, images, precision) / MIB, "peak_mib": peak / MIB}


def benchmark_densenet(
    model: str = "densenetbc100_12_conam",
    *,
    batch_size: int = 32,
    repeats: int = 7,
    quick: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkRecord:
    """Time and profile a training step of all nets, and measure the memory of each in a process of its own.

    ``model`` is one of ``CONFIGURATIONS``, since torchvision has no others; a step has ``batch_size`` images of
    32 x 32. ``quick`` takes a smaller net.
    """
    if model not in CONFIGURATIONS:
        raise UserError(
            f"The option --model is {model}, but torchvision has nets only like {', '.join(CONFIGURATIONS)}."
        )
    check_least(batch_size=(batch_size, 2), repeats=(repeats, 1))
    depth, growth = CONFIGURATIONS[model]
    if quick:
        depth, growth, batch_size, repeats = 16, 4, 2, 1
    progress(f"training steps of {model} and its baselines, {batch_size} images, {repeats} rounds")
    device = benchmark_device()
    steps, precisions = {}, {}
    for name in COMPARED:
        _, _, precisions[name], steps[name] = _step(name, depth, growth, batch_size)
    times = time_in_turns(steps, repeats=repeats, device=device)
    progress("shares of the operators")
    shares = {name: operator_shares(step, OPERATORS, device) for name, step in steps.items()}
    del steps
    rows = time_rows(times, group={"model": model, "batch": batch_size}, reference=OURS)
    threads = torch.get_num_threads()
    with fresh_processes(__name__) as processes:
        for index, row in enumerate(rows):
            progress(f"memory of {row.name}")
            memory = processes.submit(densenet_memory, row.name, depth, growth, batch_size, threads).result()
            speed = {"images_per_second": 1000 * batch_size / row.median}
            facts = {"precision": precisions[row.name], **speed, **shares[row.name], **memory}
            rows[index] = replace(row, facts=facts)
    settings = {"model": model, "batch_size": batch_size, "repeats": repeats, "device": device.type, "quick": quick}
    return make_record("densenet", rows, settings=settings, command=command)
