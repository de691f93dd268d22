"""What an attention costs inside a net: a training step and an inference, as ratios to the plain twin."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from experiments.speed.baselines import ATTENTIONS, make_net, memory_format
from experiments.speed.record import Row, summarise
from experiments.speed.timing import time_in_turns

__all__ = ["NETS", "image_batch", "inference_call", "measure_nets", "training_step"]

NETS = ("resnet56_conam", "wide_resnet16_4_conam", "densenet40_12_conam")
PLAIN = "none"


def image_batch(batch_size: int, image_size: int, layout: str, device: torch.device) -> Tensor:
    """A batch of noise, always the same: float32, (N, 3, S, S)."""
    images = torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return images.to(device).to(memory_format=memory_format(layout))


def training_step(net: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """One training step on a batch: forward, cross-entropy, backward, SGD with Nesterov momentum.

    Args:
        net: The net, in training mode.
        images: (N, 3, H, W).
        precision: ``"bf16"`` (autocast) or ``"fp32"``.
    """
    labels = torch.arange(len(images), device=images.device) % 10
    optimizer = create_optimizer_v2(net, opt="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4)
    device = images.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def inference_call(net: nn.Module, images: Tensor, precision: str) -> Callable[[], Tensor]:
    """The logits of a batch, (N, classes), of a net in evaluation mode."""
    device = images.device.type

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits: Tensor = net(images)
            return logits

    return call


def measure_nets(
    *,
    models: Sequence[str],
    image_sizes: Sequence[int],
    layouts: Sequence[str],
    precisions: Sequence[str],
    batch_size: int,
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Time a training step and an inference of every net with every attention; ratios refer to the plain twin.

    Args:
        models: Builders of this package.
        image_sizes: 32, 224.
        layouts: ``"channels_last"``, ``"nchw"``.
        precisions: ``"fp32"``, ``"bf16"``.
        batch_size: Images of 32 x 32; at 224 x 224 an eighth of it.
        repeats: Rounds.
        device: Where to compute.
        progress: Told what is being measured.
    """
    for model in models:
        for image_size in image_sizes:
            count = batch_size if image_size == 32 else max(1, batch_size // 8)
            for layout in layouts:
                for precision in precisions:
                    progress(f"{model} on {count} images of {image_size} x {image_size}, {layout}, {precision}")
                    images = image_batch(count, image_size, layout, device)
                    nets = {}
                    for attention in (PLAIN, *ATTENTIONS):
                        torch.manual_seed(0)
                        net = make_net(model, attention, image_size).to(device)
                        nets[attention] = net.to(memory_format=memory_format(layout)).train()
                    steps = {name: training_step(net, images, precision) for name, net in nets.items()}
                    group = {
                        "part": "net",
                        "model": model,
                        "images": f"{count} x {image_size} x {image_size}",
                        "layout": layout,
                        "precision": precision,
                    }
                    times = time_in_turns(steps, repeats=repeats, device=device)
                    yield from _rows(times, group | {"pass": "training step"})
                    calls = {name: inference_call(net.eval(), images, precision) for name, net in nets.items()}
                    times = time_in_turns(calls, repeats=repeats, device=device)
                    yield from _rows(times, group | {"pass": "inference"})


def _rows(times: dict[str, list[float]], group: dict[str, str]) -> list[Row]:
    milliseconds = {name: [1000 * t for t in values] for name, values in times.items()}
    return summarise(milliseconds, group=group, reference=PLAIN, unit="ms")
