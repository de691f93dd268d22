"""What can go wrong with weights, in sentences."""

import re

__all__ = ["HubError", "WeightsError", "WrongWeightsError", "in_brief"]


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
