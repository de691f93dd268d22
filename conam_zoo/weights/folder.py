"""Weights in a folder of timm's Hub layout: a local one, or a Hub repository that the caller names.

What such a folder promises of itself is checked: if its `config.json` states the SHA-256 of `model.safetensors`, as
the folders that this package writes do, the file has to have it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .hub import WeightsError, WrongWeightsError, _parse

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a local folder.

    Raises:
        WrongWeightsError: The weights are not those whose hash the folder's config.json states.
        WeightsError: A file is absent, unreadable, or not what its name says.
    """
    path, config_path = folder / WEIGHTS_FILE, folder / "config.json"
    try:
        data = path.read_bytes()
        stated = json.loads(config_path.read_text(encoding="utf-8")).get("sha256")
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
    return _parse(data, path)


def read_hub_folder(hub_id: str, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """Read the weights of a Hub repository that the caller names, `owner/name` or `owner/name@revision`.

    Raises:
        WrongWeightsError: The weights are not those whose hash the repository's config.json states.
        WeightsError: The repository or a file of it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = hub_id.partition("@")
    try:
        paths = [
            Path(hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir, etag_timeout=5))
            for name in ("config.json", WEIGHTS_FILE)
        ]
    except Exception as error:  # the client, its HTTP library and its transport have no common base
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"The Hub repository {hub_id} could not be read ({reason}): check its name and the network."
        ) from error
    return read_folder(paths[0].parent)
