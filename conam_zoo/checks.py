"""Checks of values from outside, built from small ones: manifests, config.json and recipes are all read with them.

A check is called with a value and a name for it, and gives the value, typed, or raises a ``CheckError``.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

Check = Callable[[object, str], Any]

LARGEST_SIDE = 1024  # pixels, of the images that a net is shown
LARGEST_INTEGER = 2**53  # that every JSON reader keeps exactly


class CheckError(ValueError):
    """Why a value is refused, as a clause; for a value out of its range also how it is shown, and what it must be."""

    def __init__(self, clause: str, shown: str = "", rule: str = "") -> None:
        super().__init__(clause)
        self.shown, self.rule = shown, rule


def refuse(at: str, value: object, rule: str) -> NoReturn:
    """Say what the value called ``at`` is, and what it must be."""
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    raise CheckError(f"{at or 'it'} is {shown}, but must be {rule}", shown, rule)


def that(is_good: Callable[[Any], bool], rule: str) -> Check:
    """A value of which something is true."""

    def check(value: object, at: str) -> Any:
        if not is_good(value):
            refuse(at, value, rule)
        return value

    return check


def string(most: int) -> Check:
    """A text of at most so many letters."""
    return that(lambda value: isinstance(value, str) and len(value) <= most, f"a text of at most {most} letters")


def matching(pattern: str, rule: str) -> Check:
    """A text that a regular expression matches as a whole."""
    return that(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, rule)


def one_of(*choices: Any) -> Check:
    """One of some values, of the same type."""
    rule = ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
    return that(lambda value: any(type(value) is type(choice) and value == choice for choice in choices), rule)


def integer(low: int, high: int = LARGEST_INTEGER, rule: str = "") -> Check:
    """A whole number from ``low`` to ``high``."""
    rule = rule or f"an integer of at least {low}" + (f", at most {high}" if high < LARGEST_INTEGER else "")
    return that(lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, rule)


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False, rule: str = "") -> Check:
    """A finite number from ``low`` to ``high``; with ``above`` or ``below`` it may not be that bound itself."""
    lower = f"above {low:g}" if above else f"at least {low:g}"
    upper = "finite" if high == math.inf else f"below {high:g}" if below else f"at most {high:g}"
    excluded = [bound for bound, out in ((low, above), (high, below or high == math.inf)) if out]

    def is_good(value: Any) -> bool:
        # A NaN fails the comparison, and so does an integer too large for a float, if there is an upper bound.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and low <= value <= high and value not in excluded

    check = that(is_good, rule or f"a number, {lower} and {upper}")
    return lambda value, at: float(check(value, at))


# isprintable also refuses line breaks, control characters and halves of surrogate pairs.
line = that(lambda v: isinstance(v, str) and v.isprintable() and not v.isspace() and v != "", "a line of text")
as_object = that(lambda v: isinstance(v, dict) and all(isinstance(key, str) for key in v), "a JSON object")


def optional(check: Check) -> Check:
    """None, or what another check lets pass."""
    return lambda value, at: None if value is None else check(value, at)


def either(first: Check, second: Check) -> Check:
    """What one of two checks lets pass; the second one says what is wrong."""

    def check(value: object, at: str) -> Any:
        try:
            return first(value, at)
        except CheckError:
            return second(value, at)

    return check


def tuple_of(check_item: Check, fewest: int = 0, most: int | None = None) -> Check:
    """A JSON list of such items."""
    rule = "a list" if most is None else f"a list of {fewest} to {most}"
    as_list = that(lambda v: isinstance(v, list) and fewest <= len(v) and (most is None or len(v) <= most), rule)
    return lambda value, at: tuple(check_item(item, at) for item in as_list(value, at))


def row(*checks: Check) -> Check:
    """A JSON list with one item for each check."""
    as_list = that(lambda v: isinstance(v, list) and len(v) == len(checks), f"a list of {len(checks)}")
    return lambda value, at: tuple(check(item, at) for check, item in zip(checks, as_list(value, at), strict=True))


def table_of(check_value: Check, check_key: Check = line) -> Check:
    """A JSON object of any keys that pass, with such values."""

    def check(value: object, at: str) -> dict[str, Any]:
        items = as_object(value, at).items()
        return {check_key(key, f"a key of {at}"): check_value(item, f"{at}[{key!r}]") for key, item in items}

    return check


def record(kind: Callable[..., Any], checks: Mapping[str, Check], required: Collection[str] | None = None) -> Check:
    """A JSON object of these keys and no others, made a ``kind``; all of them are required if none are named."""
    needed = set(checks if required is None else required)

    def check(value: object, at: str) -> Any:
        facts = as_object(value, at)
        if missing := sorted(needed - facts.keys()):
            raise CheckError(f"{at or 'it'} lacks {', '.join(map(repr, missing))}")
        if unknown := sorted(facts.keys() - checks.keys()):
            raise CheckError(f"{at or 'it'} has the unknown key {', '.join(repr(key)[:60] for key in unknown)[:160]}")
        return kind(**{key: checks[key](fact, f"{at}.{key}" if at else key) for key, fact in facts.items()})

    return check
