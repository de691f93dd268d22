"""A call that is given up when nothing is heard of it for too long.

The Hub client counts its own timeouts per address and per attempt, and a name look-up knows none, so a silent network
can hold a caller up for minutes. Here the caller waits as long as there are signs of life, and no longer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _AbandonedError(Exception):
    """Ends a call that nobody waits for any more, at its next sign of life."""


def call_with_timeout(call: Callable[[Callable[[], None]], T], quiet_s: float) -> T:
    """Run `call` in a thread of its own and wait for it.

    Args:
        call: What to run; it is given a function to call at every sign of life.
        quiet_s: Seconds without a sign of life, or an end, after which it is given up.

    Raises:
        TimeoutError: It was given up.
        Exception: Whatever `call` raises.
    """
    events: queue.SimpleQueue[tuple[str, T | None, BaseException | None]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def alive() -> None:
        if abandoned.is_set():
            raise _AbandonedError
        events.put(("alive", None, None))

    def run() -> None:
        try:
            events.put(("done", call(alive), None))
        except BaseException as error:  # handed to the waiting thread, whatever it is
            events.put(("failed", None, error))

    # A daemon, so that a call nobody waits for any more does not hold up the end of the program.
    threading.Thread(target=run, name="conam_zoo-hub", daemon=True).start()
    try:
        while True:
            state, value, error = events.get(timeout=quiet_s)
            if error is not None:
                raise error
            if state == "done":
                return value  # type: ignore[return-value]
    except queue.Empty:
        raise TimeoutError(f"no answer within {quiet_s:.0f} seconds") from None
    finally:
        abandoned.set()
