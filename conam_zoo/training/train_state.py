"""What a step of training changes, and how: net, loss, optimiser, schedule, moving average."""

import difflib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conam_zoo.data import AugmentationSettings, BatchSettings
from conam_zoo.errors import UserError, is_out_of_memory
from conam_zoo.layers._torch_private import copy_all, lerp_all
from conam_zoo.training.distillation import decoupled_loss, distillation_loss
from conam_zoo.training.distributed import Ranks, precision_on, ranks
from conam_zoo.training.recipe import Recipe
from conam_zoo.weights.errors import in_brief

MOMENTA = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of a weight's shape; others may be factors or scalars


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimiser that timm does not know, or that cannot make a step here, for want of a GPU or otherwise."""
    known = list_optimizers()
    if recipe.opt not in known:
        near = difflib.get_close_matches(recipe.opt, known, n=3) or ["sgd", "adamw"]
        raise UserError(f"timm has no optimiser {recipe.opt!r}: did you mean {' or '.join(near)}?")
    device = ranks().device
    trial = nn.Linear(2, 2, device=device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*opt_einsum")  # without it, Kron takes gigabytes for a layer
            optimizer = _optimizer(trial, recipe)
        trial(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
    except Exception as error:  # whatever an optimiser raises without its library, its device or its second pass
        remedy = "install opt_einsum, or choose" if "opt_einsum" in str(error) else "choose"
        raise UserError(f"The optimiser {recipe.opt} cannot be used here ({error}): {remedy} sgd or adamw.") from error


def images_per_batch(recipe: Recipe, here: Ranks) -> int:
    """Images of one batch of one process, so that a step has ``batch_size`` of them on however many processes."""
    shares = here.world_size * recipe.grad_accumulation
    if recipe.batch_size % shares or recipe.batch_size // shares < 2:
        raise UserError(
            f"The setting batch_size is {recipe.batch_size}, but {here.world_size} process(es) x "
            f"{recipe.grad_accumulation} accumulated batches need a multiple of {shares} of at least {2 * shares}: "
            "set it to one."
        )
    return recipe.batch_size // shares


def batch_settings(
    recipe: Recipe, mean: Sequence[float], std: Sequence[float], here: Ranks, *, balance: bool = False
) -> BatchSettings:
    """How this process makes its batches; with ``balance`` every class is shown equally often."""
    augmentation = AugmentationSettings(**{f.name: getattr(recipe, f.name) for f in fields(AugmentationSettings)})
    size = images_per_batch(recipe, here)
    return BatchSettings(augmentation, size, recipe.seed, mean, std, here.rank, here.world_size, balance)


class MovingAverage(ModelEmaV3):
    """timm's moving average of one model that stays on its device, with its lists of tensors made once, for speed.

    The decay of step t is 1 - t^(-2/3), as timm's ``use_warmup`` has it, and at most ``decay``: 0.999 is reached after
    31,600 steps, 81 epochs of CIFAR in batches of 128. Integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        ours, theirs = ([*net.parameters(), *net.buffers()] for net in (self.module, model))
        self._floating = [[t for t in tensors if t.is_floating_point()] for tensors in (ours, theirs)]
        self._counters = [[t for t in tensors if not t.is_floating_point()] for tensors in (ours, theirs)]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        lerp_all(self._floating[0], self._floating[1], 1.0 - decay)
        if self._counters[0]:
            copy_all(*self._counters)


class TrainState:
    """A net in training, on its device; parameters that need no gradient stay as they are.

    ``batches_per_epoch`` are those of this rank. ``param_groups`` are as optimisers take them, with ``lr_scale`` where
    a group learns slower; None for timm's: no weight decay for norms, biases and what ``no_weight_decay`` names, with
    the recipe's ``attn_lr_scale`` for the latter.
    ``model`` stays as it was given, neither wrapped nor compiled; ``ema`` is its moving average, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches_per_epoch: int,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        teacher: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.recipe, self.teacher = model, recipe, teacher
        self.device = next(model.parameters()).device
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._frozen = [m for m in model.modules() if _is_frozen(m)]
        bf16 = precision_on(self.device, recipe.precision) == "bf16"
        self._autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)
        self.steps_per_epoch, self._updates = math.ceil(batches_per_epoch / recipe.grad_accumulation), 0
        if param_groups is None and recipe.attn_lr_scale != 1:
            param_groups = _groups_with_slow_attention(model, recipe)
        self.optimizer = _optimizer(model, recipe, param_groups)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.epochs * self.steps_per_epoch,
            lr_min=recipe.min_lr,
            warmup_t=int(recipe.warmup_epochs * self.steps_per_epoch),
            warmup_lr_init=recipe.lr / 100,
            t_in_epochs=False,
        )
        self.ema = MovingAverage(model, recipe.ema_decay) if recipe.ema_decay else None
        # Batch norm uses each process's own images; its running statistics are those of rank 0.
        here = ranks()
        self._parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if here.world_size > 1 else None
        self._eager: nn.Module = self._parallel or model
        self._network: Callable[[Tensor], Tensor] = self._eager
        self._full_batch = images_per_batch(recipe, here)
        self._compiling = compile
        self.compile_seconds: float | None = None  # of the first step, most of it compilation
        if compile:
            # CUDA graphs: in small nets it is the launching of kernels that takes the time. With accumulation, a second
            # batch would overwrite the gradients of the first in the graph's memory.
            graphs = self.device.type == "cuda" and self._parallel is None and recipe.grad_accumulation == 1
            self._network = torch.compile(self._eager, dynamic=False, mode="reduce-overhead" if graphs else "default")

    @property
    def lr(self) -> float:
        """The learning rate of the next step, that of groups without ``lr_scale``."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def train(self) -> None:
        """Put the net into training mode, but for the layers that are frozen as a whole, batch norms among them."""
        self._eager.train()
        for module in self._frozen:
            module.training = False

    def accumulate(self, group: Sequence[tuple[Tensor, ...]], images: float) -> tuple[Tensor, Tensor]:
        """Gradients of one step; with the sum of its loss over the images and the number of right answers, as scalars.

        Each batch of ``group`` has images (B, 3, H, W) and targets, (B,) int64 or (B, classes) float32, and the
        teacher's logits (B, classes), where they come from a bank. ``images`` are those of the step on each rank, on
        average: the gradient is that of the mean over all images.
        """
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        losses, correct = [], []
        for number, (inputs, targets, *guide) in enumerate(group):
            last = number == len(group) - 1
            # Only the last batch exchanges gradients, the sums of all.
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                loss, logits = self._loss(inputs, targets, *guide)
                (loss * (len(targets) / images)).backward()
            losses.append(loss.detach().double() * len(targets))
            classes = targets.argmax(1) if targets.ndim == 2 else targets
            correct.append((logits.detach().argmax(1) == classes).sum())
        if self._compiling:
            self._compiling, self.compile_seconds = False, time.perf_counter() - started
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _loss(self, images: Tensor, targets: Tensor, guide: Tensor | None = None) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        # A smaller batch at an epoch's end is not worth compiling for.
        network = self._network if len(images) == self._full_batch else self._eager
        try:
            with self._autocast:
                logits = network(images)
        except RuntimeError as error:
            if not self._compiling or network is self._eager or is_out_of_memory(error):
                raise
            raise UserError(
                f"torch.compile fails here ({in_brief(error)}): install a C++ compiler, or leave out --compile."
            ) from error
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        if guide is None and self.teacher is not None:
            with torch.no_grad(), self._autocast:
                guide = self.teacher(images)
        if guide is not None:
            loss = self._with_teacher(loss, logits, guide.float(), targets)
        return loss, logits

    def _with_teacher(self, loss: Tensor, logits: Tensor, guide: Tensor, targets: Tensor) -> Tensor:
        recipe = self.recipe
        if recipe.distill_loss == "kd":
            learnt = distillation_loss(logits, guide, recipe.distill_temperature)
            return torch.lerp(loss, learnt, recipe.distill_weight)
        ramp_steps = recipe.dkd_warmup_epochs * self.steps_per_epoch
        ramp = min(1.0, self._updates / ramp_steps) if ramp_steps else 1.0
        learnt = decoupled_loss(
            logits, guide, targets, recipe.distill_temperature, alpha=recipe.dkd_alpha, beta=recipe.dkd_beta
        )
        return loss + ramp * learnt

    def step(self, updates: int) -> None:
        """Change the weights by the accumulated gradients; ``updates`` counts this step, over all epochs."""
        if self.recipe.clip_grad:
            torch.nn.utils.clip_grad_norm_(self._trained, self.recipe.clip_grad)
        self.optimizer.step()
        self._updates = updates
        self.scheduler.step_update(updates)
        if self.ema is not None:
            self.ema.update(self.model, step=updates)

    def load(self, state: dict[str, Any], updates: int) -> None:
        """Take up a state that ``save_checkpoint`` wrote after so many updates; one of another net raises an error."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        # Fused optimisers want their buffers laid out as the weights are.
        for parameter, buffers in self.optimizer.state.items():
            for name, buffer in buffers.items():
                if name in MOMENTA and buffer is not None and buffer.ndim and buffer.shape != parameter.shape:
                    raise ValueError(f"a {name} of its optimiser has the shape {tuple(buffer.shape)}")
                if torch.is_tensor(buffer) and buffer.shape == parameter.shape:
                    buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)
        self._updates = updates
        if updates:
            self.scheduler.step_update(updates)


def _groups_with_slow_attention(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups without the attention's parameters, and one of these behind them."""
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    attention = {
        parameter: None for name, parameter in model.named_parameters() if name in exempt and parameter.requires_grad
    }
    groups: list[dict[str, Any]] = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)
    groups = [{**group, "params": [p for p in group["params"] if p not in attention]} for group in groups]
    slow = {"params": list(attention), "weight_decay": 0.0, "lr_scale": recipe.attn_lr_scale}
    return [*groups, slow] if attention else groups


def _is_frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _optimizer(
    model: nn.Module, recipe: Recipe, param_groups: Iterable[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """timm's optimiser of that name, in its fused form where it has one for the device."""
    device = next(model.parameters()).device
    options = inspect.signature(get_optimizer_class(recipe.opt, bind_defaults=False)).parameters
    fast = {"fused": True} if "fused" in options and device.type in ("cpu", "cuda") else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model if param_groups is None else list(param_groups),
        opt=recipe.opt,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        **fast,
    )
    return optimizer
