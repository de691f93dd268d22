"""Weight files: their bytes are read once, compared with the manifest, and only then parsed.

What was checked is what is used, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import WeightsError, WrongWeightsError, in_brief
from .manifest import WeightEntry
from .shards import Described, is_index, read_index

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["mirror", "checkout", "cache", "hub"]

_LARGEST_HEADER_BYTES = 100_000_000  # the bound that safetensors itself sets
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class CopyStatus:
    """What was found at one place; `path` is None where there is no such place or it holds no copy."""

    place: Source
    path: Path | None
    status: Literal["good", "wrong", "missing"]
    detail: str


@dataclass(frozen=True)
class Part:
    """A file that was read and found to be the one described."""

    described: Described
    path: Path
    data: bytes


def read_verified(path: Path, entry: WeightEntry) -> dict[str, Tensor]:
    """Read a weight file, or an index and the files beside it, provided that they are those `entry` describes.

    Raises:
        WrongWeightsError: Its size or SHA-256 differ from the manifest; nothing of it was parsed.
        WeightsError: It is absent, unreadable, or no safetensors file.
    """
    found, parts = examine_copy("mirror", path, entry)
    if found.status == "missing":
        raise WeightsError(f"{found.detail}; give the path of the {entry.file} of {entry.name}.")
    if parts is None:
        raise WrongWeightsError(f"{found.detail}; replace it by the published {entry.file} of {entry.name}.")
    return parse_parts(parts)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of the caller's own, of which no manifest knows.

    Raises:
        WeightsError: It is absent, unreadable, or anything else than a safetensors file.
    """
    if path.suffix.lower() != ".safetensors":
        raise WeightsError(
            f"{path} is not read because its name does not end in .safetensors; "
            "convert other formats with safetensors.torch.save_file first."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({in_brief(error)}); check the path.") from error
    return parse_safetensors(data, path)


def examine_copy(place: Source, path: Path, described: Described) -> tuple[CopyStatus, tuple[Part, ...] | None]:
    """Compare a copy with its description: a file, or an index and then the files beside it that it names.

    Returns:
        What was found, of the first file that is not right if there is one; and all that was read if, and only if,
        everything is right.

    Raises:
        WeightsError: The index is the one described, and is none.
    """
    found, data = examine(place, path, described)
    if data is None:
        return found, None
    parts = [Part(described, path, data)]
    if is_index(described.file):
        for shard in read_index(data, path).shards:
            part, data = examine(place, path.with_name(shard.file), shard)
            if data is None:
                return part, None
            parts.append(Part(shard, path.with_name(shard.file), data))
    return found, tuple(parts)


def parse_parts(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of a verified copy, as `examine_copy` gives it.

    Raises:
        WeightsError: It is damaged, or the files are not those of the index.
    """
    first, *shards = parts
    if not is_index(first.described.file):
        return parse_safetensors(first.data, first.path)
    tensors = {part.described.file: parse_safetensors(part.data, part.path) for part in shards}
    return read_index(first.data, first.path).join(tensors, first.path)


def examine(place: Source, path: Path, entry: Described) -> tuple[CopyStatus, bytes | None]:
    """Compare one file with its description; its bytes come along if, and only if, they are the right ones."""
    try:
        if not path.exists():
            return CopyStatus(place, path, "missing", f"{path} does not exist"), None
        if not path.is_file():  # opening a pipe would wait for ever
            return CopyStatus(place, path, "wrong", f"{path} is not a file"), None
        with path.open("rb") as file:
            # One byte more than the right file has: a huge wrong one is hashed without being held in memory.
            data = file.read(entry.size_bytes + 1)
            digest, size = hashlib.sha256(data), len(data)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        return CopyStatus(place, path, "wrong", f"{path} cannot be read ({in_brief(error)})"), None
    if size != entry.size_bytes or digest.hexdigest() != entry.sha256:
        detail = (
            f"{path} is not the published file, expected SHA-256 {entry.sha256} of {entry.size_bytes} bytes, "
            f"found {digest.hexdigest()} of {size} bytes"
        )
        return CopyStatus(place, path, "wrong", detail), None
    return CopyStatus(place, path, "good", f"{path} is the published file"), data


def parse_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    # A safetensors file opens with the length of its JSON header, 8 bytes, little-endian. Looking at it here
    # turns away pickles, archives and truncated files in words that a user can act on.
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(len(data) - 8, _LARGEST_HEADER_BYTES) or data[8:9] != b"{":
        raise WeightsError(
            f"{path} is not a safetensors file, whatever its name says; it is not read as anything else, so "
            "write one with safetensors.torch.save_file."
        )
    try:
        return load(data)
    except (SafetensorError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is a damaged safetensors file ({in_brief(error)}); write it again with "
            "safetensors.torch.save_file."
        ) from error
