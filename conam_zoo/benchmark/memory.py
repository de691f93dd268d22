"""Counting bytes: kept for the backward pass, taken by a process at its peak, read and written by operators."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TrafficCounter", "count_saved_bytes", "peak_growth_bytes"]

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def count_saved_bytes(besides: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Count what autograd saves for the backward pass inside the ``with`` block.

    A storage that several operators save counts once, with all its bytes.

    Args:
        besides: Tensors that are there anyway, such as the parameters; their storages are not counted.

    Yields:
        Bytes by storage, filled while the block runs; ``sum(saved.values())`` is the total. It is right as long as
        the graph is alive.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


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
