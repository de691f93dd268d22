"""``config.json`` of a model folder, which is input from outside: checked as a whole before anything is built.

The layout is timm's (``timm.models.save_for_hf``), with ``sha256`` and ``weights_file`` beside it. What would read
other files, choose a device or change what is built is no part of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conam_zoo.errors import UserError
from conam_zoo.weights import WeightsError
from conam_zoo.weights.folder import read_config
from conam_zoo.weights.manifest import FILE_PATTERN

__all__ = ["as_json", "check_model_args", "check_patch_sizes", "load_config"]

LARGEST_SIDE = 1024  # pixels
LARGEST_COUNT = 1 << 16  # classes
SIMPLE = ("type", "enum", "const", "pattern", "minimum", "maximum")  # rules that are told as they stand
UNPOOLED = "global_pool is '', with which there is no classifier"

_TEXT = {"type": "string", "maxLength": 2000}
_SHORT = {"type": "string", "pattern": r"^[A-Za-z0-9_]{0,40}\Z"}
_CLASSES = {"type": "integer", "minimum": 0, "maximum": LARGEST_COUNT}
_CHANNELS = {"type": "integer", "minimum": 1, "maximum": 64}
_RATE = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
_SIDE = {"type": "integer", "minimum": 1, "maximum": LARGEST_SIDE}
_CROP = {"type": "number", "minimum": 0.25, "maximum": 1}  # pictures are resized to a side of input_size / crop_pct
_SIZE = {"type": "array", "prefixItems": [_CHANNELS, _SIDE, _SIDE], "minItems": 3, "maxItems": 3}
_LABELS = {"type": "array", "items": _TEXT, "maxItems": LARGEST_COUNT}
_POOL = {"enum": ["", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"]}
_NUMBER = {"type": "number", "minimum": -4096, "maximum": 4096}
_STATISTICS = {"type": "array", "minItems": 1, "maxItems": 64}


def _object(properties: Mapping[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


MODEL_ARGS = _object(
    {
        "num_classes": _CLASSES,
        "in_chans": _CHANNELS,
        "global_pool": _POOL,
        "drop_rate": _RATE,
        "block_drop_rate": _RATE,
        "attn_layer": _SHORT,
        "attn_placement": _SHORT,
        "attn_site": _SHORT,
        "patch_sizes": {"type": "array", "items": _SIDE | {"minimum": 0}, "minItems": 1, "maxItems": 8},
        "attn_args": _or_null(
            {
                "type": "object",
                "propertyNames": {"pattern": r"^[A-Za-z]\w{0,40}\Z"},
                "additionalProperties": {"anyOf": [_NUMBER, _SHORT, {"type": ["boolean", "null"]}]},
            }
        ),
    }
)

PRETRAINED_CFG = _object(
    {
        "architecture": _SHORT,
        "tag": _or_null(_TEXT),
        "custom_load": {"const": False},
        "input_size": _SIZE,
        "test_input_size": _or_null(_SIZE),
        "min_input_size": _or_null(_SIZE),
        "fixed_input_size": {"const": False},
        "interpolation": {"enum": ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]},
        "crop_pct": _CROP,
        "test_crop_pct": _or_null(_CROP),
        "crop_mode": {"enum": ["center", "squash", "border"]},
        "mean": _STATISTICS | {"items": {"type": "number", "minimum": 0, "maximum": 1}},
        "std": _STATISTICS | {"items": {"type": "number", "minimum": 1e-6, "maximum": 1}},
        "num_classes": _CLASSES,
        "label_names": _or_null(_LABELS),
        "label_descriptions": _or_null({"type": "object", "additionalProperties": _TEXT}),
        "pool_size": _or_null({"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}),
        "test_pool_size": _or_null({"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}),
        "first_conv": {"const": "conv1"},
        "classifier": {"const": "fc"},
        **{key: _or_null(_TEXT) for key in ("license", "description", "origin_url", "paper_name")},
        "paper_ids": _or_null({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}),
        "notes": _or_null({"type": "array", "items": _TEXT}),
    }
)

CONFIG = _object(
    {
        "architecture": _SHORT,
        "num_classes": _CLASSES,
        "num_features": {"type": "integer", "minimum": 1},
        "global_pool": _POOL,
        "label_names": _LABELS,
        "label_descriptions": {"type": "object", "additionalProperties": _TEXT},
        "model_args": MODEL_ARGS,
        "pretrained_cfg": PRETRAINED_CFG,
        "sha256": {"type": "string", "pattern": r"^[0-9a-f]{64,256}\Z"},  # a longer one is told as that of another file
        "weights_file": {"type": "string", "pattern": f"^{FILE_PATTERN}\\Z"},
        # What transformers writes beside it (TimmWrapperConfig), and nothing here reads.
        **dict.fromkeys(("model_type", "transformers_version", "torch_dtype", "dtype"), _TEXT),
        **dict.fromkeys(("architectures", "initializer_range", "do_pooling", "problem_type"), True),
    },
    ("architecture", "pretrained_cfg"),
)


def load_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a model folder; a WeightsError says where and what is wrong with it."""
    path = folder / "config.json"
    config = read_config(path)
    try:
        said = _first_error(config, CONFIG) or _contradiction(config)
    except RecursionError:
        said = "it is nested too deeply"
    if said:
        raise WeightsError(f"{path} is refused, {said}: copy the folder again, or mend it there.")
    return config


def check_model_args(arguments: Mapping[str, Any], what: str) -> None:
    """Refuse, by a UserError, arguments that are none of a builder of this package, or are beyond all reason."""
    known = MODEL_ARGS["properties"]
    if unknown := [key for key in arguments if key not in known]:
        raise UserError(f"{what} has {unknown[0]!r}, which no model takes: it knows {', '.join(known)}.")
    said = _first_error(dict(arguments), MODEL_ARGS)
    if not said and not arguments.get("global_pool", "avg"):
        said = UNPOOLED
    if said:
        raise UserError(f"{what} is refused, {said}: it knows {', '.join(known)}.")


def check_patch_sizes(file: Path, patch_sizes: Sequence[int] | None) -> None:
    """Refuse, by a WeightsError, weights that were trained with other patches: tensors fit patches of any size.

    The config.json beside the file says so, if there is one.
    """
    config = file.with_name("config.json")
    if patch_sizes is None or not config.is_file():
        return
    arguments = read_config(config).get("model_args")
    stated = arguments.get("patch_sizes") if isinstance(arguments, dict) else None
    if isinstance(stated, list) and tuple(stated) != tuple(patch_sizes):
        raise WeightsError(
            f"The weights {file} were trained with the patch sizes {stated} and the net has others: open "
            f"local-dir:{file.parent}, or pass patch_sizes={stated}."
        )


def _first_error(value: Any, schema: Mapping[str, Any]) -> str:
    """What is wrong with a value, as a clause; empty if nothing is."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(as_json(value)))
    if error is None:
        return ""
    where = ".".join(str(step) for step in error.absolute_path)
    message = error.message if len(error.message) <= 160 else f"...{error.message[-157:]}"
    if error.validator == "additionalProperties" and isinstance(error.schema.get("properties"), Mapping):
        unknown = ", ".join(repr(key)[:60] for key in error.instance if key not in error.schema["properties"])
        return f"{where or 'it'} has {unknown[:160]}, which is unknown"
    if error.validator in (*SIMPLE, "anyOf"):
        shown = repr(error.instance)
        rule = [f"{key} {value}" for key, value in error.schema.items() if key in SIMPLE]
        wants = ", ".join(rule) or "another kind of value"
        message = f"is {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {wants}"
    return " ".join(f"{where} {message}".split())


def as_json(value: Any) -> Any:
    """Tuples as the lists that JSON has."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _contradiction(config: Mapping[str, Any]) -> str:
    """What two of its facts disagree about."""
    cfg, args = config["pretrained_cfg"], config.get("model_args", {})
    counts = {place["num_classes"] for place in (config, cfg, args) if "num_classes" in place}
    if len(counts) > 1:
        return f"num_classes is {' and '.join(map(str, sorted(counts)))} in it"
    for names in (config.get("label_names"), cfg.get("label_names")):
        if names is not None and counts and len(names) not in (0, *counts):
            return f"label_names has {len(names)} names for {min(counts)} classes"
    if max(counts, default=0) > 0 and not args.get("global_pool", "avg"):
        return UNPOOLED
    if config.get("global_pool", "avg") != args.get("global_pool", config.get("global_pool", "avg")):
        return f"global_pool is {config['global_pool']!r} and {args['global_pool']!r} in it"
    channels = args.get("in_chans", cfg.get("input_size", (3,))[0])
    for key in ("mean", "std"):
        if key in cfg and len(cfg[key]) != channels:
            return f"{key} has {len(cfg[key])} numbers for {channels} channels"
    if "input_size" in cfg and cfg["input_size"][0] != channels:
        return f"input_size has {cfg['input_size'][0]} channels and in_chans is {channels}"
    return ""
