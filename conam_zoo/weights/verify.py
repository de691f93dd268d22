"""Weight files: their bytes are read once, compared with their description, and only then parsed.

What was checked is what is used, and nothing is ever unpickled. Weights may be several files, the shards, in the layout
of huggingface_hub's ``save_torch_state_dict``: ``model.safetensors.index.json`` maps every tensor to its file. The
metadata of our indices state size and SHA-256 of each file too, so that whoever has verified the index can verify
everything by it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conam_zoo.weights.errors import WeightsError, WrongWeightsError, in_brief
from conam_zoo.weights.manifest import FILE_PATTERN, SHA256_PATTERN, WeightEntry

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
LARGEST_WEIGHTS_BYTES = 2 << 30  # the largest net of the zoo has 0.15 GB
LARGEST_TEXT_BYTES = 4 << 20  # of a config.json or an index

Source = Literal["mirror", "checkout", "cache", "hub"]

_LARGEST_HEADER_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Shard:
    """One file out of several that hold the tensors of a model."""

    file: str
    sha256: str
    size_bytes: int


Described = WeightEntry | Shard  # a file of which name, SHA-256 and size are known


@dataclass(frozen=True)
class Part:
    """A file that was read and found to be the one described."""

    described: Described
    path: Path
    data: bytes


@dataclass(frozen=True)
class CopyStatus:
    """What was found at one place; ``path`` is None where there is no such place or it holds no copy."""

    place: Source
    path: Path | None
    status: Literal["good", "wrong", "missing"]
    detail: str
    parts: tuple[Part, ...] = field(default=(), repr=False)  # what was read, if and only if everything is good


def read_file(path: Path, largest_bytes: int) -> bytes:
    """The bytes of a regular file; ``OSError`` if it is none, is larger than that, or cannot be read."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError(f"{path.name} is not a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= largest_bytes else b""
    if max(size, len(data)) > largest_bytes:
        raise OSError(f"{path.name} has more than {largest_bytes} bytes")
    return data


def read_verified(path: Path, entry: WeightEntry) -> dict[str, "Tensor"]:
    """Read a weight file, or an index and the files beside it, provided that they are those ``entry`` describes.

    Raises:
        WrongWeightsError: Size or SHA-256 differ from the manifest; nothing was parsed.
        WeightsError: It is absent, unreadable, or not a safetensors file.
    """
    return parse_parts(read_parts(path, entry))


def read_parts(path: Path, entry: WeightEntry) -> tuple[Part, ...]:
    """The verified bytes of a weight file, or of an index and the files beside it; raises as ``read_verified``."""
    found = examine_copy("mirror", path, entry)
    if found.status == "missing":
        raise WeightsError(f"{found.detail}; give the path of the {entry.file} of {entry.name}.")
    if not found.parts:
        raise WrongWeightsError(f"{found.detail}; restore the published {entry.name}: {files_of(entry)}.")
    return found.parts


def read_safetensors(path: Path) -> dict[str, "Tensor"]:
    """Read a safetensors file of the caller's own, of which no manifest knows; ``WeightsError`` if it is none."""
    if path.suffix.lower() != ".safetensors":
        raise WeightsError(
            f"{path} is not read because its name does not end in .safetensors; "
            "convert other formats with safetensors.torch.save_file first."
        )
    try:
        data = read_file(path, LARGEST_WEIGHTS_BYTES)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({in_brief(error)}); check the path.") from error
    return parse_safetensors(data, path)


def examine_copy(place: Source, path: Path, described: Described) -> CopyStatus:
    """Compare a file, or an index and then the files beside it, with its description: the first that is not good.

    An index that is the one described, and is none, is a ``WeightsError``.
    """
    found = examine(place, path, described)
    return with_shards(found) if found.parts else found


def with_shards(found: CopyStatus) -> CopyStatus:
    """A good file; if it is an index, with the files beside it that it names, or the first of them that is not good."""
    (first,) = parts = found.parts
    if is_index(first.described.file):
        for shard in read_index(first.data, first.path)[0]:
            beside = examine(found.place, first.path.with_name(shard.file), shard)
            if not beside.parts:  # an interrupted download leaves a part in the cache, and is finished from there
                return beside if found.place == "cache" else replace(beside, status="wrong")
            parts += beside.parts
    return replace(found, parts=parts)


def examine(place: Source, path: Path, described: Described) -> CopyStatus:
    """Compare one file with its description."""
    try:
        if not path.exists():
            return CopyStatus(place, path, "missing", f"{path} does not exist")
        if not path.is_file():  # opening a pipe would wait for ever
            return CopyStatus(place, path, "wrong", f"{path} is not a file")
        with path.open("rb") as file:
            # One byte more than the right file has, if there are so many: a wrong one is hashed without being held in
            # memory, and no size in a manifest is allocated.
            size_there = os.fstat(file.fileno()).st_size
            if size_there > LARGEST_WEIGHTS_BYTES:
                return CopyStatus(place, path, "wrong", f"{path} has {size_there} bytes, more than any weights")
            data = file.read(described.size_bytes + 1) if size_there == described.size_bytes else b""
            digest, size = hashlib.sha256(data), len(data)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        return CopyStatus(place, path, "wrong", f"{path} cannot be read ({in_brief(error)})")
    if size != described.size_bytes or digest.hexdigest() != described.sha256:
        expected = f"expected SHA-256 {described.sha256} of {described.size_bytes} bytes"
        found = f"found {digest.hexdigest()} of {size} bytes"
        return CopyStatus(place, path, "wrong", f"{path} is not the published file, {expected}, {found}")
    return CopyStatus(place, path, "good", f"{path} is the published file", (Part(described, path, data),))


def parse_parts(parts: Sequence[Part]) -> dict[str, "Tensor"]:
    """The tensors of a verified copy; ``WeightsError`` if it is damaged, or an index says otherwise than its files."""
    first, *shards = parts
    if not is_index(first.described.file):
        return parse_safetensors(first.data, first.path)
    weight_map = read_index(first.data, first.path)[1]
    tensors: dict[str, Tensor] = {}
    for part in shards:
        held, file = parse_safetensors(part.data, part.path), part.described.file
        stated = {name for name, place in weight_map.items() if place == file}
        if stated != held.keys():
            name = min(stated ^ held.keys())
            raise WeightsError(f"{first.path} and {file} disagree about the tensor {name}; write the weights again.")
        tensors |= held
    return tensors


def parse_safetensors(data: bytes, path: Path) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file; ``WeightsError`` if it is none, or ``check_values`` refuses them."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    # A safetensors file opens with the length of its JSON header, 8 bytes, little-endian. Looking at it here
    # turns away pickles, archives and truncated files in words that a user can act on.
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(len(data) - 8, _LARGEST_HEADER_BYTES) or data[8:9] != b"{":
        raise WeightsError(
            f"{path} is not a safetensors file despite its name, and other formats are not read: write one with "
            "safetensors.torch.save_file."
        )
    try:
        header = json.loads(data[8 : 8 + header_bytes], object_pairs_hook=_without_duplicates)
        for name, facts in header.items():
            count = name.endswith("num_batches_tracked")
            if name != "__metadata__" and facts["dtype"] not in (*_FLOATS, *(("I64",) if count else ())):
                raise ValueError(f"its tensor {name} has type {facts['dtype']}, and weights are floating point")
        tensors = load(data)
        check_values(tensors)
    except (
        SafetensorError, AssertionError, AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise WeightsError(
            f"{path} is a damaged safetensors file ({in_brief(error)}); write it again with "
            "safetensors.torch.save_file."
        ) from error
    return tensors


def check_values(tensors: Mapping[str, "Tensor"]) -> None:
    """Refuse (``ValueError``) what no training ends in: NaN, infinity, a variance below zero, a type not a float."""
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not hasattr(tensor, "is_floating_point"):
            raise ValueError(f"its entry {name} is no tensor")
        if not tensor.is_floating_point():
            raise ValueError(f"its tensor {name} has type {tensor.dtype}, and weights are floating point")
        if not tensor.isfinite().all():
            raise ValueError(f"its tensor {name} holds NaN or infinity")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"its tensor {name} holds a variance below zero")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header names {max(names, key=names.count)} twice")
    return found


# --- indices --------------------------------------------------------------------------------------------------


def is_index(file: str) -> bool:
    """Whether a file name is that of an index."""
    return file.endswith(INDEX_SUFFIX)


def files_of(entry: WeightEntry) -> str:
    """The files of some weights, in words."""
    return f"{entry.file} and the files that it names" if is_index(entry.file) else entry.file


def bytes_of(path: Path) -> int:
    """Bytes of a weight file, or of an index and the files that it names."""
    shards = read_index(path.read_bytes(), path)[0] if is_index(path.name) else ()
    return path.stat().st_size + sum(shard.size_bytes for shard in shards)


def make_index(weight_map: Mapping[str, str], shards: tuple[Shard, ...]) -> str:
    """The text of an index file."""
    facts = {shard.file: {"sha256": shard.sha256, "size_bytes": shard.size_bytes} for shard in shards}
    total = sum(shard.size_bytes for shard in shards)
    document = {"metadata": {"total_size": total, "shards": facts}, "weight_map": dict(weight_map)}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def read_index(data: bytes, path: Path) -> tuple[tuple[Shard, ...], dict[str, str]]:
    """The shards that an index names, and the file of each tensor; ``WeightsError`` if it does not state them whole."""
    try:
        document = json.loads(data)
        weight_map, facts = document["weight_map"], document["metadata"]["shards"]
        shards = tuple(Shard(file, facts[file]["sha256"], facts[file]["size_bytes"]) for file in sorted(facts))
        good = (
            len(shards) > 0
            and set(weight_map.values()) == set(facts)
            and all(_is_good(shard) for shard in shards)
            and sum(shard.size_bytes for shard in shards) <= LARGEST_WEIGHTS_BYTES
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not an index of weights that states size and SHA-256 of each file ({type(error).__name__}); "
            "use weights that conam_zoo wrote, or join them into one safetensors file."
        ) from error
    if not good:
        raise WeightsError(f"{path} is an index of weights that contradicts itself; write the weights again.")
    return shards, weight_map


def _is_good(shard: Shard) -> bool:
    return (
        re.fullmatch(FILE_PATTERN, shard.file) is not None
        and not is_index(shard.file)
        and re.fullmatch(SHA256_PATTERN, shard.sha256) is not None
        and type(shard.size_bytes) is int
        and shard.size_bytes > 0
    )
