"""The two loops: one epoch of training, one pass of evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from conam_zoo.data import BatchAugmentation, ImageSplit, normalize

__all__ = ["EpochResult", "NonFiniteLossError", "Scores", "batches_of", "predict_logits", "score", "train_one_epoch"]

ECE_BINS = 15


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class EpochResult:
    """Means over the augmented training images of one epoch, measured while the weights changed."""

    loss: float
    top1_percent: float


@dataclass(frozen=True)
class Scores:
    """What is measured on a test split: accuracies in percent, NLL in nats, ECE in [0, 1] over 15 equal bins."""

    top1_percent: float
    top5_percent: float
    nll: float
    ece: float


def batches_of(order: Tensor, batch_size: int) -> list[Tensor]:
    """The indices (N,) in batches; a single image left over is no batch, because batch norm cannot train on it."""
    return [batch for batch in order.split(batch_size) if len(batch) > 1]


def train_one_epoch(
    model: nn.Module,
    split: ImageSplit,
    augmentation: BatchAugmentation,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    ema: ModelEmaV3 | None,
    *,
    epoch: int,
    batch_size: int,
    label_smoothing: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    bf16: bool,
    seed: int,
    on_step: Callable[[int], None],
) -> EpochResult:
    """One pass over the split in random order; the last, smaller batch counts too unless it is a single image.

    Order, augmentation and dropout are functions of ``seed`` and ``epoch`` alone, so that a resumed run draws what an
    uninterrupted one would have drawn.

    Raises:
        NonFiniteLossError: If a loss is not finite; the weights of that step are not updated.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    torch.manual_seed(seed * 100_003 + epoch)
    device = split.labels.device
    order = torch.randperm(len(split), generator=generator)
    batches = batches_of(order, batch_size)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    loss_sum, seen = 0.0, 0
    model.train()
    for step, indices in enumerate(batches):
        images = normalize(augmentation(indices, generator), mean, std)
        labels = split.labels[indices.to(device)]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            lr = optimizer.param_groups[0]["lr"]
            raise NonFiniteLossError(
                f"The loss is {loss_value} in epoch {epoch + 1}, step {step + 1} of {len(batches)}, at learning rate "
                f"{lr:.4g}: lower lr or lengthen warmup_epochs; the checkpoint of the epoch before is kept."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        updates = epoch * len(batches) + step + 1
        scheduler.step_update(updates)
        if ema is not None:
            ema.update(model, step=updates)
        loss_sum += loss_value * len(indices)
        hits += (logits.detach().argmax(1) == labels).sum()
        seen += len(indices)
        on_step(step + 1)
    return EpochResult(loss_sum / seen, 100 * hits.item() / seen)


@torch.inference_mode()
def predict_logits(
    model: nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], batch_size: int = 500
) -> Tensor:
    """float32 logits (N, classes) of uint8 images (N, H, W, 3), in evaluation mode, without augmentation."""
    model.eval()
    return torch.cat([model(normalize(batch, mean, std)).float() for batch in images.split(batch_size)])


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Accuracies, NLL and expected calibration error (15 equal bins of the top-1 probability; Guo et al., 2017)."""
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top5 == labels[:, None]
    confidence = logits.double().softmax(1).amax(1)
    correct = hits[:, 0].double()
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gap = torch.zeros(ECE_BINS, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, bins, confidence - correct)
    return Scores(
        top1_percent=100 * correct.mean().item(),
        top5_percent=100 * hits.any(1).double().mean().item(),
        nll=F.cross_entropy(logits.double(), labels).item(),
        ece=(gap.abs().sum() / len(labels)).item(),
    )
