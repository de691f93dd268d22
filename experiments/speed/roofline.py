"""What a CUDA device can do at best, measured on it: bf16 matrix products and copies in its memory."""

import torch

from experiments.speed.timing import time_call

__all__ = ["device_ceilings"]


def device_ceilings(device: torch.device, side: int = 8192, copy_bytes: int = 2**30) -> tuple[float, float]:
    """The device's bf16 rate in FLOP/s and its memory bandwidth in bytes/s, each the best of five measurements.

    Args:
        device: A CUDA device.
        side: Of the square matrices that are multiplied.
        copy_bytes: Size of the buffer that is copied; bytes read and written both count.
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
