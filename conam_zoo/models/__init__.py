"""The model families; importing this registers their builders with timm."""

from conam_zoo.models._base import StagedClassifier as StagedClassifier
from conam_zoo.models.conam_densenet import *
from conam_zoo.models.conam_resnet import *
from conam_zoo.models.conam_wide_resnet import *
