"""Published weights: what the manifest says of them, and verified copies of their files.

Light to import: torch, safetensors and huggingface_hub are imported when a file is first read or fetched.
"""

from conam_zoo.weights.errors import ManifestError, WeightsError, WrongWeightsError
from conam_zoo.weights.manifest import (
    ONNX_FILES,
    Manifest,
    Metrics,
    OnnxFile,
    WeightEntry,
    dump_manifest,
    find_checkout,
    find_manifest,
    load_manifest,
    parse_manifest,
)
from conam_zoo.weights.resolve import VerifiedWeights, check_copies, find_verified
from conam_zoo.weights.verify import CopyStatus, read_safetensors, read_verified

__all__ = [
    "ONNX_FILES",
    "CopyStatus",
    "Manifest",
    "ManifestError",
    "Metrics",
    "OnnxFile",
    "VerifiedWeights",
    "WeightEntry",
    "WeightsError",
    "WrongWeightsError",
    "check_copies",
    "dump_manifest",
    "find_checkout",
    "find_manifest",
    "find_verified",
    "load_manifest",
    "parse_manifest",
    "read_safetensors",
    "read_verified",
]
