"""From a manifest entry to a verified state dict.

Four places are asked in turn: a mirror directory of the user's, the checkout, the Hub cache, the Hub. A copy counts
only if its bytes are those that the manifest describes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .client import ask_hub, cache_folder, download
from .errors import HubError, WeightsError, WrongWeightsError, in_brief
from .manifest import WeightEntry, find_checkout
from .redact import tells_secrets
from .verified_file import CopyStatus, Source, examine, parse_safetensors

if TYPE_CHECKING:
    from torch import Tensor

MIRROR_VARIABLE = "CONAM_ZOO_MIRROR"

_logger = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class VerifiedWeights:
    """A state dict whose bytes were compared with the manifest, and where they came from."""

    path: Path
    source: Source
    state_dict: dict[str, Tensor]


def find_verified(
    entry: WeightEntry, *, cache_dir: str | Path | None = None, namespace: str | None = None
) -> VerifiedWeights:
    """Find the file of `entry`, download it if need be, and read it once verified.

    In this order: `$CONAM_ZOO_MIRROR/<name>/<file>`; `weights/<name>/<file>` of the checkout; the Hub cache;
    the Hub, at the pinned revision. A wrong copy in the first two is passed over with a warning; a wrong one
    in the cache or from the Hub is fetched once more and then refused. `HF_ENDPOINT`, `HF_HOME`,
    `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and the user's token are honoured. A Hub that does not answer, or stalls, is
    given up within ten seconds; for a file above 1 MB a stall is borne as long as 100 kB/s would need for the next
    10 MiB.

    Args:
        entry: What to find.
        cache_dir: The Hub cache to use instead of the default one.
        namespace: The manifest's `hub_namespace`. None: not published; neither Hub nor cache is asked.

    Raises:
        WrongWeightsError: The Hub itself offers another file than the manifest describes.
        WeightsError: No verified copy was found; the message says what was tried, and what to do.
    """
    tried: list[str] = []
    for found, data in _examine_places(entry, cache_dir, namespace):
        if data is not None and found.path is not None:
            return VerifiedWeights(found.path, found.place, parse_safetensors(data, found.path))
        if found.status == "wrong":
            _logger.warning("A copy of %s is not used: %s.", entry.name, found.detail)
        tried.append(found.detail)
    if namespace is None or entry.revision is None:
        raise WeightsError(_nothing_found(entry, tried, ""))
    try:
        return _fetch(entry, entry.hub_id(namespace), entry.revision, cache_dir)
    except HubError as failure:
        # A traceback shows the cause as well.
        cause = None if tells_secrets(failure.__cause__) else failure.__cause__
        raise WeightsError(_nothing_found(entry, [*tried, str(failure)], "go online, ")) from cause


def check_copies(
    entry: WeightEntry,
    *,
    cache_dir: str | Path | None = None,
    namespace: str | None = None,
    mirror: Path | None = None,
) -> list[CopyStatus]:
    """Compare each local copy of `entry` with the manifest: mirror, checkout, Hub cache; no network.

    Args:
        entry: What to check.
        cache_dir: The Hub cache to look into instead of the default one.
        namespace: The manifest's `hub_namespace`.
        mirror: The mirror to look into instead of the one in `CONAM_ZOO_MIRROR`.
    """
    return [found for found, _ in _examine_places(entry, cache_dir, namespace, mirror)]


def _nothing_found(entry: WeightEntry, tried: list[str], online: str) -> str:
    return (
        f"No verified copy of {entry.name} was found ({'; '.join(tried)}): set {MIRROR_VARIABLE} to a "
        f"directory that holds {entry.name}/{entry.file}, {online}or use pretrained=False."
    )


def _examine_places(
    entry: WeightEntry, cache_dir: str | Path | None, namespace: str | None, mirror: Path | None = None
) -> Iterator[tuple[CopyStatus, bytes | None]]:
    """Mirror, checkout and cache, each looked at only when its turn comes."""
    set_mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror is None and set_mirror:
        mirror = Path(set_mirror).expanduser()
    if mirror is not None:
        yield examine("mirror", mirror / entry.name / entry.file, entry)
    else:
        yield CopyStatus("mirror", None, "missing", f"{MIRROR_VARIABLE} is not set"), None

    checkout = find_checkout()
    if checkout is not None:
        yield examine("checkout", checkout / "weights" / entry.name / entry.file, entry)
    else:
        yield CopyStatus("checkout", None, "missing", "conam_zoo does not run from a checkout"), None

    if namespace is None or entry.revision is None:
        detail = "these weights are not published on the Hub yet"
        yield CopyStatus("cache", None, "missing", detail), None
    else:
        yield _examine_cache(entry, entry.hub_id(namespace), entry.revision, cache_dir)


def _examine_cache(
    entry: WeightEntry, hub_id: str, revision: str, cache_dir: str | Path | None
) -> tuple[CopyStatus, bytes | None]:
    from huggingface_hub import try_to_load_from_cache

    folder = cache_folder(cache_dir)
    try:
        path = try_to_load_from_cache(hub_id, entry.file, cache_dir=folder, revision=revision)
    except OSError as error:
        detail = f"the Hub cache {folder} cannot be read ({in_brief(error)})"
        return CopyStatus("cache", None, "missing", detail), None
    if not isinstance(path, str):  # None, or the mark of a file known not to exist
        detail = f"the Hub cache {folder} has no copy of it"
        return CopyStatus("cache", None, "missing", detail), None
    return examine("cache", Path(path), entry)


def _fetch(entry: WeightEntry, hub_id: str, revision: str, cache_dir: str | Path | None) -> VerifiedWeights:
    """Download into the cache and verify, a second time if the first download is wrong.

    Raises:
        WrongWeightsError: The Hub announces or delivers another file.
        HubError: The Hub delivers none.
    """
    # Before the lock: processes that start together each learn within the deadline that the Hub is away.
    _announced_is_right(entry, hub_id, revision)
    with _one_process_at_a_time(entry, cache_dir):
        # While this process waited for the lock, another may have brought the file.
        found, data = _examine_cache(entry, hub_id, revision, cache_dir)
        if data is not None and found.path is not None:
            return VerifiedWeights(found.path, "cache", parse_safetensors(data, found.path))
        wrong = found if found.status == "wrong" else None
        for afresh in (True,) if wrong else (False, True):
            if afresh and wrong is not None and wrong.path is not None:
                # A forced download renews the blob that the cached name points to; where the name is a file
                # of its own, as it is without symbolic links, it would leave that as it is.
                with contextlib.suppress(OSError):
                    wrong.path.unlink()
            path = download(hub_id, entry.file, revision, cache_dir, size_bytes=entry.size_bytes, afresh=afresh)
            found, data = examine("hub", path, entry)
            if data is not None:
                return VerifiedWeights(path, "hub", parse_safetensors(data, path))
            wrong = found
    raise WrongWeightsError(
        f"The Hub repository {hub_id} at {revision} delivered another file than the manifest describes, "
        f"also when asked again ({found.detail}): upgrade conam_zoo, report it, or use pretrained=False."
    )


def _announced_is_right(entry: WeightEntry, hub_id: str, revision: str) -> None:
    """Ask the Hub for the file's size and hash, briefly; refuse before downloading what cannot be right."""
    answer = ask_hub(hub_id, entry.file, revision)
    if answer.etag is None:
        raise HubError(f"what answered for {hub_id} is not a Hub (no ETag), so look for a proxy or login page")
    # The etag of a large file is its SHA-256, that of a small one a git hash, which says nothing here.
    announces_sha256 = len(answer.etag) == 64
    if (announces_sha256 and answer.etag != entry.sha256) or answer.size not in (None, entry.size_bytes):
        found = answer.etag if announces_sha256 else "an unknown one"
        raise WrongWeightsError(
            f"The Hub repository {hub_id} at {revision} offers another {entry.file} than the manifest "
            f"describes, expected SHA-256 {entry.sha256} of {entry.size_bytes} bytes, "
            f"found {found} of {answer.size} bytes: "
            "upgrade conam_zoo, report it, or use pretrained=False."
        )


@contextlib.contextmanager
def _one_process_at_a_time(entry: WeightEntry, cache_dir: str | Path | None) -> Iterator[None]:
    """Hold the lock on an entry, as far as one can be had.

    It spares bandwidth, and correctness does not hang on it: every process verifies the bytes it reads, and
    the Hub client renames whole files into place. So a cache that takes no lock (read-only, or a file system
    without locks) and one that stays locked for ten minutes are used without it.
    """
    from filelock import FileLock

    folder = cache_folder(cache_dir) / ".locks" / "conam_zoo"
    lock: FileLock | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{entry.name}.lock", mode=0o664)  # group-writable, for shared caches
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except (OSError, NotImplementedError) as error:
        _logger.info("Fetching %s without a lock: %s", entry.name, error)
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
