"""Asking the Hub about a file and bringing it into the Hub cache.

The cache has the layout of huggingface_hub, so that other programs find the files. The download itself is done here:
huggingface_hub names files after the ETag and the commit that a server announces, whatever they hold, and takes as many
bytes as are sent. Here a file is asked about first; what is announced has to be a hash, a commit and a size within a
limit before any byte is asked for; and only bytes of that hash enter the cache.
"""

import contextlib
import functools
import hashlib
import os
import queue
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from conam_zoo.weights.credentials import check_endpoint, redact, token_to_send
from conam_zoo.weights.errors import HubError, WrongWeightsError, expand_home, in_brief
from conam_zoo.weights.manifest import REVISION_PATTERN

T = TypeVar("T")

REQUEST_TIMEOUT_S = 5.0
# The request timeout counts per address and not at all while a name is looked up; this bounds any silence.
CONTACT_DEADLINE_S = 8.0
SLOWEST_BYTES_PER_S = 5_000  # a server that sends a byte now and then is given up, too
RETRY_AFTER_S = 1.0
ABANDONED_AFTER_S = 3600.0  # a partial file that nobody has written to for so long

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BRANCH = re.compile(r"(?!.*\.\.)\w[\w./-]*")


@dataclass(frozen=True)
class Announced:
    """What the Hub says of a file before it is sent."""

    hub_id: str
    file: str
    revision: str | None  # commit, tag or branch that was asked about; None: the main branch
    commit: str
    digest: str  # the SHA-256 of a large file, the git hash of a small one
    size_bytes: int | None
    location: str


class _StumbledError(Exception):
    """A status of 500 and above, which is often gone a moment later."""


class _AbandonedError(Exception):
    """Ends a call that nobody waits for any more, at its next sign of life."""


def call_with_timeout(call: Callable[[Callable[[], None]], T], quiet_s: float) -> T:
    """Run a call in a thread of its own; ``TimeoutError`` when nothing is heard of it for ``quiet_s`` seconds.

    It is given a function to call at every sign of life, and what it raises is raised here.
    """
    signs: queue.SimpleQueue[Future[T] | None] = queue.SimpleQueue()  # the last one is the end
    abandoned = threading.Event()

    def alive() -> None:
        if abandoned.is_set():
            raise _AbandonedError
        signs.put(None)

    def run() -> None:
        end: Future[T] = Future()
        try:
            end.set_result(call(alive))
        except BaseException as error:  # handed to the waiting thread, whatever it is
            end.set_exception(error)
        signs.put(end)

    # A daemon, so that a call nobody waits for any more does not hold up the end of the program.
    threading.Thread(target=run, name="conam_zoo-hub", daemon=True).start()
    try:
        while True:
            if (end := signs.get(timeout=quiet_s)) is not None:
                return end.result()
    except queue.Empty:
        raise TimeoutError(f"no answer within {quiet_s:.0f} seconds") from None
    finally:
        abandoned.set()


def ask_hub(hub_id: str, file: str, revision: str | None) -> Announced:
    """Ask the Hub about a file, briefly; ``HubError`` if there is no answer, or not that of a Hub."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    def ask(_: Callable[[], None]) -> Announced:
        url = hf_hub_url(hub_id, file, revision=revision)
        request = functools.partial(
            get_hf_file_metadata, url, token=token_to_send() or False, timeout=REQUEST_TIMEOUT_S
        )
        try:
            answer = request()
        except errors.HfHubHTTPError as error:  # a status of 500 and above is often gone a moment later
            if error.response.status_code < 500:
                raise
            time.sleep(RETRY_AFTER_S)
            answer = request()
        digest, commit = (answer.etag or "").lower(), answer.commit_hash or ""
        pinned = revision is not None and re.fullmatch(REVISION_PATTERN, revision)
        wrong = None
        if not _DIGEST.fullmatch(digest):
            wrong = "its ETag is not a hash" if digest else "no ETag"
        elif not re.fullmatch(REVISION_PATTERN, commit) or (pinned and commit != revision):
            wrong = "it names no such commit"
        if wrong:
            raise HubError(f"what answered for {hub_id} is not a Hub ({wrong}), so look for a proxy or login page")
        return Announced(hub_id, file, revision, commit, digest, answer.size, answer.location)

    check_endpoint()
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise HubError(f"{revision!r} is not the name of a revision")
    try:
        return call_with_timeout(ask, CONTACT_DEADLINE_S)
    except HubError:
        raise
    except Exception as error:  # the client, its HTTP library and its transport have no common base
        raise HubError(what_the_hub_said(error, hub_id, file, revision)) from error


def download(
    announced: Announced, cache_dir: str | Path | None, *, limit_bytes: int, sha256: str | None = None
) -> Path:
    """Bring an announced file into the Hub cache, unless it is there whole.

    It may have ``limit_bytes`` at most; ``sha256`` is its SHA-256, where it is known. A ``HubError`` says why it
    cannot be had, a ``WrongWeightsError`` that another file was delivered, twice.
    """
    if (announced.size_bytes or 0) > limit_bytes:
        raise HubError(
            f"{announced.file} of {announced.hub_id} has {announced.size_bytes} bytes, more than the {limit_bytes} "
            "that it may have"
        )
    try:
        repository = _repository_folder(announced.hub_id, cache_dir)
        blob, place = repository / "blobs" / announced.digest, _place(repository, announced.commit, announced.file)
        if not (_has_digest(place, announced.digest) and sha256 is None):
            _make_folder(blob.parent, repository)
            _make_folder(place.parent, repository)
            if not _has_digest(blob, announced.digest):
                _fetch_blob(announced, blob, limit_bytes, sha256)
            _link(blob, place)
        _write_reference(repository, announced)
    except (HubError, WrongWeightsError):
        raise
    except Exception as error:
        raise HubError(what_the_hub_said(error, announced.hub_id, announced.file, announced.revision)) from error
    return place


def _fetch_blob(announced: Announced, blob: Path, limit_bytes: int, sha256: str | None) -> None:
    """Download a file to its place among the blobs, a second time if the first one fails or is another file."""
    for left in blob.parent.glob(f"{blob.name}.*.incomplete"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_AFTER_S:
                left.unlink()
    temporary = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
    expected = sha256 or announced.digest
    found = ""
    for last in (False, True):
        try:
            call_with_timeout(lambda alive: _get(announced, temporary, limit_bytes, alive), CONTACT_DEADLINE_S)
            found = _digest(temporary, len(expected))
            if found == expected and _has_digest(temporary, announced.digest):
                os.replace(temporary, blob)
                return
        except (HubError, OSError):  # TimeoutError among them: patience is over, and a full disk stays full
            raise
        except Exception:
            if last:
                raise
            time.sleep(RETRY_AFTER_S)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    kind = "SHA-256" if len(expected) == 64 else "git hash"
    raise WrongWeightsError(
        f"The Hub repository {announced.hub_id} at {announced.commit} delivered another file for {announced.file} than "
        f"it should, also when asked again, expected {kind} {expected}, found {found}: upgrade conam_zoo, report it, "
        "or use pretrained=False."
    )


def _get(announced: Announced, path: Path, limit_bytes: int, alive: Callable[[], None]) -> None:
    """Write the body of an answer to a file, and not a byte more than announced."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, tqdm

    expected = limit_bytes if announced.size_bytes is None else announced.size_bytes
    headers = build_hf_headers(token=_token_for(announced.location), library_name="conam_zoo")
    headers["Accept-Encoding"] = "identity"  # nothing is unpacked, so that nothing can swell
    start = time.monotonic()
    said = f"the Hub at {_endpoint()}"
    arrived = 0
    with (
        get_session().stream(
            "GET", announced.location, headers=headers, timeout=2 * CONTACT_DEADLINE_S, follow_redirects=True
        ) as response,
        tqdm(total=expected, unit="B", unit_scale=True, desc=announced.file, disable=expected < 1 << 16) as bar,
    ):
        if response.status_code >= 500:
            raise _StumbledError(f"{said} answered with status {response.status_code}")
        if response.status_code != 200:
            raise HubError(f"{said} answered with status {response.status_code}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{said} sends {announced.file} compressed, although it was asked not to")
        alive()  # nothing is written once the caller has given up
        with path.open("wb") as file:
            for chunk in response.iter_raw():
                alive()
                arrived += len(chunk)
                if arrived > expected:
                    raise HubError(f"{said} sends more of {announced.file} than the {expected} bytes there may be")
                seconds = time.monotonic() - start
                if seconds > CONTACT_DEADLINE_S and arrived < seconds * SLOWEST_BYTES_PER_S:
                    raise HubError(f"{said} sends {announced.file} too slowly, {arrived} bytes so far")
                file.write(chunk)
                bar.update(len(chunk))
    if announced.size_bytes is not None and arrived != expected:
        raise HubError(f"{said} sends {arrived} bytes of {announced.file} and had announced {expected}")


def _token_for(location: str) -> str | bool:
    """The token in use, for the Hub itself; none for the storage that it refers to."""
    from huggingface_hub import constants

    here, there = (urlsplit(address) for address in (constants.ENDPOINT, location))
    if (here.scheme, here.hostname, here.port) != (there.scheme, there.hostname, there.port):
        return False
    return token_to_send() or False


def _endpoint() -> str:
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The Hub cache: the one given, or the user's."""
    from huggingface_hub import constants

    return expand_home(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)


def cached_file(hub_id: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Where the cache has a file of a revision; ``OSError`` or ``ValueError`` if there can be none."""
    repository = _repository_folder(hub_id, cache_dir)
    commit = revision or "main"
    if not re.fullmatch(REVISION_PATTERN, commit):
        reference = repository / "refs" / commit
        if not _BRANCH.fullmatch(commit) or not reference.is_file():
            return None
        commit = reference.read_bytes()[:64].decode("ascii", "replace").strip()
        if not re.fullmatch(REVISION_PATTERN, commit):
            return None
    place = _place(repository, commit, file)
    return place if place.exists() or place.is_symlink() else None


def is_intact(path: Path) -> bool | None:
    """Whether a cached file has the hash that its blob is named after; None where no blob tells."""
    if not path.is_symlink():
        return None
    digest = Path(os.readlink(path)).name
    return _has_digest(path, digest) if _DIGEST.fullmatch(digest) else None


def _repository_folder(hub_id: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(hub_id)
    return cache_folder(cache_dir) / f"models--{hub_id.replace('/', '--')}"


def _place(repository: Path, commit: str, file: str) -> Path:
    if {"", ".", ".."}.intersection(file.split("/")) or "\\" in file:
        raise ValueError(f"{file!r} is not the name of a file")
    return repository / "snapshots" / commit / file


def _make_folder(folder: Path, repository: Path) -> None:
    """Make a folder of the repository's cache; a file in its place, as an earlier fault may have left, goes."""
    for part in reversed((folder, *folder.parents[: len(folder.relative_to(repository).parts)])):
        if part.is_file() or (part.is_symlink() and not part.exists()):
            part.unlink()
        part.mkdir(parents=True, exist_ok=True)
    if not folder.resolve().is_relative_to(repository.resolve()):
        raise OSError(f"{folder} leads out of the cache of its repository")


def _digest(path: Path, digits: int) -> str:
    with path.open("rb") as file:
        if digits == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)).hexdigest()


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return path.is_file() and _digest(path, len(digest)) == digest
    except OSError:
        return False


def _link(blob: Path, place: Path) -> None:
    """Let a snapshot have the blob: as a link, or as a copy where there are no links."""
    target = os.path.relpath(blob, place.parent)
    if place.is_symlink() and os.readlink(place) == target:
        return
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            temporary.symlink_to(target)
        except OSError:
            shutil.copyfile(blob, temporary)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def _write_reference(repository: Path, announced: Announced) -> None:
    """Remember which commit a branch or tag was; a cache that cannot be written does without."""
    name = announced.revision or "main"
    if name == announced.commit:
        return
    with contextlib.suppress(OSError):
        reference = repository / "refs" / name
        if not reference.is_file() or reference.read_bytes() != announced.commit.encode():
            _make_folder(reference.parent, repository)
            reference.unlink(missing_ok=True)
            reference.write_text(announced.commit)


def what_the_hub_said(error: Exception, hub_id: str, file: str, revision: str | None) -> str:
    """An exception of the Hub client as one clause."""
    from huggingface_hub import errors

    if isinstance(error, _StumbledError):
        return str(error)
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
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code == 401:
            return f"the Hub at {_endpoint()} does not accept the token in use, so renew it or log out"
        return f"the Hub at {_endpoint()} answered with status {error.response.status_code}"
    return f"{hub_id} could not be fetched from {_endpoint()} ({redact(in_brief(error))})"
