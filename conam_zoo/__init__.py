"""A zoo of small image classifiers with ConAM, the confidence attention module.

Importing it registers the models with timm.
"""

import conam_zoo.models  # noqa: F401 (registers the models)
from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.registry import register_attention

__all__ = ["ConAM", "register_attention"]
