"""A directory of verified weights for machines without network: `DIR/<name>/<file>`, as `CONAM_ZOO_MIRROR` wants it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from .errors import WeightsError, WrongWeightsError, in_brief
from .manifest import WeightEntry
from .resolve import find_verified
from .shards import Described
from .verify import examine, examine_copy


def fill_mirror(
    entry: WeightEntry, directory: Path, *, cache_dir: str | Path | None = None, namespace: str | None = None
) -> tuple[Path, bool]:
    """Put a verified copy of `entry` into a mirror, unless a good one is there.

    A wrong copy is replaced. The copy appears under its name only when it is whole and verified.

    Args:
        entry: What to copy.
        directory: The mirror; it is made if need be.
        cache_dir: The Hub cache to use instead of the default one.
        namespace: The manifest's `hub_namespace`.

    Returns:
        The path of the copy, and whether it was written now.

    Raises:
        WeightsError: There is no verified copy to be had, or the directory cannot be written.
    """
    path = _place(entry, directory)
    _, parts = examine_copy("mirror", path, entry)
    if parts is not None and not any(part.path.is_symlink() for part in parts):
        return path, False
    # The index last: a mirror is whole when its copy appears by name.
    for described, source in reversed(find_verified(entry, cache_dir=cache_dir, namespace=namespace).files):
        _copy(described, source, path.with_name(described.file), directory)
    return path, True


def _copy(described: Described, source: Path, path: Path, directory: Path) -> None:
    """Put one file into its place, verified again where it lies, unless a good one is there."""
    if examine("mirror", path, described)[0].status == "good" and not path.is_symlink():
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as copy, source.open("rb") as file:
            shutil.copyfileobj(file, copy)
        found = examine("mirror", temporary, described)[0]
        if found.status != "good":
            raise WrongWeightsError(f"{found.detail}; {source} was changed meanwhile, so run the command again.")
        temporary.chmod(0o644)  # mkstemp made it private, and a mirror is for others
        os.replace(temporary, path)
    except OSError as error:
        raise WeightsError(
            f"The mirror {directory} cannot be written ({in_brief(error)}): choose a directory with space and rights."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _place(entry: WeightEntry, directory: Path) -> Path:
    """Where a mirror has its copy; refuses one that a link leads out of it."""
    folder = directory / entry.name
    if folder.is_symlink():
        raise WeightsError(
            f"{folder} is a symbolic link, and a mirror is not written through links: put a directory in its place."
        )
    return folder / entry.file
