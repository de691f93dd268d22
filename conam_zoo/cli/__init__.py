"""The ``conam`` command: arguments in, calls out. ``conam --help`` lists the commands in the order of the imports."""

# ruff: noqa: I001 (the order of the imports is that of the help)
import glob
import io
import logging
import os
import sys

import typer

from conam_zoo.cli import (  # noqa: F401 (each registers its commands)
    zoo,
    predicting,
    training,
    models,
    publishing,
)
from conam_zoo.cli._shared import app
from conam_zoo.errors import UserError, is_out_of_memory
from conam_zoo.escape import for_terminal
from conam_zoo.startup import interruptible, keep_freed_memory

__all__ = ["app", "main", "run_app"]


def main() -> None:
    """Run the ``conam`` command."""
    run_app(app, "conam")


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command; bad input ends in one sentence and exit code 2, Ctrl-C in 130 alone."""
    try:
        with interruptible():
            _run(app, name)
    except KeyboardInterrupt:
        sys.exit(130)


def _matching(argument: str) -> list[str]:
    """The pictures that a pattern such as ``*.jpg`` means; anything else as it is."""
    from conam_zoo.data.images import PICTURE_SUFFIXES

    if os.path.lexists(argument) or os.path.splitext(argument)[1].lower() not in PICTURE_SUFFIXES:
        return [argument]
    return sorted(glob.glob(argument)) or [argument]


def _run(app: typer.Typer, name: str) -> None:
    from conam_zoo.training.engine import NonFiniteLossError
    from conam_zoo.training.checkpoint import TrainingStopped
    from conam_zoo.weights import ManifestError, WeightsError
    from conam_zoo.weights.errors import in_brief

    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lasts)
    keep_freed_memory()
    _make_output_safe()
    _silence_libraries()
    try:
        arguments = sys.argv[1:]
        if os.name == "nt":  # whose shells leave patterns of files to the program
            arguments = [match for each in arguments for match in _matching(each)]
        try:
            app(args=_with_json_place(arguments), prog_name=name)
        finally:
            _flush_output()
    except (UserError, WeightsError, ManifestError, NonFiniteLossError) as error:
        sys.stderr.write(f"conam: {for_terminal(error)}\n")
        sys.exit(2)
    except TrainingStopped as stop:
        sys.stderr.write(f"conam: {for_terminal(stop)}\n")
        sys.exit(stop.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(
            f"conam: There is not enough memory ({for_terminal(in_brief(error))}): lower the batch size or the image "
            "size, or free some.\n"
        )
        sys.exit(2)
    except BrokenPipeError:  # the reader has had enough
        _give_up_output()
        sys.exit(1)
    except OSError as error:
        _give_up_output()
        place = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"conam: {for_terminal(place)}{for_terminal(error.strerror or error)}\n")
        sys.exit(2)


def _with_json_place(arguments: list[str]) -> list[str]:
    """``--json`` without a file prints, as ``--json -`` does."""
    placed: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":
            return placed + arguments[number:]
        following = arguments[number + 1 : number + 2]
        placed.append(argument)
        if argument == "--json" and (not following or (following[0].startswith("-") and following[0] != "-")):
            placed.append("-")
    return placed


def _flush_output() -> None:
    """Write out what is left, so that a full disk is reported here and not by the interpreter at its end."""
    if not sys.stdout.closed:
        sys.stdout.flush()


def _give_up_output() -> None:
    """Let what cannot be written be lost, once that is reported, instead of tried again at the end."""
    try:
        _flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _PlainFormatter(logging.Formatter):
    """For messages that may hold text of a server or a library."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record), lines=True)


def _silence_libraries() -> None:
    """Keep off the terminal what is of no use to somebody who trains or measures."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of PyTorch's profiler, which reports that there is no GPU
    logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)  # that a training has a single step
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # the same of torch.compile


def _make_output_safe() -> None:
    """Warnings on standard error as plain text; on a terminal of another code page, what it can show."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("conam: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
