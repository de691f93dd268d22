"""In what precision a training computes: bfloat16 where the device multiplies in it, else float32."""

import torch

__all__ = ["precision_on"]


def precision_on(device: torch.device, wanted: str = "bf16") -> str:
    """What a recipe's ``precision`` comes to on a device.

    bfloat16 is worth having for its speed. A processor without instructions for it has to take every number apart, and
    PyTorch's convolutions then take several times as long as in float32.

    Args:
        device: Where the net is trained.
        wanted: ``"bf16"`` or ``"fp32"``.

    Returns:
        ``"bf16"`` if that is wanted and the device has instructions for it, else ``"fp32"``.
    """
    return "bf16" if wanted == "bf16" and _multiplies_in_bf16(device) else "fp32"


def _multiplies_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What PyTorch itself asks before it hands a bfloat16 convolution to oneDNN; there is no public question.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())
