"""Weights in a folder of timm's Hub layout: a local one, or a Hub repository that the caller names.

What such a folder promises of itself is checked: the SHA-256 that its ``config.json`` states, as those that this
package writes do, and that of each file of an index, which ``config.json`` names as ``weights_file``. A file in the Hub
cache has to have the hash that the Hub announced, which a cache of symbolic links keeps as the name of the file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conam_zoo.weights.client import ask_hub, cached_file, download, is_intact
from conam_zoo.weights.credentials import redact, tells_secrets
from conam_zoo.weights.errors import HubError, WeightsError, WrongWeightsError, expand_home, in_brief
from conam_zoo.weights.manifest import FILE_PATTERN, REVISION_PATTERN, no_constant
from conam_zoo.weights.verify import (
    LARGEST_TEXT_BYTES,
    LARGEST_WEIGHTS_BYTES,
    CopyStatus,
    Part,
    Shard,
    is_index,
    parse_parts,
    read_file,
    read_index,
    with_shards,
)

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """The content of a ``config.json``; ``WeightsError`` if it is none."""
    try:
        config = json.loads(read_file(path, LARGEST_TEXT_BYTES).decode("utf-8"), parse_constant=no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not a readable config.json ({in_brief(error)}): check the path.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds no JSON object: copy the folder again.")
    return config


def read_folder(folder: Path) -> dict[str, "Tensor"]:
    """Read the weights of a local folder: ``model.safetensors``, or the file or index that its config.json names.

    They have to be those whose hash the config.json states; else it is a ``WrongWeightsError``.
    """
    folder = expand_home(folder)
    config = read_config(folder / "config.json")
    stated, path = config.get("sha256"), folder / weights_file(config, folder)
    try:
        data = read_file(path, LARGEST_WEIGHTS_BYTES)
    except OSError as error:
        remedy = "check the path"
        if path.name == WEIGHTS_FILE and (folder / "pytorch_model.bin").exists():
            remedy = "pickled weights are not read, so save the model with safe_serialization=True"
        raise WeightsError(f"{folder} has no readable {path.name} ({in_brief(error)}): {remedy}.") from error
    found = hashlib.sha256(data).hexdigest()
    if stated is not None and found != stated:
        raise WrongWeightsError(
            f"{path} is not the file that its config.json describes, expected SHA-256 {stated}, found {found}: "
            "copy the folder again."
        )
    first = Part(Shard(path.name, found, len(data)), path, data)
    copy = with_shards(CopyStatus("mirror", path, "good", "", (first,)))
    if not copy.parts:
        raise WrongWeightsError(f"{copy.detail}: copy the folder again.")
    return parse_parts(copy.parts)


def weights_file(config: Mapping[str, Any], folder: Path | str) -> str:
    """The name of the file with the weights, or of their index, in a folder with this config.json."""
    name = config.get("weights_file", WEIGHTS_FILE)
    if not isinstance(name, str) or re.fullmatch(FILE_PATTERN, name) is None:
        raise WeightsError(f"The config.json of {folder} names the weights {name!r}, which is no safetensors file.")
    return name


def read_hub_folder(hub_id: str, cache_dir: str | Path | None = None) -> dict[str, "Tensor"]:
    """Read the weights of a Hub repository that the caller names, ``owner/name`` or ``owner/name@revision``.

    A copy in the cache that is not what the Hub announced, or not what its config.json says, is fetched once more.
    """
    config = fetch_config(hub_id, cache_dir)
    pinned = at_commit_of(config, hub_id)
    file = weights_file(read_config(config), redact(hub_id))
    path = _fetch(pinned, file, cache_dir)
    if is_index(file):
        for shard in read_index(read_file(path, LARGEST_TEXT_BYTES), path)[0]:
            _fetch(pinned, shard.file, cache_dir, shard)
    try:
        return read_folder(path.parent)
    except WrongWeightsError:
        # Without symbolic links no blob tells the hash of a cached file; the Hub does.
        _fetch(pinned, file, cache_dir, afresh=True)
        return read_folder(path.parent)


def at_commit_of(config: Path, hub_id: str) -> str:
    """A repository at the commit that a fetched config.json is of: a branch may have moved on since."""
    return f"{hub_id.partition('@')[0]}@{config.parent.name}"


def fetch_config(hub_id: str, cache_dir: str | Path | None = None) -> Path:
    """The config.json of a Hub repository, in the cache; ``WeightsError`` if it cannot be had."""
    return _fetch(hub_id, "config.json", cache_dir)


def _fetch(
    hub_id: str, file: str, cache_dir: str | Path | None, shard: Shard | None = None, *, afresh: bool = False
) -> Path:
    """A file of a repository: from the cache if the revision is a commit, or the Hub does not answer."""
    repository, _, revision = hub_id.partition("@")
    cached = None
    largest = LARGEST_WEIGHTS_BYTES if file.endswith(".safetensors") else LARGEST_TEXT_BYTES
    limit = shard.size_bytes if shard else largest
    try:
        cached = cached_file(repository, file, revision or None, cache_dir)
        if cached is not None and is_intact(cached) is False:
            cached = None
        if cached is not None and shard is not None and not cached.is_symlink():  # else its name is its hash
            cached = cached if hashlib.sha256(cached.read_bytes()).hexdigest() == shard.sha256 else None
        if cached is not None and re.fullmatch(REVISION_PATTERN, revision) and not afresh:
            return cached
        announced = ask_hub(repository, file, revision or None)
        return download(announced, cache_dir, limit_bytes=limit, sha256=shard.sha256 if shard else None)
    except (HubError, OSError, ValueError) as error:
        if cached is not None and not afresh:
            return cached
        reason = str(error) if isinstance(error, HubError) else in_brief(error)
        raise WeightsError(
            f"The Hub repository {redact(hub_id)} could not be read ({redact(reason)}): check its name and the network."
        ) from (None if tells_secrets(error) else error)
