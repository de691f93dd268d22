"""What an attention costs inside a net: a training step and an inference in time, and a step in memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from experiments.speed.baselines import ATTENTIONS, make_net, memory_format
from experiments.speed.measure import allocated_bytes, time_in_turns
from experiments.speed.record import Row, summarise, time_rows

NETS = ("resnet56_conam", "wide_resnet16_4_conam", "densenet40_12_conam")
PLAIN = "none"


def image_batch(batch_size: int, image_size: int, layout: str, device: torch.device) -> Tensor:
    """A batch of noise, always the same: float32, (N, 3, S, S)."""
    images = torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return images.to(device).to(memory_format=memory_format(layout))


def training_step(net: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """One training step on a batch: forward, cross-entropy, backward, SGD with Nesterov momentum.

    The net is in training mode, and ``images`` are (N, 3, H, W). ``"bf16"`` is autocast.
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

    ``models`` are builders of this package. ``batch_size`` counts images of 32 x 32; at 224 x 224 it is an eighth.
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
                    yield from time_rows(times, group=group | {"pass": "training step"}, reference=PLAIN)
                    calls = {name: inference_call(net.eval(), images, precision) for name, net in nets.items()}
                    times = time_in_turns(calls, repeats=repeats, device=device)
                    yield from time_rows(times, group=group | {"pass": "inference"}, reference=PLAIN)


MIB = 2**20


def kept_bytes(net: nn.Module, images: Tensor, precision: str) -> int:
    """Bytes that a forward pass with its loss leaves for the backward pass, without images and parameters."""
    labels = torch.arange(len(images), device=images.device) % 10

    def forward() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(images)
        return F.cross_entropy(logits.float(), labels)

    forward()  # what is made once, such as the buffers of a library, does not count
    return allocated_bytes(forward, images.device).left


def step_peak_bytes(net: nn.Module, images: Tensor, precision: str) -> int:
    """Bytes that the first two training steps take at their peak, with the optimiser's state."""
    step = training_step(net, images, precision)

    def work() -> None:
        step()
        step()

    return allocated_bytes(work, images.device).peak


def measure_memory(
    *,
    models: Sequence[str],
    layouts: Sequence[str],
    precisions: Sequence[str],
    batch_size: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Memory of a training step on 32 x 32 images; ratios refer to the plain twin."""
    for model in models:
        for layout in layouts:
            for precision in precisions:
                group = {
                    "part": "memory",
                    "model": model,
                    "images": f"{batch_size} x 32 x 32",
                    "layout": layout,
                    "precision": precision,
                }
                images = image_batch(batch_size, 32, layout, device)
                kept, peaks = {}, {}
                for attention in (PLAIN, *ATTENTIONS):
                    progress(f"{model} with {attention}")
                    torch.manual_seed(0)
                    net = make_net(model, attention).to(device).to(memory_format=memory_format(layout)).train()
                    kept[attention] = [kept_bytes(net, images, precision) / MIB]
                    peaks[attention] = [step_peak_bytes(net, images, precision) / MIB]
                for measured, bytes_of in (("kept for backward", kept), ("peak of a training step", peaks)):
                    yield from summarise(bytes_of, group=group | {"measured": measured}, reference=PLAIN, unit="MiB")
