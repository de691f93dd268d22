"""One weight file: its bytes are read once, compared with the manifest, and only then parsed.

What was checked is what is used, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import WeightsError, WrongWeightsError, in_brief
from .manifest import WeightEntry

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


def read_verified(path: Path, entry: WeightEntry) -> dict[str, Tensor]:
    """Read a weight file, provided that it is the one `entry` describes.

    Raises:
        WrongWeightsError: Its size or SHA-256 differ from the manifest; nothing of it was parsed.
        WeightsError: It is absent, unreadable, or no safetensors file.
    """
    found, data = examine("mirror", path, entry)
    if found.status == "missing":
        raise WeightsError(f"{found.detail}; give the path of the {entry.file} of {entry.name}.")
    if data is None:
        raise WrongWeightsError(f"{found.detail}; replace it by the published {entry.file} of {entry.name}.")
    return parse_safetensors(data, path)


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


def examine(place: Source, path: Path, entry: WeightEntry) -> tuple[CopyStatus, bytes | None]:
    """Compare a file with the manifest; its bytes come along if, and only if, they are the right ones."""
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
