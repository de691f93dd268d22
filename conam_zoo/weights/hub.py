"""From a manifest entry to a verified state dict.

Four places are asked in turn: a mirror directory of the user's, the checkout, the Hub cache, the Hub.
Whatever the place, a file's bytes are read once, their size and SHA-256 are compared with the manifest, and
only then are those same bytes parsed, as safetensors: what was checked is what is used, and nothing is ever
unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from .manifest import WeightEntry, find_checkout
from .patience import call_patiently
from .redact import redact, tells_secrets, token_would_travel_openly

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata
    from torch import Tensor

Source = Literal["mirror", "checkout", "cache", "hub"]

MIRROR_VARIABLE = "CONAM_ZOO_MIRROR"

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_REQUEST_TIMEOUT_S = 5.0
# The request timeout counts per address and not at all while a name is looked up, so a silent network can
# take many times as long; this bounds the whole first contact.
_CONTACT_DEADLINE_S = 8.0
# Once the file is on its way, silence is borne as long, or as long as the client's next chunk takes at this rate.
_SLOWEST_BYTES_PER_S = 125_000
_CLIENT_CHUNK_BYTES = 10 << 20
_RETRY_AFTER_S = 1.0
_LOCK_TIMEOUT_S = 600.0
_LARGEST_HEADER_BYTES = 100_000_000  # the bound that safetensors itself sets
_CHUNK_BYTES = 1 << 20


class WeightsError(RuntimeError):
    """No usable weights; the message is one sentence that says why and what to do."""


class WrongWeightsError(WeightsError):
    """A file is not the one that the manifest describes."""


class HubError(Exception):
    """Why the Hub gave no file: a clause for a longer sentence."""


@dataclass(frozen=True)
class VerifiedWeights:
    """A state dict whose bytes were compared with the manifest, and where they came from."""

    path: Path
    source: Source
    state_dict: dict[str, Tensor]


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
    found, data = _examine("mirror", path, entry)
    if found.status == "missing":
        raise WeightsError(f"{found.detail}; give the path of the {entry.file} of {entry.name}.")
    if data is None:
        raise WrongWeightsError(f"{found.detail}; replace it by the published {entry.file} of {entry.name}.")
    return _parse(data, path)


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
        raise WeightsError(f"{path} cannot be read ({_reason(error)}); check the path.") from error
    return _parse(data, path)


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
            return VerifiedWeights(found.path, found.place, _parse(data, found.path))
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


# --- one local file -----------------------------------------------------------------------------------------


def _examine(place: Source, path: Path, entry: WeightEntry) -> tuple[CopyStatus, bytes | None]:
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
        return CopyStatus(place, path, "wrong", f"{path} cannot be read ({_reason(error)})"), None
    if size != entry.size_bytes or digest.hexdigest() != entry.sha256:
        detail = (
            f"{path} is not the published file, expected SHA-256 {entry.sha256} of {entry.size_bytes} bytes, "
            f"found {digest.hexdigest()} of {size} bytes"
        )
        return CopyStatus(place, path, "wrong", detail), None
    return CopyStatus(place, path, "good", f"{path} is the published file"), data


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
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
            f"{path} is a damaged safetensors file ({_reason(error)}); write it again with safetensors.torch.save_file."
        ) from error


# --- the local places ---------------------------------------------------------------------------------------


def _examine_places(
    entry: WeightEntry, cache_dir: str | Path | None, namespace: str | None, mirror: Path | None = None
) -> Iterator[tuple[CopyStatus, bytes | None]]:
    """Mirror, checkout and cache, each looked at only when its turn comes."""
    set_mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror is None and set_mirror:
        mirror = Path(set_mirror).expanduser()
    if mirror is not None:
        yield _examine("mirror", mirror / entry.name / entry.file, entry)
    else:
        yield CopyStatus("mirror", None, "missing", f"{MIRROR_VARIABLE} is not set"), None

    checkout = find_checkout()
    if checkout is not None:
        yield _examine("checkout", checkout / "weights" / entry.name / entry.file, entry)
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

    folder = _cache_folder(cache_dir)
    try:
        path = try_to_load_from_cache(hub_id, entry.file, cache_dir=folder, revision=revision)
    except OSError as error:
        detail = f"the Hub cache {folder} cannot be read ({_reason(error)})"
        return CopyStatus("cache", None, "missing", detail), None
    if not isinstance(path, str):  # None, or the mark of a file known not to exist
        detail = f"the Hub cache {folder} has no copy of it"
        return CopyStatus("cache", None, "missing", detail), None
    return _examine("cache", Path(path), entry)


def _cache_folder(cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)


# --- the Hub ------------------------------------------------------------------------------------------------


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
            return VerifiedWeights(found.path, "cache", _parse(data, found.path))
        wrong = found if found.status == "wrong" else None
        for afresh in (True,) if wrong else (False, True):
            if afresh and wrong is not None and wrong.path is not None:
                # A forced download renews the blob that the cached name points to; where the name is a file
                # of its own, as it is without symbolic links, it would leave that as it is.
                with contextlib.suppress(OSError):
                    wrong.path.unlink()
            path = download(hub_id, entry.file, revision, cache_dir, size_bytes=entry.size_bytes, afresh=afresh)
            found, data = _examine("hub", path, entry)
            if data is not None:
                return VerifiedWeights(path, "hub", _parse(data, path))
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


def ask_hub(hub_id: str, file: str, revision: str | None) -> HfFileMetadata:
    """Ask the Hub about a file, briefly.

    Raises:
        HubError: There is no answer, or it is not about a file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    def ask(_: Callable[[], None]) -> HfFileMetadata:
        url = hf_hub_url(hub_id, file, revision=revision)
        return _twice(lambda: get_hf_file_metadata(url, timeout=_REQUEST_TIMEOUT_S))

    refuse_open_token()
    try:
        return call_patiently(ask, _CONTACT_DEADLINE_S)
    except Exception as error:  # the client, its HTTP library and its transport have no common base
        raise HubError(_what_the_hub_said(error, hub_id, file, revision)) from error


def download(
    hub_id: str, file: str, revision: str | None, cache_dir: str | Path | None, *, size_bytes: int, afresh: bool = False
) -> Path:
    """Download a file into the Hub cache; it is not verified yet.

    Args:
        hub_id: The repository.
        file: The file in it.
        revision: Commit, tag or branch; None for the main branch.
        cache_dir: The Hub cache to use instead of the default one.
        size_bytes: Size of the file, which says how much patience is due.
        afresh: Whether to download it even if there is a copy.

    Raises:
        HubError: It cannot be had.
    """
    from huggingface_hub import hf_hub_download

    def run(alive: Callable[[], None]) -> str:
        return _twice(
            lambda: hf_hub_download(
                hub_id,
                file,
                revision=revision,
                cache_dir=_cache_folder(cache_dir),
                force_download=afresh,
                etag_timeout=_REQUEST_TIMEOUT_S,
                library_name="conam_zoo",
                tqdm_class=_progress_bar(alive),
            )
        )

    next_chunk_s = min(size_bytes, _CLIENT_CHUNK_BYTES) / _SLOWEST_BYTES_PER_S
    try:
        return Path(call_patiently(run, max(_CONTACT_DEADLINE_S, next_chunk_s)))
    # Three libraries may raise here (the client, its HTTP library, the Xet transport), without a common base;
    # callers are promised one kind of error, and the original stays attached as its cause.
    except Exception as error:
        raise HubError(_what_the_hub_said(error, hub_id, file, revision)) from error


def _twice(request: Callable[[], T]) -> T:
    """Make a request, and once more if the Hub stumbles: a status of 500 and above is often gone a moment later."""
    from huggingface_hub import errors

    try:
        return request()
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
    time.sleep(_RETRY_AFTER_S)
    return request()


def _progress_bar(alive: Callable[[], None]) -> type:
    """The client's own progress bar, which also tells of every chunk that brings the download further than before."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        arrived: float = 0
        furthest: float = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.arrived += n or 0  # goes down where the client starts anew
            if self.arrived > self.furthest:
                self.furthest = self.arrived
                alive()
            return super().update(n)

    return Bar


def refuse_open_token() -> None:
    """Refuse to send the user's token unencrypted.

    Raises:
        HubError: The token would go over plain http to another machine.
    """
    from huggingface_hub import constants

    if token_would_travel_openly():
        raise HubError(
            f"HF_ENDPOINT is {redact(constants.ENDPOINT)} and would send the token in use unencrypted, so give an "
            "https address or leave the token out"
        )


def _what_the_hub_said(error: Exception, hub_id: str, file: str, revision: str | None) -> str:
    """An exception of the Hub client as one clause."""
    from huggingface_hub import constants, errors

    error = _underlying(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub was not asked because HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"the Hub repository {hub_id} wants its terms accepted first, and a token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no repository {hub_id} that is public or open to the token in use"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub repository {hub_id} has no revision {revision}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the Hub repository {hub_id} at {revision or 'main'} has no file {file}"
    endpoint = redact(constants.ENDPOINT)
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code == 401:
            return f"the Hub at {endpoint} does not accept the token in use, so renew it or log out"
        return f"the Hub at {endpoint} answered with status {error.response.status_code}"
    return f"{hub_id} could not be fetched from {endpoint} ({redact(_reason(error))})"


def _underlying(error: Exception) -> Exception:
    """What went wrong: a failed download hides it behind "not found locally", a forced one behind a ValueError."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


@contextlib.contextmanager
def _one_process_at_a_time(entry: WeightEntry, cache_dir: str | Path | None) -> Iterator[None]:
    """Hold the lock on an entry, as far as one can be had.

    It spares bandwidth, and correctness does not hang on it: every process verifies the bytes it reads, and
    the Hub client renames whole files into place. So a cache that takes no lock (read-only, or a file system
    without locks) and one that stays locked for ten minutes are used without it.
    """
    from filelock import FileLock

    folder = _cache_folder(cache_dir) / ".locks" / "conam_zoo"
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


def _reason(error: BaseException) -> str:
    """An exception in a few words on one line, fit to stand in brackets."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    text = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text, maxsplit=1)[0]  # one sentence of it is enough
    if len(text) > 160:
        text = text[:157] + "..."
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__
