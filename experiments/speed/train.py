"""Images per second of this package's training loop, beside a plain DataLoader loop and timm's loop."""

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conam_zoo.data import ImageSplit, read_split
from conam_zoo.errors import UserError
from conam_zoo.models.registry import check_model_name, count_params_and_macs
from conam_zoo.training.distributed import precision_on
from experiments.speed.baselines import make_net
from experiments.speed.cost_net import image_batch, training_step
from experiments.speed.loops import LOOPS, TEACHER_LOOPS, LoopSettings, Steps, noise_images
from experiments.speed.measure import (
    TrafficCounter,
    benchmark_device,
    check_least,
    device_roofline,
    fresh_processes,
    peak_growth_bytes,
    time_in_turns,
)
from experiments.speed.record import BenchmarkRecord, Row, make_record, time_rows

OURS = "conam_zoo"
CIFAR_IMAGES = 50_000
MIB = 2**20


def benchmark_train(
    model: str = "resnet20_conam",
    *,
    batch_size: int = 128,
    steps: int = 40,
    repeats: int = 5,
    workers: int = 2,
    data: str | Path | None = None,
    compile: bool = False,
    teacher: bool = False,
    quick: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkRecord:
    """Time the loops of ``experiments.speed.loops`` in turns, and measure the memory of each.

    One measurement is an epoch of ``steps`` batches, so no worker prepares images while another loop is timed. Memory
    is that of the first steps with 50,000 images (or those of ``data``), in a process of its own for each loop.
    ``workers`` are the processes of each data loader. ``data`` is CIFAR-10 or another set of 32 x 32 images (see
    ``conam_zoo.data.read_split``), with enough of them for a measurement; noise if None. ``compile`` is for our loop
    and timm's. With ``teacher``, our loop is also timed with a WideResNet-16-4 as its teacher: from a bank of logits,
    and online.
    """
    check_model_name(model)
    check_least(batch_size=(batch_size, 2), steps=(steps, 1), repeats=(repeats, 1), workers=(workers, 0))
    if quick:
        batch_size, steps, repeats, workers = 4, 2, 2, min(workers, 1)
    device = benchmark_device()
    settings = LoopSettings(model, batch_size, workers, compile, precision_on(device))
    split = _images(data, steps * batch_size)
    # The originals of all three loops let cuDNN choose its algorithms by trying them.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        calls: dict[str, Steps] = {}
        for name, loop in (LOOPS | TEACHER_LOOPS if teacher else LOOPS).items():
            progress(f"preparing {name}")
            calls[name] = loop(settings, split, device)
        progress(f"timing {', '.join(calls)}: {repeats} rounds of {steps} steps")
        epochs = {name: partial(call, None) for name, call in calls.items()}
        times = time_in_turns(epochs, repeats=repeats, device=device, warmup=1)
    del calls, epochs  # and with them the worker processes
    shares = _shares(model, batch_size, device) if device.type == "cuda" else None
    of_a_step = {name: [seconds / steps for seconds in values] for name, values in times.items()}
    rows = time_rows(of_a_step, group={"model": model, "batch": batch_size}, reference=OURS)
    images, few, threads = steps * batch_size if quick else CIFAR_IMAGES, 2 if quick else 5, torch.get_num_threads()
    with fresh_processes(__name__) as processes:
        for index, row in enumerate(rows):
            progress(f"memory of {row.name}")
            memory = processes.submit(loop_memory, row.name, settings, data, images, few, threads).result()
            rows[index] = replace(row, facts=_facts(row, batch_size, memory, shares))
    return make_record(
        "train",
        rows,
        settings={
            **asdict(settings),
            "steps": steps,
            "repeats": repeats,
            "teacher": teacher,
            "data": "noise" if data is None else "real",
            "device": device.type,
            "quick": quick,
        },
        command=command,
    )


def _images(data: str | Path | None, count: int) -> ImageSplit:
    """The first ``count`` training images, or noise. Fewer are refused, and any that are not of 32 x 32 pixels."""
    if data is None:
        return noise_images(count)
    split = read_split(data, "train", "cifar10")
    height, width = split.images.shape[1:3]
    if (height, width) != (32, 32):
        raise UserError(
            f"The images of {split.source} have {height} x {width} pixels, but the benchmark takes 32 x 32."
        )
    if len(split) < count:
        raise UserError(
            f"{split.source} has {len(split)} training images, but a measurement takes {count}: "
            "lower --steps or --batch-size."
        )
    return split.select(torch.arange(count))


def loop_memory(
    loop: str, settings: LoopSettings, data: str | Path | None, images: int, steps: int, threads: int
) -> dict[str, float | None]:
    """MiB by which building and starting a loop raises the peak, images included, and MiB of its workers' own."""
    torch.set_num_threads(threads)
    device = benchmark_device()
    kept: list[Steps] = []

    def work() -> None:
        split = noise_images(images) if data is None else read_split(data, "train", "cifar10")
        kept.append((LOOPS | TEACHER_LOOPS)[loop](settings, split, device))
        kept[0](steps)

    growth = peak_growth_bytes(work, device)
    return {"peak": growth / MIB, "workers": _workers_mib()}


def _workers_mib() -> float | None:
    """Memory that the worker processes of this one do not share with it; None where Linux's /proc is missing."""
    kilobytes = 0
    for worker in multiprocessing.active_children():
        rollup = Path(f"/proc/{worker.pid}/smaps_rollup")
        if not rollup.is_file():
            return None
        lines = rollup.read_text().splitlines()
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))
    return kilobytes / 1024


def _facts(
    row: Row, batch_size: int, memory: dict[str, float | None], shares: tuple[float, float] | None
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "images_per_second": 1000 * batch_size / row.median,
        "peak_mib": memory["peak"],
        "workers_mib": memory["workers"],
    }
    # The plain loop computes in float32, and the shares do not include an online teacher.
    if shares is not None and row.name not in ("plain DataLoader", "conam_zoo, online teacher"):
        seconds = row.median / 1000
        facts["bf16_peak_percent"] = 100 * shares[0] / seconds
        facts["bandwidth_percent"] = 100 * shares[1] / seconds
    return facts


def _shares(model: str, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Seconds that a bf16 step would take at the device's measured bf16 rate, and at its measured bandwidth.

    The rate counts the multiply-adds of convolutions and matrix products, three times those of the forward pass. The
    bandwidth counts what the operators of an eager step read and write; a compiled step moves less.
    """
    flops, bandwidth = device_roofline(device)
    net = make_net(model, "conam").to(device).to(memory_format=torch.channels_last).train()
    step = training_step(net, image_batch(batch_size, 32, "channels_last", device), "bf16")
    step()
    with TrafficCounter() as traffic:
        step()
    _, macs = count_params_and_macs(model)
    return 3 * 2 * macs * batch_size / flops, traffic.bytes / bandwidth
