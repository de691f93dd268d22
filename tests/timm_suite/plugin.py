"""pytest plug-in that turns timm's own tests/test_models.py on the models of this package.

Load it with ``-p plugin``. Before timm's tests are collected it replaces ``timm.list_models``, with which they are
parametrised, by a list of our models that no filter shortens: timm's filters go by the names of its own files and would
skip our DenseNets under TorchScript, and all our nets in the tests of intermediate layers. Then it keeps those tests
that ``selection`` names.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import timm

import conam_zoo  # noqa: F401 (registers the models)

__all__ = ["selection"]

OURS = "*_conam"
LARGEST = ("resnet101_conam", "wide_resnet28_10_conam", "densenetbc190_40_conam")  # by parameter count
ONE_PER_FAMILY = ("resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam")

_list_models = timm.list_models


def selection() -> dict[str, dict[str, list[str]]]:
    """What is to run: for each kind of test the test functions, for each of those its models."""
    most = [name for name in _list_models(OURS) if name not in LARGEST]
    tagged = [name for name in _list_models(OURS, include_tags=True) if name.partition(".")[0] not in LARGEST]
    pretrained = _list_models(OURS, pretrained=True)
    one_each = list(ONE_PER_FAMILY)
    return {
        "forward": {"test_model_forward": most},
        "backward": {"test_model_backward": most},
        "cfg": {"test_model_default_cfgs": tagged},
        "features": {
            "test_model_forward_features": most,
            "test_model_forward_intermediates": most,
            "test_model_forward_intermediates_features": most,
            "test_prune_intermediate_layers_contract": most,
        },
        "torchscript": {"test_model_forward_torchscript": one_each},
        "fx": {"test_model_forward_fx": one_each, "test_model_backward_fx": one_each},
        "pretrained": {
            "test_model_load_pretrained": pretrained,
            "test_model_features_pretrained": pretrained,
        },
    }


def _list_ours(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """``timm.list_models`` for our models, whatever the filters."""
    return _list_models(OURS, pretrained=pretrained, name_matches_cfg=name_matches_cfg, include_tags=include_tags)


def _list_our_pretrained(filter: str | Iterable[str] = "", exclude_filters: str | Iterable[str] = "") -> list[str]:
    """``timm.list_pretrained`` for our models, whatever the filters."""
    return _list_ours(pretrained=True, include_tags=True)


def pytest_configure() -> None:
    timm.list_models = _list_ours
    timm.list_pretrained = _list_our_pretrained


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {
        (function, model)
        for functions in selection().values()
        for function, models in functions.items()
        for model in models
    }
    kept = [item for item in items if _key(item) in wanted]
    config.hook.pytest_deselected(items=[item for item in items if _key(item) not in wanted])
    items[:] = kept


def _key(item: pytest.Item) -> tuple[str, Any]:
    """Test function and model of a test."""
    callspec = getattr(item, "callspec", None)
    return getattr(item, "originalname", item.name), callspec.params.get("model_name") if callspec else None
