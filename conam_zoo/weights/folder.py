"""Weights in a folder of timm's Hub layout: a local one, or a Hub repository that the caller names.

What such a folder promises of itself is checked: if its `config.json` states the SHA-256 of `model.safetensors`, as
the folders that this package writes do, the file has to have it. Weights in several files have an index, which
`config.json` names as `weights_file`, and which states the SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .client import ask_hub, download
from .errors import HubError, WeightsError, WrongWeightsError, in_brief
from .manifest import FILE_PATTERN, REVISION_PATTERN
from .redact import redact, tells_secrets
from .shards import Shard, is_index, read_index
from .verify import examine, examine_copy, parse_parts

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a local folder: `model.safetensors`, or the file or index that its config.json names.

    Raises:
        WrongWeightsError: The weights are not those whose hash the folder's config.json states.
        WeightsError: A file is absent, unreadable, or not what its name says.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated, path = config.get("sha256"), folder / weights_file(config, folder)
        data = path.read_bytes()
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{folder} has no readable {WEIGHTS_FILE} and config.json ({error}): check the path."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if stated is not None and found != stated:
        raise WrongWeightsError(
            f"{path} is not the file that its config.json describes, expected SHA-256 {stated}, found {found}: "
            "copy the folder again."
        )
    copy, parts = examine_copy("mirror", path, Shard(path.name, found, len(data)))
    if parts is None:
        raise WrongWeightsError(f"{copy.detail}: copy the folder again.")
    return parse_parts(parts)


def weights_file(config: Mapping[str, Any], folder: Path | str) -> str:
    """The name of the file with the weights, or of their index, in a folder with this config.json.

    Raises:
        WeightsError: It is no name of such a file.
    """
    name = config.get("weights_file", WEIGHTS_FILE)
    if not isinstance(name, str) or re.fullmatch(FILE_PATTERN, name) is None:
        raise WeightsError(f"The config.json of {folder} names the weights {name!r}, which is no safetensors file.")
    return name


def read_hub_folder(hub_id: str, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Read the weights of a Hub repository that the caller names, `owner/name` or `owner/name@revision`.

    A copy in the cache that is not what its config.json says is fetched once more.

    Raises:
        WrongWeightsError: The weights are not those whose hash the repository's config.json states.
        WeightsError: The repository or a file of it cannot be had.
    """
    config = fetch_config(hub_id, cache_dir)
    # The commit that the config came from: a branch may have moved on since.
    pinned = f"{hub_id.partition('@')[0]}@{config.parent.name}"
    try:
        file = weights_file(json.loads(config.read_text(encoding="utf-8")), redact(hub_id))
    except (ValueError, AttributeError) as error:
        raise WeightsError(
            f"The config.json of {redact(hub_id)} is not one ({in_brief(error)}): look there."
        ) from error
    try:
        return read_folder(_fetch_weights(pinned, file, cache_dir).parent)
    except WrongWeightsError:
        return read_folder(_fetch_weights(pinned, file, cache_dir, afresh=True).parent)


def _fetch_weights(hub_id: str, file: str, cache_dir: str | Path | None, *, afresh: bool = False) -> Path:
    """The file with the weights, or their index with the files that it names beside it, in the cache."""
    path = _fetch_anew(hub_id, file, cache_dir) if afresh else _fetch(hub_id, file, cache_dir)
    if is_index(file):
        for shard in read_index(path.read_bytes(), path).shards:
            place = path.with_name(shard.file)
            if afresh and examine("cache", place, shard)[0].status != "good":
                _fetch_anew(hub_id, shard.file, cache_dir)
            else:
                _fetch(hub_id, shard.file, cache_dir)
    return path


def _fetch_anew(hub_id: str, file: str, cache_dir: str | Path | None) -> Path:
    path = _fetch(hub_id, file, cache_dir)
    if not path.is_symlink():
        path.unlink(missing_ok=True)  # a forced download would leave a file of its own as it is
    return _fetch(hub_id, file, cache_dir, afresh=True)


def fetch_config(hub_id: str, cache_dir: str | Path | None = None) -> Path:
    """The config.json of a Hub repository, in the cache.

    Raises:
        WeightsError: It cannot be had.
    """
    return _fetch(hub_id, "config.json", cache_dir)


def _fetch(hub_id: str, file: str, cache_dir: str | Path | None, *, afresh: bool = False) -> Path:
    """A file of a repository: from the cache if the revision is a commit, or the Hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = hub_id.partition("@")
    cached = None
    try:
        if not afresh:
            cached = try_to_load_from_cache(repository, file, cache_dir=cache_dir, revision=revision or None)
        if isinstance(cached, str) and re.fullmatch(REVISION_PATTERN, revision):
            return Path(cached)
        size_bytes = ask_hub(repository, file, revision or None).size or 0
        return download(repository, file, revision or None, cache_dir, size_bytes=size_bytes, afresh=afresh)
    except (HubError, OSError, ValueError) as error:
        if isinstance(cached, str):
            return Path(cached)
        reason = str(error) if isinstance(error, HubError) else in_brief(error)
        raise WeightsError(
            f"The Hub repository {redact(hub_id)} could not be read ({redact(reason)}): check its name and the network."
        ) from (None if tells_secrets(error) else error)
