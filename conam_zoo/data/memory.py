"""How much memory is free for images."""

from pathlib import Path

import torch

__all__ = ["free_bytes"]

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
