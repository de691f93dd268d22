"""Weights in several files: an index names them, each with its size and SHA-256.

The layout is that of huggingface_hub's `save_torch_state_dict`: `model.safetensors.index.json` maps every tensor to its
file. The metadata of our indices state size and SHA-256 of each file too, so that whoever has verified the index can
verify everything by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import WeightsError
from .manifest import FILE_PATTERN, SHA256_PATTERN

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"


class Described(Protocol):
    """A file of which name, SHA-256 and size are known."""

    @property
    def file(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """One file out of several that hold the tensors of a model."""

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Index:
    """Which tensor is in which file."""

    shards: tuple[Shard, ...]
    weight_map: Mapping[str, str]  # tensor -> file

    def join(self, tensors: Mapping[str, Mapping[str, Tensor]], path: Path) -> dict[str, Tensor]:
        """One state dict from the tensors of each file.

        Raises:
            WeightsError: A file holds other tensors than the index, which is at `path`, says.
        """
        for file, held in tensors.items():
            stated = {name for name, place in self.weight_map.items() if place == file}
            if stated != held.keys():
                name = min(stated ^ held.keys())
                raise WeightsError(f"{path} and {file} disagree about the tensor {name}; write the weights again.")
        return {name: tensors[file][name] for name, file in self.weight_map.items()}


def is_index(file: str) -> bool:
    """Whether a file name is that of an index."""
    return file.endswith(INDEX_SUFFIX)


def make_index(weight_map: Mapping[str, str], shards: tuple[Shard, ...]) -> str:
    """The text of an index file."""
    facts = {shard.file: {"sha256": shard.sha256, "size_bytes": shard.size_bytes} for shard in shards}
    total = sum(shard.size_bytes for shard in shards)
    document = {"metadata": {"total_size": total, "shards": facts}, "weight_map": dict(weight_map)}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def read_index(data: bytes, path: Path) -> Index:
    """Read an index file.

    Raises:
        WeightsError: It is none, or does not state size and SHA-256 of its files.
    """
    try:
        document = json.loads(data)
        weight_map, facts = document["weight_map"], document["metadata"]["shards"]
        shards = tuple(Shard(file, facts[file]["sha256"], facts[file]["size_bytes"]) for file in sorted(facts))
        good = (
            len(shards) > 0
            and all(isinstance(name, str) for name in weight_map)
            and set(weight_map.values()) == set(facts)
            and all(_is_good(shard) for shard in shards)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not an index of weights that states size and SHA-256 of each file ({type(error).__name__}); "
            "use weights that conam_zoo wrote, or join them into one safetensors file."
        ) from error
    if not good:
        raise WeightsError(f"{path} is an index of weights that contradicts itself; write the weights again.")
    return Index(shards, weight_map)


def _is_good(shard: Shard) -> bool:
    return (
        re.fullmatch(FILE_PATTERN, shard.file) is not None
        and not is_index(shard.file)
        and isinstance(shard.sha256, str)
        and re.fullmatch(SHA256_PATTERN, shard.sha256) is not None
        and type(shard.size_bytes) is int
        and shard.size_bytes > 0
    )
