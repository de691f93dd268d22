"""On what a training runs: in which precision it computes there; hardware, library versions, state of the code."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conam_zoo.layers._torch_private import has_bf16_convolutions
from conam_zoo.training.distributed import ranks

__all__ = ["describe_environment", "precision_on"]

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


def precision_on(device: torch.device, wanted: str = "bf16") -> str:
    """What a recipe's ``precision``, ``"bf16"`` or ``"fp32"``, comes to on a device.

    Without instructions for bfloat16 a processor takes every number apart, and PyTorch's convolutions take several
    times as long as in float32: there it is ``"fp32"`` in any case.
    """
    return "bf16" if wanted == "bf16" and has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bf16_convolutions()
