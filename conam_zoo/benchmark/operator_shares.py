"""Which operators the time of some work goes into, from PyTorch's profiler."""

from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["operator_shares"]


def operator_shares(
    work: Callable[[], object], groups: Mapping[str, tuple[str, ...]], device: torch.device
) -> dict[str, float]:
    """Percent of the operators' own time that each group of operators takes; what no group names is left out.

    Args:
        work: What is profiled; call it before, so that nothing is measured that happens only once.
        groups: Parts of operator names, as ``("batch_norm",)``. An operator counts in the first group that names it.
        device: Where the time passes: a CPU's own time of each operator, or that of a CUDA device's kernels.

    Raises:
        RuntimeError: If the profiler saw no operator take any time.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        work()
    spent = dict.fromkeys(groups, 0.0)
    total = 0.0
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue
        time = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        total += time
        for group, parts in groups.items():
            if any(part in event.key for part in parts):
                spent[group] += time
                break
    if total == 0:
        raise RuntimeError("The profiler saw no operator take any time.")
    return {group: 100 * time / total for group, time in spent.items()}
