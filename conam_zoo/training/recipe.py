"""Recipes: every number of a training in one TOML document."""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from typing import Any

from conam_zoo.checks import Check, CheckError, either, integer, number, one_of
from conam_zoo.errors import UserError
from conam_zoo.files import check_file, expand_path
from conam_zoo.weights.verify import LARGEST_TEXT_BYTES, read_file

# What decides how much a teacher counts, for each ``distill_loss``.
WEIGHTS_OF_LOSSES = {"kd": ("distill_weight",), "dkd": ("dkd_alpha", "dkd_beta", "dkd_warmup_epochs")}
PARTS_OF_EPOCHS = ("warmup_epochs", "early_epochs", "dkd_warmup_epochs")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Recipe:
    """All choices of one training."""

    model: str  # a registered builder
    dataset: str  # also the tag of the weights
    model_args: dict[str, Any]  # of the builder, beside num_classes
    epochs: int
    batch_size: int  # images in a step, over all processes and accumulated batches together
    opt: str  # a timm optimiser; "sgd" is SGD with Nesterov momentum
    lr: float  # at its peak, for batch_size images in a step on however many devices
    momentum: float
    weight_decay: float  # of convolution and linear weights, not of norms, biases and attention layers
    warmup_epochs: float  # over which the learning rate rises linearly from a hundredth of its peak
    min_lr: float  # at the end of the cosine
    label_smoothing: float  # share of the target spread over all classes
    crop_padding: int  # pixels of reflection padding before the random crop; 0 for no crop
    flip: bool  # mirror half of the images
    ema_decay: float  # limit of the moving average's decay in step t, which is 1 - t^(-2/3); 0 for no average
    final_weights: str  # "ema" or "raw": which are evaluated and shipped, fixed before the training
    holdout: int  # training images kept out for choosing; 0 for a final run on all of them
    precision: str  # "bf16" (autocast, on devices that have instructions for it, else float32) or "fp32"
    seed: int  # of initialisation, order, augmentation and dropout
    # Settings with a default came later: recipes and runs that do not name them mean these values.
    cutout: int = 0  # side in pixels of the square that is blanked in each image (DeVries and Taylor, 2017)
    mixup: float = 0.0  # alpha; 0 for none (Zhang et al., 2018)
    cutmix: float = 0.0  # alpha; 0 for none (Yun et al., 2019)
    grad_accumulation: int = 1  # batches whose gradients are summed into one step
    clip_grad: float = 0.0  # largest Euclidean norm of the whole gradient; 0 for any
    teacher: str = ""  # a model whose outputs are learnt as well, by name or local-dir:FOLDER
    distill_weight: float = 0.5  # w in the loss "kd"
    distill_temperature: float = 4.0  # T, divides the logits of teacher and student (Hinton et al., 2015)
    early_size: int = 0  # side in pixels of the random crops of the early epochs (after Tan and Le, 2021)
    early_epochs: int = 0
    image_size: int = 0  # side in pixels that all images are averaged down to first, for cheap comparisons; 0 for not
    alternate_flip: bool = False  # show each image both ways in any two epochs in a row, not by chance every time
    mix_share: float = 1.0  # share of the batches that mixup or CutMix is applied to
    # "kd" is (1 - w) CE + w T^2 KL; "dkd" is CE + r T^2 (alpha TCKD + beta NCKD) with r rising linearly from 0 to 1
    # (Zhao et al., arXiv 2203.08679).
    distill_loss: str = "kd"
    dkd_alpha: float = 1.0
    dkd_beta: float = 2.0
    dkd_warmup_epochs: float = 20.0  # over which r rises, step by step; 0 for none
    attn_lr_scale: float = 1.0  # learning rate of attention layers, relative to lr; below 1 for a teacher with T^2

    @property
    def cfg_overlay(self) -> dict[str, Any]:
        """What the images change in a net's ``pretrained_cfg``."""
        return {"input_size": (3, self.image_size, self.image_size)} if self.image_size else {}

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them, without tuples."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_toml(self) -> str:
        """The recipe as a document that ``load_recipe`` reads back to an equal one."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.to_dict().items())


def list_recipes() -> list[str]:
    """Names of the recipes in the package, sorted."""
    folder = resources.files("conam_zoo.training") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, settings: list[str] | None = None) -> Recipe:
    """Read a recipe of the package or a TOML file, and apply settings such as ``"epochs=5"`` to it.

    With fewer epochs than are written in it, its ``PARTS_OF_EPOCHS`` shrink in proportion, unless they are set too.
    """
    if name in list_recipes():
        text = (resources.files("conam_zoo.training") / "recipes" / f"{name}.toml").read_text()
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
    written, epochs = values.get("epochs"), replaced.get("epochs")
    if isinstance(written, int) and isinstance(epochs, int) and 0 < epochs < written:
        values |= _shrunk({key: value for key, value in values.items() if key not in replaced}, epochs / written)
    recipe = recipe_from_dict(values | replaced, name)
    other = {"dkd": "kd", "kd": "dkd"}[recipe.distill_loss]
    if unused := sorted(replaced.keys() & WEIGHTS_OF_LOSSES[other]):
        raise UserError(
            f"The setting {unused[0]} has no effect, because distill_loss is {recipe.distill_loss!r}: "
            f"set {' or '.join(WEIGHTS_OF_LOSSES[recipe.distill_loss])} instead, or distill_loss={other}."
        )
    return recipe


def _shrunk(values: Mapping[str, Any], share: float) -> dict[str, Any]:
    """What a recipe does in some of its epochs, for this share of them."""
    shrunk = {part: values[part] * share for part in PARTS_OF_EPOCHS if isinstance(values.get(part), int | float)}
    if "early_epochs" in shrunk:
        shrunk["early_epochs"] = int(shrunk["early_epochs"] + 1e-9)
        shrunk |= {} if shrunk["early_epochs"] else {"early_size": 0}
    return shrunk


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary, whether or not a recipe knows the keys.

    A value is read as TOML, or is the text itself if it is none, so that ``opt=sgd`` needs no quotes.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = (part.strip() for part in setting.partition("="))
        if not separator:
            raise UserError(f"The setting {setting!r} has no '=': write --set key=value.")
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = value
        except RecursionError as error:
            raise UserError(f"The setting {value[:40]}… is nested too deeply: write it flat.") from error
    return values


def _toml(value: Any) -> str:
    """A value as TOML; Python's standard library only reads that format."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)  # int and float: TOML knows inf, nan and exponents as Python writes them


def recipe_from_dict(values: dict[str, Any], name: str) -> Recipe:
    """The recipe that ``Recipe.to_dict`` made, of this version or an earlier one; ``name`` is for messages."""
    from conam_zoo.models.config_schema import check_model_args

    values = dict(values)
    types = {field.name: field.type for field in fields(Recipe)}
    if unknown := sorted(set(values) - set(types)):
        near = difflib.get_close_matches(unknown[0], types, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(types)}."
        raise UserError(f"The recipe {name} has no setting {unknown[0]!r}: {hint}")
    if missing := sorted({field.name for field in fields(Recipe) if field.default is MISSING} - set(values)):
        raise UserError(f"The recipe {name} lacks the setting {missing[0]!r}.")
    for key, value in values.items():
        kind: Any = types[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = values[key] = float(value) if abs(value) < 2**63 else math.inf
        if kind in KINDS and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise UserError(f"The setting {key} is {value!r}, but it must be {KINDS[kind]}.")
        if key == "model_args" and not isinstance(value, dict):
            raise UserError(f"The setting model_args is {value!r}, but it must be a table such as {{drop_rate = 0.1}}.")
    check_model_args(values.get("model_args", {}), "The setting model_args")
    if "num_classes" in values.get("model_args", {}):
        raise UserError("The setting model_args holds num_classes, but the classes are those of the data set.")
    if (channels := values.get("model_args", {}).get("in_chans", 3)) != 3:
        raise UserError(f"The setting model_args has in_chans = {channels}, but images are read with 3: leave it out.")
    recipe = Recipe(**values)
    for key, check in _ranges(recipe).items():
        try:
            check(getattr(recipe, key), key)
        except CheckError as error:
            raise UserError(
                f"The setting {key} is {error.shown}, which is out of its range: it must be {error.rule}."
            ) from error
    size, epochs = recipe.early_size, recipe.early_epochs
    if (size > 0) != (epochs > 0):
        raise UserError(f"The setting early_size is {size} and early_epochs {epochs}: set both, or none.")
    if recipe.alternate_flip and not recipe.flip:
        raise UserError("The setting alternate_flip is true, but flip is false: set flip to true as well.")
    if recipe.final_weights == "ema" and recipe.ema_decay == 0:
        raise UserError("The setting final_weights is 'ema', but ema_decay is 0: set one of them otherwise.")
    return recipe


def _ranges(recipe: Recipe) -> dict[str, Check]:
    """The check of each setting that has a range; one that depends on another comes behind it."""
    epochs, batch_size = recipe.epochs, recipe.batch_size
    up_to = "at least {} and no more than {}, which is {}"
    pixels = integer(0, 4096, "0 to 4096 pixels")
    side = either(one_of(0), integer(8, 4096, "0 for none, or 8 to 4096 pixels"))
    return {
        "epochs": integer(1, 10**6, "1 to 1,000,000"),
        "batch_size": integer(2, 2**20, "2 to 1,048,576 images"),
        **dict.fromkeys(("lr", "distill_temperature", "attn_lr_scale"), number(0, above=True)),
        **dict.fromkeys(("momentum", "label_smoothing", "ema_decay"), number(0, 1, below=True)),
        **dict.fromkeys(("weight_decay", "mixup", "cutmix", "clip_grad"), number(0)),
        **dict.fromkeys(("dkd_alpha", "dkd_beta", "dkd_warmup_epochs"), number(0)),
        **dict.fromkeys(("crop_padding", "cutout"), pixels),
        **dict.fromkeys(("early_size", "image_size"), side),
        "warmup_epochs": number(0, epochs, below=True, rule=f"at least 0 and less than epochs, which is {epochs}"),
        "early_epochs": integer(0, epochs, up_to.format(0, "epochs", epochs)),
        "grad_accumulation": integer(1, batch_size, up_to.format(1, "batch_size", batch_size)),
        "min_lr": number(0, recipe.lr, rule=up_to.format(0, "lr", recipe.lr)),
        "holdout": integer(0, 2**40, "at least 0, and less than there are training images"),
        "seed": integer(-(2**63), 2**64 - 1, "a number of 64 bits"),
        "distill_weight": number(0, 1),
        "mix_share": number(0, 1, above=True),
        "final_weights": one_of("ema", "raw"),
        "precision": one_of("bf16", "fp32"),
        "distill_loss": one_of("kd", "dkd"),
    }
