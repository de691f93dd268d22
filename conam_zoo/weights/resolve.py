"""From a manifest entry to a verified state dict.

Four places are asked in turn: a mirror folder of the user's, the checkout, the Hub cache, the Hub. A copy counts
only if its bytes are those that the manifest describes.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conam_zoo.weights.client import Announced, ask_hub, cache_folder, cached_file, download
from conam_zoo.weights.credentials import tells_secrets
from conam_zoo.weights.errors import HubError, WeightsError, WrongWeightsError, expand_home, in_brief
from conam_zoo.weights.manifest import WeightEntry, find_checkout, write_whole
from conam_zoo.weights.verify import (
    CopyStatus,
    Described,
    Part,
    Source,
    examine,
    examine_copy,
    files_of,
    is_index,
    parse_parts,
    read_index,
)

if TYPE_CHECKING:
    from torch import Tensor

MIRROR_VARIABLE = "CONAM_ZOO_MIRROR"

_logger = logging.getLogger(__name__)

# The lock spares bandwidth, and correctness does not hang on it; its holder may have been stopped.
LOCK_QUIET_S = 2.0
LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class VerifiedWeights:
    """A state dict whose bytes were compared with the manifest, and where they came from."""

    path: Path  # of the entry's own file
    source: Source
    state_dict: dict[str, "Tensor"]


def find_verified(
    entry: WeightEntry, *, cache_dir: str | Path | None = None, namespace: str | None = None
) -> VerifiedWeights:
    """Find the file of ``entry``, download it if need be, and read it once verified.

    In this order: ``$CONAM_ZOO_MIRROR/<name>/<file>``; ``weights/<name>/<file>`` of the checkout; the Hub cache
    (``cache_dir``, if given); the Hub, at the pinned revision. A wrong copy in the first two is passed over with a
    warning; a wrong one in the cache or from the Hub is fetched once more and then refused. Without ``namespace``, the
    manifest's ``hub_namespace``, neither Hub nor cache is asked. The variables of huggingface_hub and the user's token
    are honoured. A Hub that does not answer, or stalls, is given up within ten seconds.

    Raises:
        WrongWeightsError: The Hub itself offers another file than the manifest describes.
        WeightsError: No verified copy was found; the message says what was tried, and what to do.
    """
    source, parts = _find_parts(entry, cache_dir, namespace)
    return VerifiedWeights(parts[0].path, source, parse_parts(parts))


def _find_parts(
    entry: WeightEntry, cache_dir: str | Path | None, namespace: str | None
) -> tuple[Source, tuple[Part, ...]]:
    tried: list[str] = []
    for found in _examine_places(entry, cache_dir, namespace):
        if found.parts:
            return found.place, found.parts
        if found.status == "wrong":
            _logger.warning("A copy of %s is not used: %s.", entry.name, found.detail)
        tried.append(found.detail)
    online, cause = "", None
    if namespace is not None and entry.revision is not None:
        try:
            return _fetch(entry, entry.hub_id(namespace), entry.revision, cache_dir)
        except HubError as failure:
            tried.append(str(failure))
            # A traceback shows the cause as well.
            online, cause = "go online, ", None if tells_secrets(failure.__cause__) else failure.__cause__
    raise WeightsError(
        f"No verified copy of {entry.name} was found ({'; '.join(tried)}): set {MIRROR_VARIABLE} to a "
        f"directory that holds {entry.name}/{files_of(entry)}, {online}or use pretrained=False."
    ) from cause


def check_copies(
    entry: WeightEntry,
    *,
    cache_dir: str | Path | None = None,
    namespace: str | None = None,
    mirror: Path | None = None,
) -> list[CopyStatus]:
    """Compare each local copy of ``entry`` with the manifest: mirror, checkout, Hub cache; no network."""
    return [replace(found, parts=()) for found in _examine_places(entry, cache_dir, namespace, mirror)]


def _examine_places(
    entry: WeightEntry, cache_dir: str | Path | None, namespace: str | None, mirror: Path | None = None
) -> Iterator[CopyStatus]:
    """Mirror, checkout and cache, each looked at only when its turn comes."""
    set_mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror is None and set_mirror:
        mirror = expand_home(set_mirror)
    if mirror is None:
        yield CopyStatus("mirror", None, "missing", f"{MIRROR_VARIABLE} is not set")
    else:
        yield examine_copy("mirror", mirror / entry.name / entry.file, entry)
    if (checkout := find_checkout()) is None:
        yield CopyStatus("checkout", None, "missing", "conam_zoo does not run from a checkout")
    else:
        yield examine_copy("checkout", checkout / "weights" / entry.name / entry.file, entry)
    if namespace is None or entry.revision is None:
        yield CopyStatus("cache", None, "missing", "these weights are not published on the Hub yet")
    else:
        yield _examine_cache(entry, entry.hub_id(namespace), entry.revision, cache_dir)


def _examine_cache(entry: WeightEntry, hub_id: str, revision: str, cache_dir: str | Path | None) -> CopyStatus:
    folder = cache_folder(cache_dir)
    try:
        path = cached_file(hub_id, entry.file, revision, cache_dir)
    except (OSError, ValueError) as error:
        return CopyStatus("cache", None, "missing", f"the Hub cache {folder} cannot be read ({in_brief(error)})")
    if path is None:
        return CopyStatus("cache", None, "missing", f"the Hub cache {folder} has no copy of it")
    return examine_copy("cache", path, entry)  # the cache keeps the files of a revision side by side


def _fetch(
    entry: WeightEntry, hub_id: str, revision: str, cache_dir: str | Path | None
) -> tuple[Source, tuple[Part, ...]]:
    """Download what the cache lacks or has wrong: the file, and then what it names if it is an index."""
    # Before the lock: processes that start together each learn within the deadline that the Hub is away.
    announced = _ask_for(entry, hub_id, revision)
    with _one_process_at_a_time(entry, cache_dir):
        # While this process waited for the lock, another may have brought the files.
        found = _examine_cache(entry, hub_id, revision, cache_dir)
        if found.parts:
            return "cache", found.parts
        parts = _fetch_file(entry, announced, cache_dir)
        if is_index(entry.file):
            for shard in read_index(parts[0].data, parts[0].path)[0]:
                parts += _fetch_file(shard, _ask_for(shard, hub_id, revision), cache_dir)
    return "hub", parts


def _ask_for(part: Described, hub_id: str, revision: str) -> Announced:
    """Ask the Hub for the file's size and hash, briefly; refuse before downloading what cannot be right."""
    answer = ask_hub(hub_id, part.file, revision)
    # The ETag of a large file is its SHA-256, that of a small one a git hash, which says nothing here.
    announces_sha256 = len(answer.digest) == 64
    if (announces_sha256 and answer.digest != part.sha256) or answer.size_bytes not in (None, part.size_bytes):
        found = answer.digest if announces_sha256 else "an unknown one"
        raise WrongWeightsError(
            f"The Hub repository {hub_id} at {revision} offers another {part.file} than the manifest "
            f"describes, expected SHA-256 {part.sha256} of {part.size_bytes} bytes, "
            f"found {found} of {answer.size_bytes} bytes: "
            "upgrade conam_zoo, report it, or use pretrained=False."
        )
    return answer


def _fetch_file(part: Described, announced: Announced, cache_dir: str | Path | None) -> tuple[Part, ...]:
    """One file of the Hub, brought into the cache and verified where it lies there."""
    path = download(announced, cache_dir, limit_bytes=part.size_bytes, sha256=part.sha256)
    found = examine("hub", path, part)
    if not found.parts:
        raise WrongWeightsError(f"{found.detail}; it was changed in the cache meanwhile, so run the command again.")
    return found.parts


@contextlib.contextmanager
def _one_process_at_a_time(entry: WeightEntry, cache_dir: str | Path | None) -> Iterator[None]:
    """Hold the lock on an entry; a cache that takes none (one that is read-only), or stays locked, is used without.

    That is safe: every process verifies the bytes it reads, and files appear in the cache whole.
    """
    from filelock import FileLock, Timeout

    folder = cache_folder(cache_dir) / ".locks" / "conam_zoo"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{entry.name}.lock", mode=0o664)  # group-writable, for shared caches
            try:
                stack.enter_context(lock.acquire(timeout=LOCK_QUIET_S))
            except Timeout:
                wait = "Waiting for another process that fetches %s, for %.0f seconds at most; the lock is %s."
                _logger.warning(wait, entry.name, LOCK_TIMEOUT_S, lock.lock_file)
                stack.enter_context(lock.acquire(timeout=LOCK_TIMEOUT_S - LOCK_QUIET_S))
        except (OSError, NotImplementedError) as error:  # a Timeout among them
            _logger.info("Fetching %s without a lock: %s", entry.name, error)
        yield


def fill_mirror(entry: WeightEntry, mirror: Path, *, namespace: str | None = None) -> tuple[Path, bool]:
    """Put a verified copy of ``entry`` into a mirror, unless a good one is there; its path, and whether it was written.

    The copy appears under its name only when it is whole.
    """
    folder = mirror / entry.name
    if folder.is_symlink():
        raise WeightsError(
            f"{folder} is a symbolic link, and a mirror is not written through links: put a folder in its place."
        )
    path = folder / entry.file
    there = examine_copy("mirror", path, entry).parts
    if there and not any(part.path.is_symlink() for part in there):
        return path, False
    _, parts = _find_parts(entry, None, namespace)
    parse_parts(parts)  # nobody gets weights that cannot be read
    try:
        for part in reversed(parts):  # the index last: a mirror is whole when its copy appears by name
            place = folder / part.described.file
            if place.is_symlink() or not examine("mirror", place, part.described).parts:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, part.data)
                place.chmod(0o644)  # whatever the umask says: a mirror is for others
    except OSError as error:
        raise WeightsError(
            f"The mirror {mirror} cannot be written ({in_brief(error)}): choose a folder with space and rights."
        ) from error
    return path, True
