"""Which images an epoch shows, in which order, and which of them are a device's own."""

import numpy as np
import torch
from torch import Tensor

from conam_zoo.data.transforms import ORDER, random_stream
from conam_zoo.errors import UserError

__all__ = ["Shards", "epoch_order"]


def epoch_order(labels: np.ndarray, seed: int, epoch: int, *, balance: bool = False) -> Tensor:
    """The indices (N,) of an epoch, a function of the arguments alone.

    Args:
        labels: Label of every image, (N,).
        seed: Seed of the training.
        epoch: Which epoch, from 0.
        balance: Show every class equally often instead of every image once: an epoch still has N images, and within a
            class every image comes up as often as any other, give or take one.
    """
    stream = random_stream(ORDER, seed, epoch)
    if not balance:
        return torch.from_numpy(stream.permutation(len(labels)))
    classes = stream.permutation(np.unique(labels))  # shuffled: who gets the remainder is chance
    quota, remainder = divmod(len(labels), len(classes))
    chosen = []
    for rank, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        count = quota + (rank < remainder)
        rounds = [stream.permutation(members) for _ in range(-(-count // len(members)))]
        chosen.append(np.concatenate(rounds)[:count] if rounds else members[:0])
    return torch.from_numpy(stream.permutation(np.concatenate(chosen)))


class Shards:
    """Cuts the order of an epoch into the batches of one device (rank) out of several.

    The order is cut into global batches, and each rank takes its own run of each, so that all ranks make the same
    number of steps. The last, smaller global batch is shared out as evenly as it goes; it is left out if a rank would
    get fewer than two images of it, because batch norm cannot train on a single one.

    Raises:
        UserError: If the images are too few for a single step.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 2:
            raise UserError(f"The batch size on each device is {batch_size}, but batch norm needs 2 images or more.")
        self.whole = batch_size * world_size
        full, rest = divmod(count, self.whole)
        if rest < 2 * world_size:
            rest = 0
        self.steps = full + (rest > 0)
        self.num_images = full * self.whole + rest
        self.rank, self.world_size = rank, world_size
        if self.steps == 0:
            raise UserError(
                f"There are {count} training images, but {world_size} device(s) need {2 * world_size} for one step: "
                "add images."
            )

    def part(self, step: int) -> slice:
        """Which positions of the epoch's order are this rank's batch at a step."""
        start = step * self.whole
        size = min(self.whole, self.num_images - start)
        first = start + size * self.rank // self.world_size
        return slice(first, start + size * (self.rank + 1) // self.world_size)
