"""Timing of contenders side by side: warmed up, in turns, on a CPU or a CUDA device."""

import random
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["benchmark_device", "synchronize", "time_call", "time_in_turns"]


def benchmark_device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds for one of ``calls`` calls in a row; on a CUDA device by its own events, else by the wall clock."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) / 1000 / calls
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    settle: int = 0,
    min_seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Time all contenders once in every round, so that whatever drifts on the machine touches them alike.

    The order of each round is drawn (from a fixed seed), so that none always follows the same neighbour.

    Args:
        contenders: What to call, by name.
        repeats: Rounds, and so the number of times measured for each contender.
        device: Where they compute.
        warmup: Untimed calls of each contender before the first round.
        settle: Untimed calls before each measurement, so that it does not begin with the caches of the one before.
        min_seconds: A measurement repeats a call until it lasts about as long as this.

    Returns:
        For each contender the seconds of one call in each round, in the order of the rounds.
    """
    calls = {}
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        synchronize(device)
        calls[name] = 1
        if min_seconds > 0:
            calls[name] = max(1, round(min_seconds / max(time_call(call, 1, device), 1e-7)))
    names = list(contenders)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in order.sample(names, len(names)):
            for _ in range(settle):
                contenders[name]()
            times[name].append(time_call(contenders[name], calls[name], device))
    return times
