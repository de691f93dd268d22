"""Folders of weights and their manifest, changed together: by one process at a time, and mended after a kill."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from conam_zoo.errors import UserError
from conam_zoo.weights import load_manifest

__all__ = ["exchange", "packing", "scratch_folder"]

SCRATCH = ".packing-"  # then the name of the weights, "-", and something random
LOCK_SECONDS = 600


@contextmanager
def packing(checkout: Path) -> Iterator[None]:
    """Let no other process change the weights of a checkout; what a killed one left half done is undone first.

    Raises:
        UserError: If another process goes on with it for ten minutes.
        ManifestError: If the manifest cannot be read.
    """
    path = hashlib.sha256(str(checkout.resolve()).encode()).hexdigest()[:16]
    # Not in the checkout, where it would have to be left behind.
    lock = FileLock(Path(tempfile.gettempdir()) / f"conam-zoo-pack-{path}.lock", timeout=LOCK_SECONDS, mode=0o666)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another process is packing weights into {checkout}: wait until it is done.") from error
    try:
        _mend(checkout)
        yield
    finally:
        lock.release()


@contextmanager
def scratch_folder(checkout: Path, name: str) -> Iterator[Path]:
    """A folder in the checkout to build a folder of weights in; ``packing`` finds it again after a kill."""
    with tempfile.TemporaryDirectory(dir=checkout, prefix=f"{SCRATCH}{name}-") as scratch:
        yield Path(scratch)


def exchange(new: Path, destination: Path, scratch: Path, confirm: Callable[[], None]) -> None:
    """Put a folder into its place and confirm that; if the confirmation fails, what was there comes back."""
    former = _former(scratch)
    destination.parent.mkdir(exist_ok=True)
    had_former = destination.exists()
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


def _former(scratch: Path) -> Path:
    """Where the folder that is replaced waits until the manifest names the new one."""
    return scratch / "former"


def _mend(checkout: Path) -> None:
    """Bring folders and manifest together again where a kill parted them, and clear what it left."""
    for leaving in checkout.glob(".weights_manifest.json.*"):
        leaving.unlink(missing_ok=True)
    for scratch in sorted(checkout.glob(f"{SCRATCH}*")):
        name = scratch.name.removeprefix(SCRATCH).rpartition("-")[0]
        entry = load_manifest(checkout / "weights_manifest.json").entries.get(name)
        destination, former = checkout / "weights" / name, _former(scratch)
        if name and not (entry and _is(destination / entry.file, entry.sha256)):
            if former.exists():
                shutil.rmtree(destination, ignore_errors=True)
                former.replace(destination)
            elif entry is None:  # moved into its place, but the manifest never named it
                shutil.rmtree(destination, ignore_errors=True)
        shutil.rmtree(scratch)


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256
