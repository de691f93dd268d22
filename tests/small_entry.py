"""Weights made up in tests: their manifest entries, and what may be wrong with them."""

import hashlib
import os
from pathlib import Path
from typing import Any

from conam_zoo.weights import Metrics, WeightEntry

NAMESPACE, REVISION = "some-lab", "0a" * 20


def entry_for(name: str, data: bytes, **facts: Any) -> WeightEntry:
    """An entry that describes `data`; `facts` replace the made-up ones."""
    made_up: dict[str, Any] = {
        "name": name,
        "repository": name,
        "revision": REVISION,
        "file": "model.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "dtype": "float32",
        "params": 52,
        "macs": 1000,
        "model_args": {},
        "dataset": "cifar10",
        "num_classes": 2,
        "classes": ("left", "right"),
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "metrics": Metrics(top1_percent=50.0, top5_percent=100.0, nll=0.7, ece=0.0),
        "recipe": name,
        "teacher": None,
        "seed": 0,
        "epochs": 1,
        "hardware": "none",
        "train_minutes": 0.0,
        "library_versions": {},
        "licence": "Apache-2.0",
    }
    return WeightEntry(**(made_up | facts))


def damaged(data: bytes) -> bytes:
    """The same size, one bit different."""
    return data[:-1] + bytes([data[-1] ^ 1])


class Bomb:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)
