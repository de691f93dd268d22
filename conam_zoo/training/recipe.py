"""Recipes: every number of a training in one TOML document."""

import tomllib
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from conam_zoo.errors import UserError

__all__ = ["Recipe", "list_recipes", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """All choices of one training.

    Attributes:
        model: Registered builder.
        dataset: Data set, which is also the tag of the weights.
        model_args: Arguments of the builder beside ``num_classes``.
        epochs: Passes over the training images.
        batch_size: Images in a step.
        opt: Name of a timm optimiser; ``sgd`` is SGD with Nesterov momentum.
        lr: Peak learning rate.
        momentum: Momentum of the optimiser.
        weight_decay: Applied to convolution and linear weights, not to norms and biases.
        warmup_epochs: Epochs over which the learning rate rises linearly from a hundredth of its peak.
        min_lr: Learning rate at the end of the cosine.
        label_smoothing: Share of the target spread over all classes.
        crop_padding: Pixels of reflection padding before the random crop; 0 for no crop.
        flip: Whether half of the images are mirrored.
        ema_decay: Decay of the moving average of the weights, for each step; 0 for none.
        final_weights: ``"ema"`` or ``"raw"``: which weights are evaluated and shipped. Fixed before the training.
        holdout: Training images kept out for choosing; 0 for a final run on all of them.
        precision: ``"bf16"`` (autocast) or ``"fp32"``.
        seed: Of initialisation, order and augmentation.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    elif name.endswith(".toml") and Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise UserError(
            f"There is no recipe {name!r}: choose one of {', '.join(list_recipes())}, or name a .toml file."
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"The recipe {name} is not valid TOML: {error}.") from error
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UserError(f"The setting {setting!r} has no '=': write --set key=value.")
        values[key.strip()] = _parse(value.strip())
    return _checked(values, name)


def _parse(value: str) -> Any:
    """A TOML value, or the text itself if it is none, so that ``opt=sgd`` needs no quotes."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _checked(values: dict[str, Any], name: str) -> Recipe:
    types = {field.name: field.type for field in fields(Recipe)}
    known = ", ".join(types)
    if unknown := sorted(set(values) - set(types)):
        raise UserError(f"The recipe {name} has no setting {unknown[0]!r}: it knows {known}.")
    if missing := sorted(set(types) - set(values)):
        raise UserError(f"The recipe {name} lacks the setting {missing[0]!r}.")
    for key, value in values.items():
        expected = types[key]
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value)
        elif expected is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"The setting {key} is {value!r}, but it must be a whole number.")
        elif expected in (float, bool, str) and not isinstance(value, expected):
            kind = {float: "a number", bool: "true or false", str: "a text"}[expected]
            raise UserError(f"The setting {key} is {value!r}, but it must be {kind}.")
    recipe = Recipe(**values)
    ranges = {
        "epochs": recipe.epochs >= 1,
        "batch_size": recipe.batch_size >= 2,
        "lr": recipe.lr > 0,
        "weight_decay": recipe.weight_decay >= 0,
        "warmup_epochs": 0 <= recipe.warmup_epochs < recipe.epochs,
        "label_smoothing": 0 <= recipe.label_smoothing < 1,
        "crop_padding": recipe.crop_padding >= 0,
        "ema_decay": 0 <= recipe.ema_decay < 1,
        "holdout": recipe.holdout >= 0,
        "final_weights": recipe.final_weights in ("ema", "raw"),
        "precision": recipe.precision in ("bf16", "fp32"),
    }
    for key, good in ranges.items():
        if not good:
            raise UserError(f"The setting {key} is {getattr(recipe, key)!r}, which is out of its range.")
    if recipe.final_weights == "ema" and recipe.ema_decay == 0:
        raise UserError("The setting final_weights is 'ema', but ema_decay is 0: set one of them otherwise.")
    return recipe
