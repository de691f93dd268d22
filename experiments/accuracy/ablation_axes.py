"""The axes of the ablation: for each the settings that are compared, as arguments of a builder.

The first setting of an axis is the paper's form, except on the axis of patches, which is in order of their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm

from conam_zoo.errors import UserError

Arguments = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One position of an axis."""

    label: str  # for people
    variant: str  # short name of the cell; the same arguments have the same name on every axis
    arguments: Arguments  # from the builder's name to its arguments


def _with(arguments: Mapping[str, Any]) -> Arguments:
    return lambda model: arguments


def _form(label: str, variant: str, attn_placement: str = "", attn_site: str = "", **switches: Any) -> Setting:
    where = {"attn_placement": attn_placement, "attn_site": attn_site}
    given = {key: value for key, value in where.items() if value}
    return Setting(label, variant, _with({"attn_layer": "conam_variant", "attn_args": switches, **given}))


def _patches(per_side: int, model: str) -> Mapping[str, Any]:
    """The arguments of the form with so many patches per side, from the builder's own patches, four per side.

    A model with a map of too few pixels is refused.
    """
    own = timm.create_model(model, device="meta").patch_sizes
    if any(4 * side % per_side for side in own):
        raise UserError(f"{model} has maps too small for {per_side} patches per side: leave the axis 'patches' out.")
    return {"attn_layer": "conam_variant", "patch_sizes": [4 * side // per_side for side in own]}


# All forms are initialised alike, as PyTorch does; the nets of the zoo have the second bias at one instead.
PAPER = _form("the paper's form", "conam")
PLAIN = Setting("plain net", "none", _with({"attn_layer": "none"}))


def _paper(label: str) -> Setting:
    return Setting(label, PAPER.variant, PAPER.arguments)


HEADS_COSINE: dict[str, Any] = {"heads": 4, "agreement": "cosine", "scaling": "mean_zero", "identity_start": True}
HEADS_UNCENTRED: dict[str, Any] = {
    "heads": 16,
    "agreement": "scaled_dot",
    "second_relu": False,
    "gate": "tanh_uncentred",
    "identity_start": True,
}
HEADS_SIGMOID: dict[str, Any] = {
    "heads": 16,
    "agreement": "scaled_dot",
    "second_relu": False,
    "gate": "sigmoid",
    "shortcut": False,
}


CHANNELS_SIGMOID: dict[str, Any] = {"heads": 0, "second_relu": False, "gate": "sigmoid", "shortcut": False}
CHANNEL_TERM: dict[str, Any] = {"channel_term": True, "second_relu": False, "gate": "sigmoid", "shortcut": False}
CHANNELS_UNIT_START: dict[str, Any] = {"unit_start": True, **CHANNELS_SIGMOID}


def _one_patch(switches: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """A form with a single patch per map: a gate of channels alone."""
    return {"attn_args": switches, **_patches(1, model)}


AXES: dict[str, tuple[str, tuple[Setting, ...]]] = {
    "shortcut": ("Shortcut", (_paper("x (1 + eta)"), _form("x eta", "no_shortcut", shortcut=False))),
    "relu": ("Second ReLU", (_paper("with"), _form("without", "one_relu", second_relu=False))),
    "patches": (
        "Patches per side",
        tuple(
            _paper("4") if count == 4 else Setting(str(count), f"patches{count}", partial(_patches, count))
            for count in (1, 2, 4, 8, 16)
        ),
    ),
    "context": (
        "Context",
        (
            _paper("local and global"),
            _form("local only", "local", context="local"),
            _form("global only", "global", context="global"),
        ),
    ),
    "gate": ("Confidence", (_paper("softmax"), _form("sigmoid", "sigmoid", gate="sigmoid"))),
    "bottleneck": (
        "Bottleneck ratio",
        (_paper("1"), *(_form(str(ratio), f"bottleneck{ratio}", reduction=ratio) for ratio in (2, 8))),
    ),
    "placement": (
        "Placement",
        (
            _paper("first block of each stage"),
            _form("every block", "every_block", attn_placement="block"),
        ),
    ),
    "site": (
        "Site in the block",
        (
            _paper("before the first convolution"),
            _form("after the last norm", "after_last_norm", attn_site="after_last_norm"),
        ),
    ),
    "start": ("Initialisation", (_paper("default"), _form("identity", "identity_start", identity_start=True))),
    "form": (
        "Form",
        (
            PAPER,
            _form("P eta, mean one", "mean_one", scaling="mean_one", shortcut=False),
            _form("cosine, P eta", "cosine_mean_one", agreement="cosine", scaling="mean_one", shortcut=False),
            _form("1 + tanh", "tanh", gate="tanh"),
            _form("4 heads, cosine, P eta - 1", "heads4_cosine_mean_zero_start", **HEADS_COSINE),
            _form(
                "16 heads, 1 + tanh, every block",
                "heads16_uncentred_start_every_block",
                attn_placement="block",
                **HEADS_UNCENTRED,
            ),
            _form("16 heads, x sigmoid", "heads16_sigmoid", **HEADS_SIGMOID),
            Setting("16 heads, x sigmoid, one patch", "heads16_sigmoid_patches1", partial(_one_patch, HEADS_SIGMOID)),
            _form(
                "16 heads, x sigmoid, every block",
                "heads16_sigmoid_every_block",
                attn_placement="block",
                **HEADS_SIGMOID,
            ),
            _form("each channel, x sigmoid", "channels_sigmoid", **CHANNELS_SIGMOID),
            _form("each channel, x sigmoid, from one", "channels_sigmoid_unit_start", **CHANNELS_UNIT_START),
            Setting(
                "each channel, x sigmoid, from one, one patch",
                "channels_sigmoid_unit_start_patches1",
                partial(_one_patch, CHANNELS_UNIT_START),
            ),
            _form("a term for each channel, x sigmoid", "channel_term_sigmoid", **CHANNEL_TERM),
            Setting("for comparison: SE", "se", _with({"attn_layer": "se"})),
            Setting("for comparison: ECA", "eca", _with({"attn_layer": "eca"})),
            Setting(
                "for comparison: SE, every block",
                "se_every_block",
                _with({"attn_layer": "se", "attn_placement": "block"}),
            ),
        ),
    ),
}


def settings_of(axes: Sequence[str], only: Sequence[str] = ()) -> dict[str, Arguments]:
    """The variants of some axes, each once, after the plain net.

    ``only`` holds short names of settings that are wanted beside the plain net and the paper's form; if empty, all are.
    """
    variants = {PLAIN.variant: PLAIN.arguments}
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"There is no axis {axis!r}: choose from {', '.join(AXES)}.")
        variants |= {setting.variant: setting.arguments for setting in AXES[axis][1]}
    for name in only:
        if name not in variants:
            raise UserError(f"There is no setting {name!r} on these axes: choose from {', '.join(variants)}.")
    kept = {PLAIN.variant, PAPER.variant, *only} if only else variants.keys()
    return {name: arguments for name, arguments in variants.items() if name in kept}
