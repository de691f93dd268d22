"""The Hub's address and the user's token: read with care, kept out of messages and off lines that others can read."""

import functools
import logging
import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from conam_zoo.weights.errors import HubError, in_brief

_logger = logging.getLogger(__name__)

# A token by its looks, the value of an authorization header, and a password in an address.
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[^'\"]+|(?<=://)[^/\s@]+(?=@)")
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


def token_in_use() -> str | None:
    """The user's token, if there is one and it can be read.

    A token file that cannot be read, or would be waited for, as a named pipe would, is reported and ignored.
    """
    from huggingface_hub import constants, get_token

    path = Path(constants.HF_TOKEN_PATH)
    try:
        given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        if not given and path.exists() and not path.is_file():
            raise OSError("it is not a file")
        token = get_token()
    except (OSError, ValueError) as error:
        _warn_once(f"The token file {path} is not used ({in_brief(error)}).")
        return None
    return token if token is None or token.isascii() else None  # no header could carry it


def token_to_send() -> str | None:
    """The user's token, unless huggingface_hub is told to send none that is not asked for."""
    from huggingface_hub import constants

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else token_in_use()


@functools.cache
def _warn_once(text: str) -> None:
    _logger.warning("%s", text)


def redact(text: str) -> str:
    """The text with ``***`` in place of the user's token, the endpoint's password, and what looks like either."""
    for secret in (*_secrets_of_endpoint(), token_in_use()):
        text = text.replace(secret, "***") if secret else text
    return _SECRETS.sub("***", text)


def _secrets_of_endpoint() -> list[str]:
    """What stands before the last @ of the endpoint, in every spelling; longest first."""
    from huggingface_hub import constants

    user_info = constants.ENDPOINT.rpartition("@")[0].rpartition("://")[2]
    password = user_info.partition(":")[2]
    found = {user_info, *(form(part) for part in (user_info, password) for form in (str, unquote, quote))}
    found |= {quote(part, safe="") for part in (user_info, password)}
    return sorted((part for part in found if len(part) > 3 or part == user_info != ""), key=len, reverse=True)


def tells_secrets(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, has something to redact."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if redact(str(error)) != str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_endpoint() -> None:
    """Refuse (``HubError``) an endpoint that is not an address, or to which the token would travel unencrypted."""
    from huggingface_hub import constants

    try:
        endpoint = urlsplit(constants.ENDPOINT)
        host, port = endpoint.hostname, endpoint.port
        good = endpoint.scheme in ("http", "https") and bool(host) and port != 0
    except ValueError:
        good = False
    if not good:
        raise HubError(
            f"HF_ENDPOINT is {redact(constants.ENDPOINT)!r} and no address of a Hub, so give one such as "
            "https://huggingface.co"
        )
    if endpoint.scheme == "http" and not _LOOPBACK.fullmatch(host or "") and token_to_send() is not None:
        raise HubError(
            f"HF_ENDPOINT is {redact(constants.ENDPOINT)} and would send the token in use unencrypted, so give an "
            "https address or leave the token out"
        )
