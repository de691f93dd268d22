"""What the ``conam`` command does first, most of it before the libraries are imported, which takes seconds; other
programs are left alone.

Ctrl-C ends the command with exit code 130 and nothing printed, at any moment. A working folder that is gone, without
which MKL aborts the process, and an endpoint that huggingface_hub cannot be imported with, are one sentence.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

EXIT_CODE = 130  # 128 and the number of SIGINT, as shells have it

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")

OUR_RESEARCH = ("experiments", "experiments.conam")

_at_work = False  # else the command has not begun or is at its end, and nobody would catch a KeyboardInterrupt


def is_our_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process is ``conam``, ``python -m conam_zoo`` or our ``experiments``, and no program of others."""
    program = argv[0] if argv else ""
    if program == "-m":  # Python is still looking for the module
        module = "".join(orig_argv[orig_argv.index("-m") + 1 :][:1]) if "-m" in orig_argv else ""
        return module == "conam_zoo" or (module in OUR_RESEARCH and _is_beside_us("experiments"))
    path = Path(program)
    return path.name in ("conam", "conam.exe") or path.parts[-2:] == ("conam_zoo", "__main__.py")


def _is_beside_us(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is not None and Path(file).resolve().parents[1] == Path(__file__).resolve().parents[1]


def begin_command() -> None:
    """Handle SIGINT, unless somebody has chosen otherwise, and check the working folder, if this is the command."""
    if not is_our_command(sys.argv, sys.orig_argv):
        return
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _on_interrupt)
    try:
        os.getcwd()
        _ = urlsplit(os.environ.get("HF_ENDPOINT", "")).port
    except OSError as error:
        _refuse(f"The working folder cannot be used ({error.strerror}): change into another.")
    except ValueError:  # huggingface_hub fails on it while it is imported; it may hold a password
        _refuse("HF_ENDPOINT is no address of a Hub: give one such as https://huggingface.co.")
    if sys.stdout is None:
        _refuse("Standard output is closed: send it to a file, or to /dev/null.")


def _refuse(sentence: str) -> NoReturn:
    if sys.stderr is not None:
        sys.stderr.write(f"conam: {sentence}\n")
    sys.exit(2)


@contextmanager
def interruptible() -> Iterator[None]:
    """For as long as the block lasts, Ctrl-C is a KeyboardInterrupt, so that what is half done is cleared away."""
    global _at_work
    _at_work = True
    try:
        yield
    finally:
        _at_work = False


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones, instead of giving it back to the system.

    By default the maps of every batch are given back and faulted in again page by page (tests/test_heap.py counts the
    faults). The process holds on to what it needed at its peak. Nothing is changed where there is no glibc, and where
    an environment variable of its allocator says that somebody has decided already; returns whether it was.

    Source: mallopt(3).
    """
    decided = any(variable in os.environ for variable in VARIABLES)
    mallopt = None if decided or os.name != "posix" else getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    # Within an import it could be swallowed, or end in the traceback of an extension that did not expect it.
    if not _at_work or _is_importing(frame):
        os._exit(EXIT_CODE)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
