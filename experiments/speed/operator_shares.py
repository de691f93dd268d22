"""Which operators the time of some work goes into, from PyTorch's profiler."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["operator_shares"]

CALLS = 3


def operator_shares(
    work: Callable[[], object], groups: Mapping[str, tuple[str, ...]], device: torch.device
) -> dict[str, float]:
    """Percent of the operators' own time that each group of operators takes; what no group names is left out.

    Args:
        work: What is called ``CALLS`` times and profiled; call it before, so that nothing counts that happens once.
        groups: Patterns of whole operator names, such as ``("add", "add_")`` or ``("*batch_norm*",)``. An operator
            counts in the first group that names it.
        device: Where the time passes: a CPU's own time of each operator, or that of a CUDA device's kernels.

    Raises:
        RuntimeError: If the profiler saw no operator take any time.
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
        hits = (group for group, patterns in groups.items() if any(fnmatchcase(operator, p) for p in patterns))
        if (group := next(hits, None)) is not None:
            spent[group] += time
    if total == 0:
        raise RuntimeError("The profiler saw no operator take any time.")
    return {group: 100 * time / total for group, time in spent.items()}
