"""The processes of one training, what they compute on, and the few things that they exchange.

A training of one process has world size 1, and its exchanges do nothing. ``torchrun`` starts several, which are
connected by NCCL on GPUs and by gloo on CPUs.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from conam_zoo.errors import UserError
from conam_zoo.layers._torch_private import has_bf16_convolutions
from conam_zoo.weights.errors import in_brief

TIMEOUT = timedelta(minutes=5)  # of one exchange; no rank does anything that takes longer between two of them
LOST_PEER = re.compile(r"gloo|nccl|connection|socket|timed out|broken pipe|peer", re.IGNORECASE)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all of a training, and what it trains on."""

    rank: int  # from 0; rank 0 writes
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def ranks() -> Ranks:
    """The place of this process: alone, unless it is inside ``process_group``."""
    if not dist.is_initialized():
        return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    local = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local)


def precision_on(device: torch.device, wanted: str = "bf16") -> str:
    """What a recipe's ``precision``, ``"bf16"`` or ``"fp32"``, comes to on a device.

    Without instructions for bfloat16 PyTorch's convolutions take several times as long as in float32: it is ``"fp32"``.
    """
    return "bf16" if wanted == "bf16" and has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool | None:
    """Whether a device has instructions for bfloat16; None if PyTorch does not say."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bf16_convolutions()


def why_fp32(device: torch.device) -> str:
    """Why ``precision_on`` is ``"fp32"`` on a device where bfloat16 was wanted, as a clause."""
    if has_bf16(device) is None:
        return "PyTorch does not say whether this CPU has bfloat16 instructions, so float32 is used"
    return f"this {device.type} has no instructions for it"


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, for as long as the block lasts; inside another block do nothing.

    It is a ``UserError`` if the others cannot be reached, or one of them goes away during the block.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ranks()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local + 1} of this machine, which has {torch.cuda.device_count()} GPUs: "
                "set --nproc_per_node to the number of GPUs."
            )
        torch.cuda.set_device(local)
    here = f"Process {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']}"
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{here} does not reach the others ({in_brief(error)}): start it with torchrun.") from error
    try:
        yield ranks()
        dist.barrier()  # rank 0 has written everything before any process ends
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise UserError(
            f"{here} lost another one ({in_brief(error)}), so the training ends: start all of them again with --resume."
        ) from error
    finally:
        dist.destroy_process_group()


def is_lost_peer(error: object) -> bool:
    """Whether an exchange failed because another process is gone."""
    if not (isinstance(error, RuntimeError) and ranks().world_size > 1):
        return False
    return isinstance(error, dist.DistError) or LOST_PEER.search(str(error)) is not None


def all_reduce_max(values: list[float]) -> list[float]:
    """The largest of each value over the ranks; exact for whole numbers up to 2**53."""
    return _reduced(values, dist.ReduceOp.MAX)


def all_reduce_sum(values: list[float]) -> list[float]:
    """The sum of each value over the ranks."""
    return _reduced(values, dist.ReduceOp.SUM)


def _reduced(values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    here = ranks()
    if here.world_size == 1:
        return values
    exchanged = torch.tensor(values, dtype=torch.float64, device=here.device)
    dist.all_reduce(exchanged, operation)
    return exchanged.tolist()


def run_on_primary(function: Callable[[], Result]) -> Result:
    """Run a function on rank 0, and give its result, which must be picklable, or its ``UserError`` to all."""
    here = ranks()
    if here.world_size == 1:
        return function()
    outcome: list[tuple[Result | None, str | None]] = [(None, None)]
    if here.first:
        try:
            outcome = [(function(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    dist.broadcast_object_list(outcome, src=0, device=here.device)
    result, sentence = outcome[0]
    if sentence is not None:
        raise UserError(sentence)
    return result  # type: ignore[return-value]


@torch.no_grad()
def broadcast_weights(model: nn.Module) -> None:
    """Give every rank the parameters and buffers that rank 0 has."""
    if ranks().world_size > 1:
        for tensor in model.state_dict().values():
            sent = tensor.contiguous()  # channels_last weights are not, and gloo wants them so
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)
