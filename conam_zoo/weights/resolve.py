"""From a manifest entry to a verified state dict.

Four places are asked in turn: a mirror directory of the user's, the checkout, the Hub cache, the Hub. A copy counts
only if its bytes are those that the manifest describes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .client import ask_hub, cache_folder, download
from .errors import HubError, WeightsError, WrongWeightsError, in_brief
from .manifest import WeightEntry, find_checkout
from .redact import tells_secrets
from .shards import Described, is_index, read_index
from .verify import CopyStatus, Part, Source, examine, examine_copy, parse_parts

if TYPE_CHECKING:
    from torch import Tensor

MIRROR_VARIABLE = "CONAM_ZOO_MIRROR"

_logger = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class VerifiedWeights:
    """A state dict whose bytes were compared with the manifest, and where they came from.

    `path` is that of the entry's own file; `files` are all, with the shards that an index names behind it.
    """

    path: Path
    source: Source
    state_dict: dict[str, Tensor]
    files: tuple[tuple[Described, Path], ...] = ()


def _verified(parts: Sequence[Part], source: Source) -> VerifiedWeights:
    files = tuple((part.described, part.path) for part in parts)
    return VerifiedWeights(parts[0].path, source, parse_parts(parts), files)


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
    for found, parts in _examine_places(entry, cache_dir, namespace):
        if parts is not None:
            return _verified(parts, found.place)
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
) -> Iterator[tuple[CopyStatus, tuple[Part, ...] | None]]:
    """Mirror, checkout and cache, each looked at only when its turn comes."""
    set_mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror is None and set_mirror:
        mirror = Path(set_mirror).expanduser()
    if mirror is not None:
        yield examine_copy("mirror", mirror / entry.name / entry.file, entry)
    else:
        yield CopyStatus("mirror", None, "missing", f"{MIRROR_VARIABLE} is not set"), None

    checkout = find_checkout()
    if checkout is not None:
        yield examine_copy("checkout", checkout / "weights" / entry.name / entry.file, entry)
    else:
        yield CopyStatus("checkout", None, "missing", "conam_zoo does not run from a checkout"), None

    if namespace is None or entry.revision is None:
        detail = "these weights are not published on the Hub yet"
        yield CopyStatus("cache", None, "missing", detail), None
    else:
        yield _examine_cache(entry, entry.hub_id(namespace), entry.revision, cache_dir)


def _examine_cache(
    entry: WeightEntry, hub_id: str, revision: str, cache_dir: str | Path | None
) -> tuple[CopyStatus, tuple[Part, ...] | None]:
    path = _cached_path(entry, hub_id, revision, cache_dir)
    # The cache keeps the files of a revision side by side.
    return examine_copy("cache", path, entry) if isinstance(path, Path) else (path, None)


def _cached_path(part: Described, hub_id: str, revision: str, cache_dir: str | Path | None) -> Path | CopyStatus:
    """Where the Hub cache has a file, or why it has none."""
    from huggingface_hub import try_to_load_from_cache

    folder = cache_folder(cache_dir)
    try:
        path = try_to_load_from_cache(hub_id, part.file, cache_dir=folder, revision=revision)
    except OSError as error:
        return CopyStatus("cache", None, "missing", f"the Hub cache {folder} cannot be read ({in_brief(error)})")
    if not isinstance(path, str):  # None, or the mark of a file known not to exist
        return CopyStatus("cache", None, "missing", f"the Hub cache {folder} has no copy of it")
    return Path(path)


def _fetch(entry: WeightEntry, hub_id: str, revision: str, cache_dir: str | Path | None) -> VerifiedWeights:
    """Download what the cache lacks or has wrong: the file, and then what it names if it is an index.

    Raises:
        WrongWeightsError: The Hub announces or delivers another file.
        HubError: The Hub delivers none.
    """
    # Before the lock: processes that start together each learn within the deadline that the Hub is away.
    _announced_is_right(entry, hub_id, revision)
    with _one_process_at_a_time(entry, cache_dir):
        # While this process waited for the lock, another may have brought the files.
        found, parts = _examine_cache(entry, hub_id, revision, cache_dir)
        if parts is not None:
            return _verified(parts, found.place)
        first = _fetch_file(entry, hub_id, revision, cache_dir)
        fetched = [first]
        for shard in read_index(first.data, first.path).shards if is_index(entry.file) else ():
            fetched.append(_fetch_file(shard, hub_id, revision, cache_dir, ask_first=True))
    return _verified(fetched, "hub")


def _fetch_file(
    part: Described, hub_id: str, revision: str, cache_dir: str | Path | None, *, ask_first: bool = False
) -> Part:
    """One file from the cache or, verified, from the Hub; downloaded a second time if the first download is wrong.

    Args:
        part: The file.
        hub_id: Repository.
        revision: Commit.
        cache_dir: The Hub cache to use instead of the default one.
        ask_first: Ask the Hub what it has before a download.
    """
    cached = _cached_path(part, hub_id, revision, cache_dir)
    wrong: CopyStatus | None = None
    if isinstance(cached, Path):
        found, data = examine("cache", cached, part)
        if data is not None:
            return Part(part, cached, data)
        wrong = found if found.status == "wrong" else None
    if ask_first:
        _announced_is_right(part, hub_id, revision)
    for afresh in (True,) if wrong else (False, True):
        if afresh and wrong is not None and wrong.path is not None:
            # A forced download renews the blob that the cached name points to; where the name is a file
            # of its own, as it is without symbolic links, it would leave that as it is.
            with contextlib.suppress(OSError):
                wrong.path.unlink()
        path = download(hub_id, part.file, revision, cache_dir, size_bytes=part.size_bytes, afresh=afresh)
        found, data = examine("hub", path, part)
        if data is not None:
            return Part(part, path, data)
        wrong = found
    detail = wrong.detail if wrong else ""
    raise WrongWeightsError(
        f"The Hub repository {hub_id} at {revision} delivered another file than the manifest describes, "
        f"also when asked again ({detail}): upgrade conam_zoo, report it, or use pretrained=False."
    )


def _announced_is_right(entry: Described, hub_id: str, revision: str) -> None:
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
