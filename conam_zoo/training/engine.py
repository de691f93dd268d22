"""The two loops: one epoch of training, one pass of evaluation."""

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conam_zoo.data import Batches, normalize
from conam_zoo.training.checkpoint import Checkpointer, EpochSums
from conam_zoo.training.distributed import all_reduce_max, all_reduce_sum, ranks
from conam_zoo.training.train_state import TrainState
from conam_zoo.weights import Metrics

ECE_BINS = 15


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN."""


def train_one_epoch(
    state: TrainState,
    batches: Batches,
    *,
    epoch: int,
    first_step: int = 0,
    on_step: Callable[[int], None] | None = None,
    checkpointer: Checkpointer | None = None,
) -> EpochSums:
    """One pass over the batches, or the rest of one from ``first_step`` on; gives its sums over all ranks.

    A step is one update, of ``grad_accumulation`` batches. What it draws, dropout included, is a function of seed,
    epoch (from 0), step and rank alone, so that a resumed run draws what an uninterrupted one would have drawn.
    ``on_step`` gets the number of steps done, now and then. The checkpointer has the sums of the steps before, and
    saves or stops; what one rank asks for, all do. A loss that is not finite on any rank is a ``NonFiniteLossError`` on
    all, and nothing is saved after its step.
    """
    here = ranks()
    every = steps_between_checks(state.device)
    steps, accumulation = state.steps_per_epoch, state.recipe.grad_accumulation
    meter = EpochMeter(epoch, state, checkpointer.sums if checkpointer else EpochSums())
    state.train()
    stream = batches.epoch(epoch, first_step * accumulation)
    for step in range(first_step, steps):
        torch.manual_seed(step_seed(state.recipe.seed, epoch, step, here.rank))
        group = list(itertools.islice(stream, accumulation))
        # Only the last batches of an epoch can be smaller on one rank than on another.
        images = sum(len(targets) for _, targets, *_ in group)
        images_everywhere = images * here.world_size if step < steps - 1 else all_reduce_sum([images])[0]
        meter.add(step, *state.accumulate(group, images_everywhere / here.world_size), images)
        save, stop = checkpointer.requests() if checkpointer else (False, 0)
        look = (step + 1) % every == 0 or step == steps - 1 or (here.world_size == 1 and (save or stop > 0))
        if look:
            bad, save_now, stop = map(int, all_reduce_max([meter.first_bad(), save, stop]))
            if bad:
                raise meter.error(steps - bad)
        state.step(epoch * steps + step + 1)
        if look:
            if (save_now or stop) and checkpointer:
                checkpointer.save(step + 1, meter.sums())
                checkpointer.stop(stop)
            if on_step:
                on_step(step + 1)
    return meter.sums()


def steps_between_checks(device: torch.device) -> int:
    """How often the losses are looked at: always on a CPU, seldom where looking means to wait for the device."""
    return 1 if device.type == "cpu" else 20


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step; neighbouring arguments give unrelated ones."""
    return int(np.random.SeedSequence([seed % 2**64, epoch, step, rank]).generate_state(1, np.uint64)[0])


class EpochMeter:
    """Losses and right answers of the steps, fetched from the device only when somebody looks."""

    def __init__(self, epoch: int, state: TrainState, before: EpochSums) -> None:
        self.epoch, self.state = epoch, state
        own = EpochSums() if ranks().rank else before  # rank 0 carries what all had summed up
        self.loss, self.correct, self.seen = own.loss, own.correct, own.seen
        self.started = time.perf_counter() - before.seconds
        self.waiting: list[tuple[int, Tensor, Tensor, int, float]] = []
        self.bad: dict[int, tuple[float, float]] = {}

    def add(self, step: int, loss: Tensor, correct: Tensor, images: int) -> None:
        self.waiting.append((step, loss, correct, images, self.state.lr))

    def first_bad(self) -> int:
        """How many steps before the epoch's end the first loss was that is not finite; 0 if there is none."""
        losses = torch.stack([loss for _, loss, *_ in self.waiting]).tolist()
        correct = torch.stack([correct for _, _, correct, *_ in self.waiting]).tolist()
        for (step, _, _, images, lr), loss, right in zip(self.waiting, losses, correct, strict=True):
            if not math.isfinite(loss):
                self.bad[step] = (loss, lr)
            self.loss += loss
            self.correct += int(right)
            self.seen += images
        self.waiting.clear()
        return self.state.steps_per_epoch - min(self.bad) if self.bad else 0

    def error(self, step: int) -> NonFiniteLossError:
        loss, lr = self.bad.get(step, ("not finite on another process", self.state.lr))
        return NonFiniteLossError(
            f"The loss is {loss} in epoch {self.epoch + 1}, step {step + 1} of {self.state.steps_per_epoch}, at "
            f"learning rate {lr:.4g}: train anew in another folder with a lower lr or a longer warm-up."
        )

    def sums(self) -> EpochSums:
        """The sums over all ranks, those of the steps before included."""
        loss, correct, seen = all_reduce_sum([self.loss, self.correct, self.seen])
        return EpochSums(loss, int(correct), int(seen), time.perf_counter() - self.started)


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 500,
    *,
    sharded: bool = False,
) -> Tensor:
    """float32 logits (N, classes) of uint8 images (N, H, W, 3), in evaluation mode, without augmentation.

    A batch has at most as many pixels as ``batch_size`` images of 32 x 32. With ``sharded`` the ranks of the training,
    which have the same weights and all images, take turns at the batches of a single process, and all get its logits,
    to the last bit.
    """
    model.eval()
    rank, world_size = (ranks().rank, ranks().world_size) if sharded else (0, 1)
    parts: list[Tensor] = []
    batch_size = max(1, min(batch_size, batch_size * 32**2 // (images.shape[1] * images.shape[2])))
    for number, batch in enumerate(images.split(batch_size)):
        own = number % world_size == rank
        if own or not parts:  # every rank runs the first batch, for the number of classes
            logits = model(normalize(batch, mean, std)).float()
        parts.append(logits if own else logits.new_zeros(len(batch), logits.shape[1]))
    together = torch.cat(parts)
    if world_size > 1:
        dist.all_reduce(together)
    return together


def score(logits: Tensor, labels: Tensor) -> Metrics:
    """Accuracies, NLL and expected calibration error (15 equal bins of the top-1 probability; Guo et al., 2017)."""
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    in_top5 = top5 == labels[:, None]
    confidence = logits.double().softmax(1).amax(1)
    correct = in_top5[:, 0].double()
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gap = torch.zeros(ECE_BINS, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, bins, confidence - correct)
    return Metrics(
        top1_percent=100 * correct.mean().item(),
        top5_percent=100 * in_top5.any(1).double().mean().item(),
        nll=F.cross_entropy(logits.double(), labels).item(),
        ece=(gap.abs().sum() / len(labels)).item(),
    )
