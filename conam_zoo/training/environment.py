"""On what a training ran: hardware, library versions, state of the code."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conam_zoo.training.distributed import ranks

__all__ = ["describe_environment"]

LIBRARIES = ("torch", "torchvision", "timm", "safetensors", "numpy")


def describe_environment() -> dict[str, Any]:
    """``hardware`` (a sentence part), ``library_versions`` and ``code_commit`` (None outside a checkout).

    The hardware is that of all processes of the training, taken to be like this one's.
    """
    return {
        "hardware": _hardware(),
        "library_versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "code_commit": _commit(),
    }


def _hardware() -> str:
    processes = ranks().world_size
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name(0)}"
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    several = f"{processes} processes with " if processes > 1 else ""
    threads = torch.get_num_threads()
    return f"{several}{threads} CPU thread{'' if threads == 1 else 's'} ({cpu})"


def _commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
