"""Calling functions in processes of their own, so that nothing that ran before affects the measurement.

One new Python process imports the module of the functions, which takes seconds, and then forks a child for each call.
It computes nothing itself, because a process whose OpenMP threads have run cannot be forked safely.
"""

import importlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any


class FreshProcesses:
    """A source of fresh processes for functions of one module; use it in a ``with`` statement. Needs ``os.fork``.

    Args:
        module: Name of the module that the functions are in.
    """

    def __init__(self, module: str) -> None:
        self._command = [sys.executable, "-m", __name__, module]

    def __enter__(self) -> "FreshProcesses":
        self._server = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()  # the end of its input ends it

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function of the module in a fresh process; arguments and result are those that JSON can carry.

        Raises:
            RuntimeError: If the process fails; what it wrote to the standard error stream says why.
        """
        to_server, from_server = self._server.stdin, self._server.stdout
        assert to_server is not None
        assert from_server is not None
        with suppress(BrokenPipeError):  # it has ended: then it does not answer either
            to_server.write(json.dumps([function, arguments]) + "\n")
            to_server.flush()
        answer = from_server.readline()
        if not answer or "result" not in (reply := json.loads(answer)):
            raise RuntimeError(f"The process that calls {function} failed; its own message is above.")
        return reply["result"]


def _serve(module_name: str) -> None:
    """For each line of the input fork a child; its answer, or an empty one, is one line of the output."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a function prints must not pass for an answer
    module = importlib.import_module(module_name)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            result = getattr(module, function)(**arguments)
            os.write(answers, (json.dumps({"result": result}) + "\n").encode())
            sys.stderr.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            os.write(answers, b"{}\n")


if __name__ == "__main__":
    _serve(sys.argv[1])
