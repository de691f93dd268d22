"""``config.json`` of a model folder, which is input from outside: checked as a whole before anything is built.

The layout is timm's (``timm.models.save_for_hf``), with ``sha256`` and ``weights_file`` beside it. What would read
other files, choose a device or change what is built is not part of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conam_zoo.checks import (
    LARGEST_SIDE,
    Check,
    CheckError,
    either,
    integer,
    matching,
    number,
    one_of,
    optional,
    record,
    row,
    string,
    table_of,
    tuple_of,
)
from conam_zoo.errors import UserError
from conam_zoo.weights import WeightsError
from conam_zoo.weights.folder import read_config
from conam_zoo.weights.manifest import FILE_PATTERN

LARGEST_COUNT = 1 << 16  # classes
UNPOOLED = "global_pool is '', with which there is no classifier"

_TEXT = string(2000)
_SHORT = matching(r"[A-Za-z0-9_]{0,40}", "at most 40 letters, digits and underscores")
_CLASSES = integer(0, LARGEST_COUNT)
_CHANNELS = integer(1, 64)
_RATE = number(0, 1, below=True)
_SIDE = integer(1, LARGEST_SIDE)
_CROP = number(0.25, 1)  # pictures are resized to a side of input_size / crop_pct
_SIZE = row(_CHANNELS, _SIDE, _SIDE)
_LABELS = tuple_of(_TEXT, most=LARGEST_COUNT)
_POOL = one_of("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
_ARGUMENT = either(optional(one_of(True, False)), either(_SHORT, number(-4096, 4096)))

MODEL_ARGS: dict[str, Check] = {
    "num_classes": _CLASSES,
    "in_chans": _CHANNELS,
    "global_pool": _POOL,
    "drop_rate": _RATE,
    "block_drop_rate": _RATE,
    "attn_layer": _SHORT,
    "attn_placement": _SHORT,
    "attn_site": _SHORT,
    "patch_sizes": tuple_of(integer(0, LARGEST_SIDE), 1, 8),
    "attn_args": optional(table_of(_ARGUMENT, matching(r"[A-Za-z]\w{0,40}", "the name of an argument"))),
}
PRETRAINED_CFG: dict[str, Check] = {
    "architecture": _SHORT,
    "tag": optional(_TEXT),
    "custom_load": one_of(False),
    "input_size": _SIZE,
    "test_input_size": optional(_SIZE),
    "min_input_size": optional(_SIZE),
    "fixed_input_size": one_of(False),
    "interpolation": one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_pct": _CROP,
    "test_crop_pct": optional(_CROP),
    "crop_mode": one_of("center", "squash", "border"),
    "mean": tuple_of(number(0, 1), 1, 64),
    "std": tuple_of(number(1e-6, 1), 1, 64),
    "num_classes": _CLASSES,
    "label_names": optional(_LABELS),
    "label_descriptions": optional(table_of(_TEXT, _TEXT)),
    "pool_size": optional(row(_SIDE, _SIDE)),
    "test_pool_size": optional(row(_SIDE, _SIDE)),
    "first_conv": one_of("conv1"),
    "classifier": one_of("fc"),
    **dict.fromkeys(("license", "description", "origin_url", "paper_name"), optional(_TEXT)),
    "paper_ids": optional(either(_TEXT, tuple_of(_TEXT))),
    "notes": optional(tuple_of(_TEXT)),
}
CONFIG: dict[str, Check] = {
    "architecture": _SHORT,
    "num_classes": _CLASSES,
    "num_features": integer(1),
    "global_pool": _POOL,
    "label_names": _LABELS,
    "label_descriptions": table_of(_TEXT, _TEXT),
    "model_args": record(dict, MODEL_ARGS, required=()),
    "pretrained_cfg": record(dict, PRETRAINED_CFG, required=()),
    "sha256": matching("[0-9a-f]{64,256}", "64 hexadecimal digits"),  # a longer one is reported as another file's
    "weights_file": matching(FILE_PATTERN, "the name of a safetensors file"),
    # What transformers writes beside it (TimmWrapperConfig), and nothing here reads.
    **dict.fromkeys(("model_type", "transformers_version", "torch_dtype", "dtype"), _TEXT),
    **dict.fromkeys(("architectures", "initializer_range", "do_pooling", "problem_type"), lambda value, at: value),
}


def load_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a model folder; a WeightsError says where and what is wrong with it."""
    path = folder / "config.json"
    config = read_config(path)
    try:
        check_config(config)
    except CheckError as error:
        raise WeightsError(f"{path} is refused, {error}: copy the folder again, or correct it there.") from error
    except RecursionError as error:
        raise WeightsError(f"{path} is refused, it is nested too deeply: copy the folder again.") from error
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse, by a CheckError, what is no ``config.json`` of a net of this package."""
    record(dict, CONFIG, required=("architecture", "pretrained_cfg"))(as_json(config), "")
    if contradiction := _contradiction(config):
        raise CheckError(contradiction)


def check_model_args(arguments: Mapping[str, Any], what: str) -> None:
    """Refuse, by a UserError, arguments that are none of a builder of this package, or are beyond all reason."""
    known = ", ".join(MODEL_ARGS)
    if unknown := [key for key in arguments if key not in MODEL_ARGS]:
        raise UserError(f"{what} has {unknown[0]!r}, which no model takes: it knows {known}.")
    try:
        record(dict, MODEL_ARGS, required=())(as_json(arguments), "")
        if not arguments.get("global_pool", "avg"):
            raise CheckError(UNPOOLED)
    except CheckError as error:
        raise UserError(f"{what} is refused, {error}: it knows {known}.") from error


def check_trained_attention(config: Path, own: Mapping[str, Any]) -> None:
    """Refuse, by a WeightsError, weights that were trained with another attention than a net's ``own`` arguments say.

    Tensors fit patches of any size, and attentions at other places. ``config`` is the config.json beside the weights,
    if there is one; what it does not state of an attention is the default.
    """
    arguments = read_config(config).get("model_args") if config.is_file() else None
    if not isinstance(arguments, dict) or arguments.get("attn_layer") == own["attn_layer"] == "none":
        return
    unsaid = {"attn_args": {}, "attn_site": "before_first_conv"}
    known = {**unsaid, **as_json(own)}
    for key, stated in {**unsaid, **arguments}.items():
        if key in known and (stated or unsaid.get(key)) != (used := known[key]):
            raise WeightsError(
                f"The weights in {config.parent} were trained with {key}={stated!r} and the net has {used!r}: open "
                f"local-dir:{config.parent}, or pass {key}={stated!r}."
            )


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
    if "global_pool" in config and config["global_pool"] != args.get("global_pool", config["global_pool"]):
        return f"global_pool is {config['global_pool']!r} and {args['global_pool']!r} in it"
    channels = args.get("in_chans", cfg.get("input_size", (3,))[0])
    for key in ("mean", "std"):
        if key in cfg and len(cfg[key]) != channels:
            return f"{key} has {len(cfg[key])} numbers for {channels} channels"
    if "input_size" in cfg and cfg["input_size"][0] != channels:
        return f"input_size has {cfg['input_size'][0]} channels and in_chans is {channels}"
    return ""
