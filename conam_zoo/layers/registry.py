"""The attentions by name: the one list of them, which ``register_attention`` adds to."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import create_attn
from torch import nn

from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.simam import make_simam

TIMM_LAYERS = ("se", "eca", "cbam", "gc", "coord")

GIVEN = ("channels", "patch_size", "device", "dtype")  # what the net gives every factory

FACTORIES: dict[str, Callable[..., nn.Module]] = {}


def attention_names() -> tuple[str, ...]:
    """What ``attn_layer`` can be: ``"none"`` for the plain twin, and every registered attention."""
    return ("none", *FACTORIES)


def register_attention(name: str, factory: Callable[..., nn.Module]) -> None:
    """Make ``attn_layer=name`` work in every family, in ``config.json`` and in what ``local-dir:`` loads.

    ``factory(channels, patch_size, *, device=None, dtype=None, **attn_args)`` returns a module that maps (N, C, H, W)
    to the same shape; a class with such a constructor will do. ``patch_size`` is the side of ConAM's patches at the
    site, which a factory may ignore; ``attn_args`` are those of the net's builder, and have to be numbers, true,
    false, None or short words if the net is to be saved. A ``confidence`` method, (N, C, H, W) -> (N, rows, columns),
    shows in ``conam explain``.

    The name has to be registered again, before the net is built or loaded, in every process. Registering a name twice
    replaces the first; a built-in attention's is refused.

    >>> class Twice(nn.Module):
    ...     def __init__(self, channels, patch_size, *, device=None, dtype=None):
    ...         super().__init__()
    ...
    ...     def forward(self, x):
    ...         return 2 * x
    >>> register_attention("twice", Twice)
    >>> create_attention("twice", 16, 8)(torch.ones(1, 16, 8, 8)).mean()
    tensor(2.)
    """
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", name) is None:
        raise ValueError(
            f"The attention's name is {name!r}, but it must be made of letters, digits and underscores, at most 40."
        )
    if name in BUILT_IN:
        raise ValueError(f"The attention's name is {name!r}, but that is a built-in attention: choose another name.")
    if not callable(factory):
        raise TypeError(f"The factory of attention {name!r} is {factory!r}, but it must be callable.")
    FACTORIES[name] = factory


def check_attention(name: str, attn_args: Mapping[str, Any] | None = None) -> None:
    """Refuse, by a ValueError, a name that is not registered, and arguments that the net gives itself."""
    if name not in attention_names():
        remedy = "register an attention of your own with conam_zoo.register_attention before the net is made"
        if name == "conam_variant":  # the forms of the ablation, which a checkout alone has
            remedy = "in a checkout 'import experiments' registers it, and 'python -m experiments.conam' has it"
        raise ValueError(f"attn_layer is {name!r}, but it must be one of {', '.join(attention_names())}: {remedy}.")
    if attn_args and (name == "none" or not {"name", *GIVEN}.isdisjoint(attn_args)):
        _refuse_arguments(name, dict(attn_args))


def create_attention(
    name: str,
    channels: int,
    patch_size: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **attn_args: Any,
) -> nn.Module:
    """The attention of that name for a map of ``channels`` channels."""
    check_attention(name, attn_args)
    if name == "none":
        return nn.Identity()
    factory = FACTORIES[name]
    arguments: dict[str, Any] = {"device": device, "dtype": dtype, **attn_args}
    try:
        inspect.signature(factory).bind(channels, patch_size, **arguments)
    except TypeError as error:
        _refuse_arguments(name, attn_args)
        raise ValueError(
            f"The factory of attn_layer {name!r} cannot be called with (channels, patch_size, device=..., dtype=...), "
            f"{error}: give it these parameters."
        ) from error
    except ValueError:  # a callable without a signature
        pass
    attention = factory(channels, patch_size, **arguments)
    if not isinstance(attention, nn.Module):
        raise TypeError(f"The factory of attn_layer {name!r} returned {attention!r}, but it must return a module.")
    return attention


def _refuse_arguments(name: str, attn_args: dict[str, Any]) -> None:
    if attn_args:
        parameters = inspect.signature(FACTORIES[name]).parameters.values() if name in FACTORIES else ()
        taken = ", ".join(p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in GIVEN)
        remedy = f"hold no more than {taken}" if taken else "be empty"
        raise ValueError(f"attn_args is {attn_args!r}, but it must {remedy} for attn_layer {name!r}.")


def _timm_layer(name: str) -> Callable[..., nn.Module]:
    """timm's layer with timm's defaults; it has no patches."""

    def make(channels: int, patch_size: int, *, device: Any = None, dtype: Any = None) -> nn.Module:
        layer: nn.Module = create_attn(name, channels, device=device, dtype=dtype)
        return layer

    return make


FACTORIES["conam"] = ConAM
FACTORIES.update((name, _timm_layer(name)) for name in TIMM_LAYERS)
FACTORIES["simam"] = make_simam
BUILT_IN = attention_names()
