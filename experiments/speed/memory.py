"""Counting bytes: taken from PyTorch's allocator, resident in a process at its peak, read and written by operators."""

import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocated", "TrafficCounter", "allocated_bytes", "peak_growth_bytes"]

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Allocated(NamedTuple):
    """Bytes of PyTorch's allocator, above those that were taken before."""

    peak: int
    left: int


def allocated_bytes(work: Callable[[], object], device: torch.device) -> Allocated:
    """What a piece of work takes from PyTorch's allocator: at its peak, and when it has returned.

    What libraries take for themselves does not count, such as the buffers that oneDNN packs weights into. The result
    of the work is alive until its bytes are counted, and with it the graph of a loss.
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
    """By how much a piece of work raises the peak of memory above what was in use before.

    On a CUDA device it is what PyTorch's allocator held for tensors. On a CPU it is the resident set of this process,
    which the allocator's caches blur: measure in a fresh process. Where Linux's /proc is missing, an earlier peak that
    was higher hides the work.
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
    """Counts the bytes that operators read and write, as if no cache kept anything between two operators.

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
