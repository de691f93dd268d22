"""What can go wrong with weights, in sentences."""

import re
from pathlib import Path


class ManifestError(ValueError):
    """The manifest is absent, malformed, or has no such entry; the message is one sentence."""


class WeightsError(RuntimeError):
    """No usable weights; the message is one sentence that says why and what to do."""


class WrongWeightsError(WeightsError):
    """A file is not the one that it should be."""


class HubError(Exception):
    """Why the Hub gave no file: a clause for a longer sentence."""


def in_brief(error: BaseException) -> str:
    """An exception in a few words on one line, fit to stand in brackets."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    text = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text, maxsplit=1)[0]  # one sentence of it is enough
    if len(text) > 160:
        text = text[:157] + "..."
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__


def expand_home(path: str | Path) -> Path:
    """A path with ``~`` and ``~name`` replaced by the home folder; ``WeightsError`` if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WeightsError(f"{path} begins with a home folder that does not exist: write the path out.") from error
