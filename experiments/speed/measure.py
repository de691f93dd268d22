"""Measuring: time in turns, memory allocated and moved, shares of operators, and the peak rates of a CUDA device."""

import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conam_zoo.errors import UserError


def benchmark_device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU always has."""
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
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    settle: int = 0,
    min_seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Time all calls once in every round, so that drift of the machine affects all alike.

    The order of each round is drawn (from a fixed seed), so that none always follows the same neighbour. ``warmup`` are
    untimed runs of each call before the first round, ``settle`` those before each measurement, so that it does not
    begin with the caches of the one before. A measurement repeats a call until it lasts about ``min_seconds``. For each
    name the result is the seconds of one call in each round, in the order of the rounds.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        synchronize(device)
        counts[name] = 1
        if min_seconds > 0:
            counts[name] = max(1, round(min_seconds / max(time_call(call, 1, device), 1e-7)))
    names = list(calls)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in order.sample(names, len(names)):
            for _ in range(settle):
                calls[name]()
            times[name].append(time_call(calls[name], counts[name], device))
    return times


def fresh_processes(module: str) -> ProcessPoolExecutor:
    """An executor whose every call gets a process of its own, so that nothing that ran before affects its memory.

    The processes are forked from one that has imported ``module`` and computed nothing. Needs ``os.fork``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1)


CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Allocated(NamedTuple):
    """Bytes of PyTorch's allocator, above those allocated before."""

    peak: int
    left: int


def allocated_bytes(work: Callable[[], object], device: torch.device) -> Allocated:
    """What a piece of work takes from PyTorch's allocator: at its peak, and when it has returned.

    Memory that libraries allocate for themselves is not counted, such as the buffers that oneDNN packs weights into.
    The result of the work, and with it the graph of a loss, is kept alive until its bytes are counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        peak, left = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return Allocated(peak - before, left - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    del result
    assert profiler.profiler is not None  # it is there once the block has ended
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    levels = list(accumulate((change for _, change in changes), initial=0))
    return Allocated(max(levels), levels[-1])


def peak_growth_bytes(work: Callable[[], object], device: torch.device) -> int:
    """By how much a piece of work raises peak memory above what was in use before.

    On a CUDA device this is what PyTorch's allocator held for tensors. On a CPU it is the resident set of this process,
    which the allocator's caches distort: measure in a fresh process. Where Linux's /proc is missing, an earlier, higher
    peak hides the work.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with suppress(OSError):
        CLEAR_REFS.write_text("5")  # the peak begins anew at what is resident now
    before = _peak_resident_bytes()
    work()
    return max(0, _peak_resident_bytes() - before)


def _peak_resident_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes that operators read and write, as if nothing stayed in a cache between two operators.

    Views cost nothing. ``bytes`` is the sum over all other operators of their tensor arguments and results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor):
                    self.bytes += leaf.numel() * leaf.element_size()
        return result


CALLS = 3


def operator_shares(
    work: Callable[[], object], groups: Mapping[str, tuple[str, ...]], device: torch.device
) -> dict[str, float]:
    """Percent of all ATen operators' own time that each group of operators takes.

    ``work`` is called ``CALLS`` times and profiled; call it once before, so that one-time work is not counted.
    ``groups`` are patterns of whole operator names, such as ``("add", "add_")`` or ``("*batch_norm*",)``; an operator
    counts in the first group that names it. A profile in which none takes any time is a ``RuntimeError``. The time is
    the CPU's, or that of a CUDA ``device``'s kernels.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(CALLS):
            work()
    spent = dict.fromkeys(groups, 0.0)
    total = 0.0
    for event in profiler.key_averages():
        library, _, operator = event.key.partition("::")
        if library != "aten":
            continue
        time = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        total += time
        matching = (group for group, patterns in groups.items() if any(fnmatchcase(operator, p) for p in patterns))
        if (group := next(matching, None)) is not None:
            spent[group] += time
    if total == 0:
        raise RuntimeError("The profiler saw no operator take any time.")
    return {group: 100 * time / total for group, time in spent.items()}


def device_roofline(device: torch.device, side: int = 8192, copy_bytes: int = 2**30) -> tuple[float, float]:
    """The device's bf16 rate in FLOP/s and its memory bandwidth in bytes/s, each the best of five measurements.

    The device is a CUDA one; ``side`` is that of the square matrices that are multiplied, ``copy_bytes`` the size of
    the buffer that is copied, of which bytes read and written both count.
    """
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        a @ b
        target.copy_(source)
    product = min(time_call(lambda: a @ b, 10, device) for _ in range(5))
    copy = min(time_call(lambda: target.copy_(source), 10, device) for _ in range(5))
    return 2 * side**3 / product, 2 * copy_bytes / copy


def check_choice(option: str, values: Sequence[object], choices: Sequence[object]) -> None:
    """Refuse values that are not among the choices of an option, and an empty choice."""
    listed = ", ".join(map(str, choices))
    if not values:
        raise UserError(f"The option {option} chooses nothing: give one of {listed}.")
    for value in values:
        if value not in choices:
            raise UserError(f"The option {option} is {value}, but it must be one of {listed}.")


def check_least(**options: tuple[int | None, int]) -> None:
    """Refuse options, ``name=(value, least)``, whose value is too small; None stands for a default."""
    for name, (number, least) in options.items():
        if number is not None and number < least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"The option {option} is {number}, but it must be at least {least}.")
