"""Asking the Hub and downloading from it, by huggingface_hub's own client, with bounded patience and in sentences."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import HubError, in_brief
from .patience import call_with_timeout
from .redact import redact, token_would_travel_openly

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

T = TypeVar("T")

_REQUEST_TIMEOUT_S = 5.0
# The request timeout counts per address and not at all while a name is looked up, so a silent network can
# take many times as long; this bounds the whole first contact.
_CONTACT_DEADLINE_S = 8.0
# Once the file is on its way, silence is borne as long, or as long as the client's next chunk takes at this rate.
_SLOWEST_BYTES_PER_S = 125_000
_CLIENT_CHUNK_BYTES = 10 << 20
_RETRY_AFTER_S = 1.0


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
        return call_with_timeout(ask, _CONTACT_DEADLINE_S)
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
                cache_dir=cache_folder(cache_dir),
                force_download=afresh,
                etag_timeout=_REQUEST_TIMEOUT_S,
                library_name="conam_zoo",
                tqdm_class=_progress_bar(alive),
            )
        )

    next_chunk_s = min(size_bytes, _CLIENT_CHUNK_BYTES) / _SLOWEST_BYTES_PER_S
    try:
        return Path(call_with_timeout(run, max(_CONTACT_DEADLINE_S, next_chunk_s)))
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


def cache_folder(cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)


def _what_the_hub_said(error: Exception, hub_id: str, file: str, revision: str | None) -> str:
    """An exception of the Hub client as one clause."""
    from huggingface_hub import constants, errors

    error = underlying(error)
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
    return f"{hub_id} could not be fetched from {endpoint} ({redact(in_brief(error))})"


def underlying(error: Exception) -> Exception:
    """What went wrong: a failed download hides it behind "not found locally", a forced one behind a ValueError."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error
