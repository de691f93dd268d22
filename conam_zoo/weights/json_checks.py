"""Checks of parsed JSON: each gives the value typed, or refuses it in one sentence that names field, value and rule."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

JsonScalar = str | int | float | bool | None

_LARGEST_COUNT = 2**53  # the largest integer that every JSON reader keeps exactly


class ManifestError(ValueError):
    """The manifest is absent, malformed, or has no such entry; the message is one sentence."""


def refuse(at: str, value: object, rule: str) -> NoReturn:
    shown = repr(value)
    if len(shown) > 100:
        shown = shown[:97] + "..."
    raise ManifestError(f"{at} is {shown}, but must be {rule}.")


def as_object(value: object, at: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        refuse(at, value, "a JSON object")
    return value


def exact_keys(value: Mapping[str, object], expected: Iterable[str], at: str) -> None:
    missing, unknown = sorted(set(expected) - set(value)), sorted(set(value) - set(expected))
    if missing:
        raise ManifestError(f"{at} lacks {', '.join(map(repr, missing))}; add it.")
    if unknown:
        raise ManifestError(f"{at} has the unknown key {', '.join(map(repr, unknown))}; remove it.")


def as_list(value: object, at: str, length: int | None = None) -> list[object]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        refuse(at, value, "a list" if length is None else f"a list of {length}")
    return value


def text(value: object, at: str) -> str:
    # isprintable also refuses line breaks, control characters and halves of surrogate pairs.
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        refuse(at, value, "a line of text")
    return value


def matching(value: object, at: str, pattern: str, rule: str) -> str:
    if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
        refuse(at, value, rule)
    return value


def optional(value: object, at: str, pattern: str, rule: str) -> str | None:
    return None if value is None else matching(value, at, pattern, rule)


def one_of(value: object, at: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        refuse(at, value, f"one of {', '.join(choices)}")
    return value


def integer(value: object, at: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _LARGEST_COUNT:
        refuse(at, value, f"an integer of at least {low}")
    return value


def number(value: object, at: str, low: float, high: float) -> float:
    # A NaN fails the comparison, and an integer too large for a float fails it before the conversion.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        refuse(at, value, f"a number from {low:g} to {high:g}")
    return float(value)


def three_numbers(value: object, at: str, low: float, high: float) -> tuple[float, float, float]:
    first, second, third = (number(item, at, low, high) for item in as_list(value, at, length=3))
    return first, second, third


def scalar(value: object, at: str) -> JsonScalar:
    if isinstance(value, str):
        return text(value, at)
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    refuse(at, value, "a string, a finite number, true, false, null, or a list of these")


def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ManifestError(f"the key {twice!r} stands twice in one object; keep one of them.")
    return found


def no_constant(name: str) -> NoReturn:
    raise ManifestError(f"{name} is not a JSON number; write a finite one.")
