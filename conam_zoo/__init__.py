"""A zoo of small image classifiers with ConAM, the confidence attention module.

Importing it registers the models with timm.
"""

from conam_zoo.startup import begin_command

begin_command()

import conam_zoo.models  # noqa: E402, F401 (registers the models)
from conam_zoo.layers.conam import ConAM  # noqa: E402
from conam_zoo.layers.registry import register_attention  # noqa: E402

__all__ = ["ConAM", "register_attention"]
