"""What an attention costs in memory: what autograd keeps for the backward pass, and the peak of a training step."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conam_zoo.benchmark.contenders import ATTENTIONS, make_net, memory_format
from conam_zoo.benchmark.cost_net import PLAIN, image_batch, training_step
from conam_zoo.benchmark.fresh_process import FreshProcesses
from conam_zoo.benchmark.memory import count_saved_bytes, peak_growth_bytes
from conam_zoo.benchmark.record import Row, summarise
from conam_zoo.benchmark.timing import benchmark_device

__all__ = ["measure_memory", "saved_bytes", "step_peak_bytes"]

# Each contender of the peak is a process of its own, so only those that the question is about.
PEAK_CONTENDERS = (PLAIN, "conam", "rearrange")
MIB = 2**20


def saved_bytes(net: nn.Module, images: Tensor, precision: str) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one step, without the parameters."""
    labels = torch.arange(len(images), device=images.device) % 10
    besides = [*net.parameters(), *net.buffers()]
    with count_saved_bytes(besides) as saved:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels)
    total = sum(saved.values())
    del loss  # the graph, and with it the storages, had to live until they were counted
    return total


def step_peak_bytes(
    model: str, attention: str, batch_size: int, image_size: int, layout: str, precision: str, threads: int
) -> int:
    """By how much the first two training steps of a net raise the peak of this process's (or the device's) memory."""
    torch.set_num_threads(threads)
    device = benchmark_device()
    torch.manual_seed(0)
    net = make_net(model, attention, image_size).to(device).to(memory_format=memory_format(layout)).train()
    step = training_step(net, image_batch(batch_size, image_size, layout, device), precision)

    def work() -> None:
        step()
        step()

    return peak_growth_bytes(work, device)


def measure_memory(
    *,
    models: Sequence[str],
    layouts: Sequence[str],
    precisions: Sequence[str],
    batch_size: int,
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Memory of a training step on 32 x 32 images; ratios refer to the plain twin.

    Args:
        models: Builders of this package.
        layouts: ``"channels_last"``, ``"nchw"``.
        precisions: ``"fp32"``, ``"bf16"``.
        batch_size: Images.
        repeats: Fresh processes for each contender's peak.
        device: Where to compute.
        progress: Told what is being measured.
    """
    with FreshProcesses(__name__) as processes:
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
                    saved = {}
                    for attention in (PLAIN, *ATTENTIONS):
                        progress(f"{model} with {attention}: kept for the backward pass")
                        net = make_net(model, attention).to(device).to(memory_format=memory_format(layout)).train()
                        saved[attention] = [saved_bytes(net, images, precision) / MIB]
                    kept = group | {"measured": "kept for backward"}
                    yield from summarise(saved, group=kept, reference=PLAIN, unit="MiB")
                    yield from _peaks(processes, group, batch_size, repeats, progress)


def _peaks(
    processes: FreshProcesses, group: dict[str, str], batch_size: int, repeats: int, progress: Callable[[str], None]
) -> list[Row]:
    """The peak of a training step, each contender in processes of its own."""
    peaks: dict[str, list[float]] = {attention: [] for attention in PEAK_CONTENDERS}
    shared = {key: group[key] for key in ("model", "layout", "precision")}
    for _ in range(repeats):
        for attention in PEAK_CONTENDERS:
            progress(f"{group['model']} with {attention}: peak in a fresh process")
            growth = processes.call(
                "step_peak_bytes",
                attention=attention,
                batch_size=batch_size,
                image_size=32,
                threads=torch.get_num_threads(),
                **shared,
            )
            peaks[attention].append(growth / MIB)
    return summarise(peaks, group=group | {"measured": "peak of a training step"}, reference=PLAIN, unit="MiB")
