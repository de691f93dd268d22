"""Calls that are waited for as long as they give signs of life."""

import threading
import time
from collections.abc import Callable

import pytest

from conam_zoo.weights.client import call_with_timeout


def test_results_and_errors_come_through() -> None:
    assert call_with_timeout(lambda alive: 3, 5) == 3
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda alive: 1 // 0, 5)


def test_a_slow_call_that_shows_life_is_waited_for() -> None:
    def slow(alive: Callable[[], None]) -> str:
        for _ in range(18):
            time.sleep(0.1)
            alive()
        return "done"

    assert call_with_timeout(slow, 1.5) == "done"


def test_a_quiet_call_is_given_up_and_ends_at_its_next_sign_of_life() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def quiet(alive: Callable[[], None]) -> None:
        try:
            go_on.wait(10)
            alive()
        finally:
            ended.set()

    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within"):
        call_with_timeout(quiet, 0.2)
    assert time.monotonic() - start < 5
    go_on.set()
    assert ended.wait(5)
