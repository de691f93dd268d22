"""What an attention costs in memory: what a forward pass leaves for the backward pass, and the peak of a step."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.baselines import ATTENTIONS, make_net, memory_format
from experiments.speed.cost_net import PLAIN, image_batch, training_step
from experiments.speed.memory import allocated_bytes
from experiments.speed.record import Row, summarise

__all__ = ["kept_bytes", "measure_memory", "step_peak_bytes"]

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
    """Memory of a training step on 32 x 32 images; ratios refer to the plain twin.

    Args:
        models: Builders of this package.
        layouts: ``"channels_last"``, ``"nchw"``.
        precisions: ``"fp32"``, ``"bf16"``.
        batch_size: Images.
        device: Where to compute.
        progress: Told what is being measured.
    """
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
