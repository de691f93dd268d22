"""Keeping access tokens out of messages, and off lines that anybody can read along."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

# A token by its looks, the value of an authorization header, and a password in an address.
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[^'\"]+|(?<=://)[^/\s@]+(?=@)")
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


def redact(text: str) -> str:
    """`text` with `***` in place of the user's token and of anything that looks like one."""
    from huggingface_hub import get_token

    token = get_token()
    return _SECRETS.sub("***", text.replace(token, "***") if token else text)


def tells_secrets(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, has something to redact."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if redact(str(error)) != str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def token_would_travel_openly() -> bool:
    """Whether a request would carry the user's token over an unencrypted connection to another machine."""
    from huggingface_hub import constants, get_token

    endpoint = urlsplit(constants.ENDPOINT)
    own = _LOOPBACK.fullmatch(endpoint.hostname or "") is not None
    return endpoint.scheme == "http" and not own and get_token() is not None
