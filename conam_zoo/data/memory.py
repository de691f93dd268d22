"""How much memory is free for images, and whether they fit."""

from pathlib import Path

import torch

__all__ = ["SHARE_OF_MEMORY", "fits", "free_bytes"]

SHARE_OF_MEMORY = 0.5  # of what is free: the rest is for the training

UNKNOWN = 4 * 2**30  # what is taken for free where the system does not tell


def free_bytes(device: torch.device | str) -> int:
    """Free memory of a device, in bytes; on the CPU without swapping, within the limit of a container."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [
        int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")
    ] or [UNKNOWN]
    group = Path("/sys/fs/cgroup")
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if limit and used and limit[0] != "max":
        free.append(max(0, int(limit[0]) - int(used[0])))
    return min(free)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def fits(count: int, size: int, device: torch.device | str, *, free: int | None = None) -> bool:
    """Whether uint8 images of ``size`` x ``size`` take at most half of a device's ``free`` bytes; None to ask it."""
    available = free_bytes(device) if free is None else free
    return 3 * count * size * size <= SHARE_OF_MEMORY * available
