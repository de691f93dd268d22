"""The part of fine-tuning that trains: a net with a new head, images of any kind, its logits for the report."""

import io
import math
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor

from conam_zoo.data import ImageData, ImageSplit, create_loader, pixel_statistics
from conam_zoo.data.dataset import LazyImages, read_source
from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import check_takes_rgb, export_model, open_model
from conam_zoo.training.distributed import ranks
from conam_zoo.training.evaluate import PREPARATION, logits_on
from conam_zoo.training.fit import fit
from conam_zoo.training.recipe import Recipe, parse_settings, recipe_from_dict
from conam_zoo.training.train import MONITORED_IMAGES
from conam_zoo.training.train_state import batch_settings

SAMPLE = 2_000  # images from which statistics are taken where a set is not in memory

# The peak rates below were chosen on validation images, with few runs; see docs/finetuning.md.
DEFAULTS: dict[str, Any] = {
    "model_args": {},
    "epochs": 20,
    "opt": "sgd",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "min_lr": 0.0,
    "label_smoothing": 0.0,
    "flip": True,
    "ema_decay": 0.0,
    "final_weights": "raw",
    "holdout": 0,
    "seed": 0,
}
LR, FROM_SCRATCH_LR = 0.02, 0.05  # of a batch of 32; proportional to the batch
WARMUP_SHARE = 0.1  # of all epochs
BATCH_SIZES = (32, 16, 8)
TEACHING = ("distill_loss", "distill_weight", "distill_temperature", "dkd_alpha", "dkd_beta", "dkd_warmup_epochs")
DONE_OTHERWISE = {  # settings of a recipe that mean nothing here, and what does the same
    "model": "give --model",
    "dataset": "name the data instead",
    "image_size": "give --image-size",
    "holdout": "give --val-share",
    **dict.fromkeys(("teacher", *TEACHING), "learn from a teacher with conam distill"),
}
STEPS = 10  # in an epoch: the largest batch that leaves so many is taken
CROP_SHARE = 8  # the crop's padding is the image size divided by this, as 4 is of 32


@dataclass(frozen=True)
class NetForData:
    """A net made for a data set."""

    model: StagedClassifier  # its ``pretrained_cfg`` holds classes, image size and statistics
    new_head: bool  # or that of the weights, whose classes are the same
    started_from: str  # what its weights are
    statistics_from: str  # where mean and deviation of the pixels come from


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning ends in."""

    model: StagedClassifier  # in evaluation mode
    report_on: ImageSplit  # the test split, or without one the validation split
    logits: Tensor  # of these images, float32 (N, classes), on the CPU
    flipped_logits: Tensor  # of the same images, mirrored
    log: list[dict[str, Any]]  # one row for each epoch
    history: list[dict[str, Any]]  # the environments that it ran in
    train_minutes: float  # that the epochs took
    sha256: str  # of ``final/model.safetensors``


def finetune_recipe(
    model: str,
    data: str,
    image_size: int,
    settings: list[str] | None = None,
    *,
    images: int,
    from_scratch: bool = False,
    **choices: Any,
) -> Recipe:
    """The recipe of a fine-tuning: defaults, then ``choices``, then ``settings``.

    The crop's padding follows from ``image_size``, in pixels; batch size and learning rate from the number of training
    ``images``, and from whether the weights begin as random numbers, which learn faster. Of ``choices``, None is the
    default; ``settings`` are as ``"weight_decay=1e-3"``. What does not fit is a ``UserError``.
    """
    values = DEFAULTS | {
        "model": model,
        "dataset": data,
        "batch_size": next((size for size in BATCH_SIZES if images >= STEPS * size), BATCH_SIZES[-1]),
        "crop_padding": image_size // CROP_SHARE,
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
    }
    values |= {key: value for key, value in choices.items() if value is not None}
    given = parse_settings(settings or [])
    for key in given:
        if key in DONE_OTHERWISE:
            raise UserError(f"The setting {key} is {given[key]!r}, but fine-tuning has none: {DONE_OTHERWISE[key]}.")
    values |= given
    batch_size = values["batch_size"] if isinstance(values["batch_size"], int) else 1  # else it is refused below
    values.setdefault("lr", (FROM_SCRATCH_LR if from_scratch else LR) * batch_size / BATCH_SIZES[0])
    values.setdefault("warmup_epochs", WARMUP_SHARE * values["epochs"] if isinstance(values["epochs"], int) else 0.0)
    return recipe_from_dict(values, "for fine-tuning")


def net_for_data(name: str, data: ImageData, recipe: Recipe, *, from_scratch: bool = False) -> NetForData:
    """Make a net for a data set: head, image size, ConAM's patches, statistics, class names.

    The head is new, unless the weights are of the very same classes. The patch sides grow with the images, so that
    there are as many patches as before. Mean and deviation are those that the weights were trained with, because the
    first layer knows them; from scratch, those of the training images.
    """
    plain = open_model(name, pretrained=False, **({} if ":" in name else {"device": "meta"}))
    check_takes_rgb(plain)
    cfg = dict(plain.pretrained_cfg)
    size, old = data.image_size, cfg["input_size"][1]
    step = old // math.gcd(old, *plain.patch_sizes)
    if size % step:
        raise UserError(f"The image size is {size}, but ConAM's patches of this net need a multiple of {step}.")
    arguments = {"patch_sizes": tuple(side * size // old for side in plain.patch_sizes), **recipe.model_args}
    torch.manual_seed(recipe.seed)
    try:
        model = open_model(name, pretrained=not from_scratch, num_classes=len(data.classes), **arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The setting model_args is {recipe.model_args}, which {name} refuses: {error}") from error
    new_head = from_scratch or tuple(cfg.get("label_names") or ()) != data.classes
    if new_head and not from_scratch and cfg["num_classes"] == len(data.classes):  # where timm keeps the head
        model.reset_classifier(len(data.classes))
    mean, std = (cfg["mean"], cfg["std"]) if not from_scratch else _statistics(data.train, size)
    if min(std) == 0:
        raise UserError(f"The images of {data.source} have a single colour value in a channel: check them.")
    grown = {key: tuple(side * size // old for side in cfg[key]) for key in ("pool_size",) if cfg.get(key)}
    own = {"num_classes": len(data.classes), "label_names": data.classes, "input_size": (3, size, size)} | PREPARATION
    nowhere = {"hf_hub_id": None, "hf_hub_filename": None, "url": "", "file": None, "tag": None}
    model.pretrained_cfg.update(own | nowhere | grown | {"mean": tuple(mean), "std": tuple(std)})
    return NetForData(
        model,
        new_head,
        "random numbers" if from_scratch else name,
        "the training images" if from_scratch else f"{name}, whose first layer knows them",
    )


def _statistics(train: ImageSplit | LazyImages, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(train, LazyImages):
        train = _some(train, torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:SAMPLE], size)
    return pixel_statistics(train.images)


def _some(train: ImageSplit | LazyImages, indices: Tensor, size: int) -> ImageSplit:
    if isinstance(train, ImageSplit):
        return train.select(indices)
    return read_source(train.select(indices.numpy()), size)[0]


def freeze_layers(model: StagedClassifier, freeze: str) -> int:
    """Take layers out of the training, with the statistics of their batch norms; how many parameters are left to train.

    ``freeze`` is ``"none"``; ``"stem"``; the name of a stage, such as ``"layer2"``, for everything up to its end; or
    ``"backbone"`` for everything but the head.
    """
    order = [name for level in model.levels for name in level]
    ends = {"none": 0, "stem": len(model.levels[0])}
    ends |= {name: place + 1 for place, name in enumerate(order) if any(getattr(model, name).children())}
    ends["backbone"] = len(order)
    if freeze not in ends:
        raise UserError(f"There is no layer {freeze!r} to freeze: choose one of {', '.join(ends)}.")
    for name, module in model.named_children():
        if name in order[: ends[freeze]] or (freeze == "backbone" and module is not model.fc):
            module.requires_grad_(False)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_layer_decay(layer_decay: float, recipe: Recipe) -> None:
    """Refuse a factor that does not lie in (0, 1], and a second setting that scales learning rates."""
    if not 0 < layer_decay <= 1:
        raise UserError(f"The layer decay is {layer_decay}, but it must lie in (0, 1].")
    if layer_decay < 1 and recipe.attn_lr_scale != 1:
        raise UserError(
            f"The setting attn_lr_scale is {recipe.attn_lr_scale}, but the layer decay, {layer_decay}, scales the "
            "learning rates already: leave one of them out."
        )


def train_on(
    net: NetForData,
    data: ImageData,
    recipe: Recipe,
    output: Path,
    *,
    layer_decay: float = 1.0,
    balance: bool = False,
    resume: bool = False,
    record: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> FineTuned:
    """Train a net on a data set and write ``final/``; the last epoch's weights are taken, none is chosen.

    ``layer_decay`` is timm's (``param_groups_layer_decay``), ``balance`` shows every class equally often, ``record``
    are plain facts that a resumed run must share, ``environment`` those that it need not, ``workers`` processes decode
    a set that does not fit into memory, and ``quiet`` prints nothing.
    """
    check_layer_decay(layer_decay, recipe)
    report_on = data.test if data.test is not None else data.val
    if report_on is None:
        raise UserError(f"{data.source} has neither test nor validation images: split some off with --val-share.")
    here, model = ranks(), net.model
    cfg = model.pretrained_cfg
    batches, line = create_loader(
        data.train,
        data.image_size,
        batch_settings(recipe, cfg["mean"], cfg["std"], here, balance=balance),
        device=here.device,
        workers=workers,
    )
    PlainConsole(quiet=quiet or not here.first, soft_wrap=True).print(line)
    groups = None
    if layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            weight_decay=recipe.weight_decay,
            layer_decay=layer_decay,
            no_weight_decay_list=model.no_weight_decay(),
        )
    # Liveness is measured on as many pixels as of 256 images of 32 px, and on at least 8 images.
    count = min(len(data.train), max(8, MONITORED_IMAGES * 32**2 // data.image_size**2))
    monitor = _some(data.train, torch.arange(count) * len(data.train) // count, data.image_size)
    with redirect_stdout(io.StringIO()) if quiet else nullcontext():
        result = fit(
            model,
            recipe,
            batches,
            output,
            holdout=data.val,
            monitor=monitor,
            param_groups=groups,
            resume=resume,
            record=record or {},
            environment=environment,
        )
    final = result.final.eval()
    sha256 = export_model(final, output / "final", tag=None) if here.first else ""
    mirrored = replace(report_on, images=report_on.images.flip(2))
    logits, flipped = (logits_on(final, split).cpu() for split in (report_on, mirrored))
    told = result.log, result.history, result.train_minutes
    return FineTuned(final, report_on, logits, flipped, *told, sha256)
