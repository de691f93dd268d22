"""torch.hub entry points: one for every model that conam_zoo registers with timm.

``torch.hub.list`` calls every public callable an entry point, so all else here is underscored.
"""

import importlib as _importlib
from collections.abc import Callable as _Callable
from typing import Any as _Any

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

_DOCSTRING = """{summary}

Args:
    pretrained: Whether to load weights.
    tag: Data set that the weights were trained on, ``"cifar10"`` or ``"cifar100"``; timm's default tag if None.
    **kwargs: Arguments of ``timm.create_model``: ``num_classes``, ``in_chans``, ``features_only``, ``attn_layer``, ...

Returns:
    The model, in training mode.

Example:
    >>> import torch
    >>> model = torch.hub.load("{repository}", "{name}", pretrained=True, tag="cifar100").eval()
"""


def _entry_point(name: str, docstring: str) -> _Callable[..., _Any]:
    """The callable that makes the model of that name."""

    def make(pretrained: bool = False, tag: str | None = None, **kwargs: _Any) -> _Any:
        import timm

        return timm.create_model(f"{name}.{tag}" if tag else name, pretrained=pretrained, **kwargs)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = docstring
    return make


def _entry_points() -> dict[str, _Callable[..., _Any]]:
    """All entry points; none if a dependency is missing, which torch.hub reports in its own words before it loads."""
    try:
        weights = _importlib.import_module("conam_zoo.weights")
        timm = _importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name not in dependencies:
            raise
        return {}
    try:
        repository = weights.load_manifest().code_repository or "OWNER/REPOSITORY"
    except weights.ManifestError:  # said where weights are asked for
        repository = "OWNER/REPOSITORY"
    points = {}
    for name in timm.list_models("*_conam"):
        summary = (timm.model_entrypoint(name).__doc__ or name).strip()
        points[name] = _entry_point(name, _DOCSTRING.format(summary=summary, repository=repository, name=name))
    return points


globals().update(_entry_points())
