"""Recipes: every number of a training in one TOML document."""

import difflib
import json
import math
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from typing import Any

from conam_zoo.errors import UserError
from conam_zoo.inputs import check_file, expand_path
from conam_zoo.weights.verify import LARGEST_TEXT_BYTES, read_file

__all__ = ["Recipe", "list_recipes", "load_recipe", "parse_settings", "recipe_from_dict"]


@dataclass(frozen=True)
class Recipe:
    """All choices of one training.

    Attributes:
        model: Registered builder.
        dataset: Data set, which is also the tag of the weights.
        model_args: Arguments of the builder beside ``num_classes``.
        epochs: Passes over the training images.
        batch_size: Images in a step, over all processes and accumulated batches together.
        opt: Name of a timm optimiser; ``sgd`` is SGD with Nesterov momentum.
        lr: Peak learning rate, that of ``batch_size`` images in a step on however many devices.
        momentum: Momentum of the optimiser.
        weight_decay: Applied to convolution and linear weights, not to norms, biases and attention layers.
        warmup_epochs: Epochs over which the learning rate rises linearly from a hundredth of its peak.
        min_lr: Learning rate at the end of the cosine.
        label_smoothing: Share of the target spread over all classes.
        crop_padding: Pixels of reflection padding before the random crop; 0 for no crop.
        flip: Whether half of the images are mirrored.
        ema_decay: Decay of the moving average of the weights, for each step; 0 for none.
        final_weights: ``"ema"`` or ``"raw"``: which weights are evaluated and shipped. Fixed before the training.
        holdout: Training images kept out for choosing; 0 for a final run on all of them.
        precision: ``"bf16"`` (autocast, on devices that have instructions for it, else float32) or ``"fp32"``.
        seed: Of initialisation, order, augmentation and dropout.
        cutout: Side in pixels of the square that is blanked in each image; 0 for none (DeVries and Taylor, 2017).
        mixup: Alpha of mixup; 0 for none (Zhang et al., 2018).
        cutmix: Alpha of CutMix; 0 for none (Yun et al., 2019).
        grad_accumulation: Batches whose gradients are summed into one step of ``batch_size`` images.
        clip_grad: Largest Euclidean norm of the whole gradient; 0 for any.
        teacher: Model whose outputs are learnt as well, by name or ``local-dir:FOLDER``; empty for none.
        distill_weight: Share of the teacher's part in the loss ``"kd"``, in [0, 1].
        distill_temperature: Divides the logits of teacher and student before they are compared (Hinton et al., 2015).
        early_size: Side in pixels of the random crops that the first ``early_epochs`` epochs train on, which saves time
            (after Tan and Le, 2021); 0 for whole images.
        early_epochs: How many epochs that are; 0 for none.
        image_size: Side in pixels to which all images are averaged down first, for cheap comparisons; 0 for images as
            they are.
        alternate_flip: Show each image once as it is and once mirrored in any two epochs in a row, instead of by
            chance every time.
        mix_share: Share of the batches that mixup or CutMix is applied to.
        distill_loss: ``"kd"``, (1 - w) CE + w T^2 KL with w ``distill_weight``, or ``"dkd"``, CE + r T^2 (alpha TCKD +
            beta NCKD) with r rising linearly from 0 to 1 (Zhao et al., arXiv 2203.08679); w has no part in it.
        dkd_alpha: Weight of the divergence between target and the rest.
        dkd_beta: Weight of the divergence among the other classes.
        dkd_warmup_epochs: Epochs over which r rises, step by step; 0 for none.
    """

    model: str
    dataset: str
    model_args: dict[str, Any]
    epochs: int
    batch_size: int
    opt: str
    lr: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    min_lr: float
    label_smoothing: float
    crop_padding: int
    flip: bool
    ema_decay: float
    final_weights: str
    holdout: int
    precision: str
    seed: int
    # Settings with a default came later: recipes and runs that do not name them mean these values.
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    grad_accumulation: int = 1
    clip_grad: float = 0.0
    teacher: str = ""
    distill_weight: float = 0.5
    distill_temperature: float = 4.0
    early_size: int = 0
    early_epochs: int = 0
    image_size: int = 0
    alternate_flip: bool = False
    mix_share: float = 1.0
    distill_loss: str = "kd"
    dkd_alpha: float = 1.0
    dkd_beta: float = 2.0
    dkd_warmup_epochs: float = 20.0

    @property
    def cfg_overlay(self) -> dict[str, Any]:
        """What the images change in a net's ``pretrained_cfg``."""
        return {"input_size": (3, self.image_size, self.image_size)} if self.image_size else {}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_toml(self) -> str:
        """The recipe as a document that ``load_recipe`` reads back to an equal one."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.to_dict().items())


def list_recipes() -> list[str]:
    """Names of the recipes in the package, sorted."""
    folder = resources.files("conam_zoo.training") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key=value`` settings to it.

    Args:
        name: Name of a recipe in the package, or path of a TOML file.
        settings: Replacements such as ``"epochs=5"``; the value is read as TOML, else as a string.

    Raises:
        UserError: If the recipe, a key or a value is not what it should be.
    """
    packaged = resources.files("conam_zoo.training") / "recipes" / f"{name}.toml"
    if name in list_recipes():
        text = packaged.read_text()
    elif name.endswith(".toml"):
        path = expand_path(name)
        check_file(path, "recipe file")
        try:
            text = read_file(path, LARGEST_TEXT_BYTES).decode("utf-8-sig")  # editors of Windows begin with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The recipe {name} cannot be read ({error}): check the file.") from error
    else:
        near = difflib.get_close_matches(name, list_recipes(), n=3, cutoff=0.5) or ["resnet20_conam.cifar10"]
        raise UserError(f"There is no recipe {name!r}: did you mean {' or '.join(near)}? Or name a .toml file.")
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"The recipe {name} is not valid TOML: {error}.") from error
    replaced = parse_settings(settings or [])
    written, epochs, warmup = values.get("epochs"), replaced.get("epochs"), values.get("warmup_epochs")
    if (
        "warmup_epochs" not in replaced
        and isinstance(epochs, int)
        and isinstance(written, int)
        and isinstance(warmup, int | float)
        and written > 0 < epochs <= warmup
    ):
        replaced["warmup_epochs"] = warmup * epochs / written  # the recipe's own shrinks with its epochs if it has to
    return _checked(values | replaced, name)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary; whether a recipe knows the keys is not looked at.

    Raises:
        UserError: If a text has no ``=``.
    """
    values = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UserError(f"The setting {setting!r} has no '=': write --set key=value.")
        values[key.strip()] = _parse(value.strip())
    return values


def recipe_from_dict(values: dict[str, Any], name: str) -> Recipe:
    """The recipe that ``Recipe.to_dict`` made, of this version or an earlier one; ``name`` is for messages.

    Raises:
        UserError: If a setting is unknown, missing or out of its range.
    """
    return _checked(dict(values), name)


def _toml(value: Any) -> str:
    """A value as TOML; Python's standard library only reads that format."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)  # int and float: TOML knows inf, nan and exponents as Python writes them


def _parse(value: str) -> Any:
    """A TOML value, or the text itself if it is none, so that ``opt=sgd`` needs no quotes."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
    except RecursionError as error:
        raise UserError(f"The setting {value[:40]}… is nested too deeply: write it flat.") from error


def _checked(values: dict[str, Any], name: str) -> Recipe:
    from conam_zoo.models.config_schema import check_model_args

    types = {field.name: field.type for field in fields(Recipe)}
    if unknown := sorted(set(values) - set(types)):
        near = difflib.get_close_matches(unknown[0], types, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(types)}."
        raise UserError(f"The recipe {name} has no setting {unknown[0]!r}: {hint}")
    needed = {field.name for field in fields(Recipe) if field.default is MISSING}
    if missing := sorted(needed - set(values)):
        raise UserError(f"The recipe {name} lacks the setting {missing[0]!r}.")
    for key, value in values.items():
        expected = types[key]
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value) if abs(value) < 2**63 else math.inf
        elif expected is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"The setting {key} is {value!r}, but it must be a whole number.")
        elif expected in (float, bool, str) and not isinstance(value, expected):
            kind = {float: "a number", bool: "true or false", str: "a text"}[expected]
            raise UserError(f"The setting {key} is {value!r}, but it must be {kind}.")
        elif key == "model_args" and not isinstance(value, dict):
            raise UserError(f"The setting model_args is {value!r}, but it must be a table such as {{drop_rate = 0.1}}.")
    check_model_args(values.get("model_args", {}), "The setting model_args")
    if (channels := values.get("model_args", {}).get("in_chans", 3)) != 3:
        raise UserError(f"The setting model_args has in_chans = {channels}, but images are read with 3: leave it out.")
    recipe = Recipe(**values)
    for key, (good, wanted) in _ranges(recipe).items():
        if not good:
            raise UserError(f"The setting {key} is {getattr(recipe, key)!r}, which is out of its range: {wanted}.")
    if (recipe.early_size > 0) != (recipe.early_epochs > 0):
        raise UserError(
            f"The setting early_size is {recipe.early_size} and early_epochs {recipe.early_epochs}: set both, or none."
        )
    if recipe.alternate_flip and not recipe.flip:
        raise UserError("The setting alternate_flip is true, but flip is false: set flip to true as well.")
    if recipe.final_weights == "ema" and recipe.ema_decay == 0:
        raise UserError("The setting final_weights is 'ema', but ema_decay is 0: set one of them otherwise.")
    return recipe


def _ranges(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """For each setting with a range whether it lies in it, and what the range is."""
    rate = "it must be at least 0 and below 1"
    finite = "it must be at least 0 and finite"
    alpha = "it must be at least 0, 0 for none, and finite"
    side = "it must be 0 for none, or 8 to 4096 pixels"
    return {
        "epochs": (1 <= recipe.epochs <= 10**6, "it must be 1 to 1,000,000"),
        "batch_size": (2 <= recipe.batch_size <= 2**20, "it must be 2 to 1,048,576 images"),
        "lr": (0 < recipe.lr < math.inf, "it must be above 0 and finite"),
        "momentum": (0 <= recipe.momentum < 1, rate),
        "weight_decay": (0 <= recipe.weight_decay < math.inf, finite),
        "warmup_epochs": (
            0 <= recipe.warmup_epochs < recipe.epochs,
            f"it must be at least 0 and less than epochs, which is {recipe.epochs}",
        ),
        "label_smoothing": (0 <= recipe.label_smoothing < 1, rate),
        "crop_padding": (0 <= recipe.crop_padding <= 4096, "it must be 0 to 4096 pixels"),
        "ema_decay": (0 <= recipe.ema_decay < 1, rate),
        "holdout": (0 <= recipe.holdout < 2**40, "it must be at least 0, and less than there are training images"),
        "final_weights": (recipe.final_weights in ("ema", "raw"), "it must be ema or raw"),
        "precision": (recipe.precision in ("bf16", "fp32"), "it must be bf16 or fp32"),
        "seed": (-(2**63) <= recipe.seed < 2**64, "it must have 64 bits"),
        "cutout": (0 <= recipe.cutout <= 4096, "it must be 0 to 4096 pixels"),
        "mixup": (0 <= recipe.mixup < math.inf, alpha),
        "cutmix": (0 <= recipe.cutmix < math.inf, alpha),
        "grad_accumulation": (
            1 <= recipe.grad_accumulation <= recipe.batch_size,
            f"it must be at least 1 and no more than batch_size, which is {recipe.batch_size}",
        ),
        "clip_grad": (0 <= recipe.clip_grad < math.inf, "it must be at least 0, 0 for any length, and finite"),
        "distill_weight": (0 <= recipe.distill_weight <= 1, "it must be 0 to 1"),
        "distill_temperature": (0 < recipe.distill_temperature < math.inf, "it must be above 0 and finite"),
        "early_size": (recipe.early_size == 0 or 8 <= recipe.early_size <= 4096, side),
        "early_epochs": (
            0 <= recipe.early_epochs <= recipe.epochs,
            f"it must be at least 0 and no more than epochs, which is {recipe.epochs}",
        ),
        "image_size": (recipe.image_size == 0 or 8 <= recipe.image_size <= 4096, side),
        "mix_share": (0 < recipe.mix_share <= 1, "it must be above 0 and at most 1"),
        "min_lr": (
            0 <= recipe.min_lr <= recipe.lr,
            f"it must be at least 0 and no more than lr, which is {recipe.lr:g}",
        ),
        "distill_loss": (recipe.distill_loss in ("kd", "dkd"), "it must be kd or dkd"),
        "dkd_alpha": (0 <= recipe.dkd_alpha < math.inf, finite),
        "dkd_beta": (0 <= recipe.dkd_beta < math.inf, finite),
        "dkd_warmup_epochs": (0 <= recipe.dkd_warmup_epochs < math.inf, finite),
    }
