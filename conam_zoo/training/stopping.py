"""Being asked to stop: SIGTERM and SIGINT become a wish that the training loop grants at its next step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest", "TrainingStopped"]


class TrainingStopped(Exception):  # noqa: N818 (it was asked for, so it is no error)
    """The training was asked to stop, and its state is saved. Its message is one sentence that says how to go on.

    Attributes:
        exit_code: What the process should end with, 128 plus the signal's number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.exit_code = 128 + signal_number


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is noted in ``signal_number`` and does nothing else.

    A second one acts as it would have before, for the impatient. Outside of the main thread, where Python has no
    signal handlers, nothing is ever noted.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
