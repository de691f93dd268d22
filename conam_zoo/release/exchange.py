"""Folders of weights and their manifest, changed together: by one process at a time, and repaired after a kill."""

import hashlib
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.weights import load_manifest

FORMER = "former"  # where the folder that is replaced waits until the manifest names the new one
_SCRATCH = re.compile(r"\.packing-(\w+\.\w+)-\w{8}")
_MANIFEST = re.compile(r"\.weights_manifest\.json\.[0-9a-f]{32}\.tmp")  # half written by dump_manifest
SILENT_SECONDS, LOCK_SECONDS = 2, 600

_log = logging.getLogger(__name__)


@contextmanager
def packing(checkout: Path) -> Iterator[None]:
    """Let no other process change the weights of a checkout; what a killed one left half done is undone first."""
    # The lock of the folder itself needs no file, which a checkout would keep, and ends with the process.
    folder = os.open(checkout, os.O_RDONLY)
    try:
        _lock(folder, checkout)
        _repair(checkout)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, checkout: Path) -> None:
    import fcntl  # not on Windows, where nothing is published from

    started, told = time.monotonic(), False
    while True:
        with suppress(BlockingIOError):
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        waited = time.monotonic() - started
        if waited > LOCK_SECONDS:
            raise UserError(f"Another process is packing weights into {checkout}: end it, or wait until it is done.")
        if waited > SILENT_SECONDS and not told:
            _log.warning("Another process is packing weights into %s: waiting until it is done.", checkout)
            told = True
        time.sleep(0.05)


@contextmanager
def scratch_folder(checkout: Path, name: str) -> Iterator[Path]:
    """A folder in the checkout to build a folder of weights in; ``packing`` finds it again after a kill."""
    with tempfile.TemporaryDirectory(dir=checkout, prefix=f".packing-{name}-") as scratch:
        (Path(scratch) / name).mkdir()  # as long as it is here, nothing has been exchanged
        yield Path(scratch)


def exchange(new: Path, destination: Path, scratch: Path, confirm: Callable[[], None]) -> None:
    """Put a folder into its place and confirm that; if the confirmation fails, what was there comes back."""
    former = scratch / FORMER
    destination.parent.mkdir(exist_ok=True)
    had_former = destination.exists()
    with _ctrl_c_waits():
        if had_former:
            destination.replace(former)
        try:
            new.replace(destination)
            confirm()
        except BaseException:
            if destination.exists():
                destination.replace(new)
            if had_former:
                former.replace(destination)
            raise


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C act behind the block as it would have in it; only the main thread has handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def _repair(checkout: Path) -> None:
    """Bring folders and manifest together again where a kill parted them, and clear what it left."""
    for leaving in checkout.iterdir():
        if _MANIFEST.fullmatch(leaving.name):
            leaving.unlink(missing_ok=True)
    for scratch in sorted(checkout.iterdir()):
        if not (match := _SCRATCH.fullmatch(scratch.name)) or scratch.is_symlink() or not scratch.is_dir():
            continue
        name = match[1]
        entry = load_manifest(checkout / "weights_manifest.json").entries.get(name)
        destination, former = checkout / "weights" / name, scratch / FORMER
        named = entry is not None and _is(destination / entry.file, entry.sha256)
        if not named and former.exists():
            shutil.rmtree(destination, ignore_errors=True)
            former.replace(destination)
        elif entry is None and not (scratch / name).exists():  # moved into its place, but the manifest never named it
            shutil.rmtree(destination, ignore_errors=True)
        shutil.rmtree(scratch)


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256
