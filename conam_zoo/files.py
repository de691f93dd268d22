"""Writing files so that they are either there whole or not there."""

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from conam_zoo.errors import UserError
from conam_zoo.inputs import expand_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["clear_temporaries", "make_folder", "write_atomically", "write_figure", "write_text"]

# Folders of ours, in which a file is filled before it is moved to its place, with whatever a library puts beside it.
_TEMPORARY = re.compile(r"\.conam-tmp-\d+-\w{8}~")

_OWN = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")  # what this process has open


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file on the same disk, then move it to ``path``.

    A link stays a link, and the file it points to is replaced; a device or a named pipe is written to. A file that is
    replaced keeps its permissions, a new one gets those of the umask.

    Raises:
        UserError: If the file cannot be written; what stood at ``path`` before is still there.
    """
    folder, path = None, expand_path(path)
    try:
        special = _is_special(path)
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not special:
            _make_parents(target.parent)
        parent = None if special else target.parent
        folder = Path(tempfile.mkdtemp("~", f".conam-tmp-{os.getpid()}-", parent))
        folder.chmod(0o700)  # whatever the umask says
        temporary = folder / f"file{path.suffix}"  # libraries go by the suffix
        temporary.touch()
        mode = stat.S_IMODE((target if target.is_file() and not special else temporary).stat().st_mode)
        if mode & 0o600 != 0o600 and not target.exists():
            raise UserError(f"{path} could be read by nobody under this umask: set it, for instance by umask 022.")
        write(temporary)
        if special:
            with temporary.open("rb") as source, _open_special(path) as sink:
                shutil.copyfileobj(source, sink)
        else:
            temporary.chmod(mode)  # safetensors makes its files private
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}): choose a folder with space and rights.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _is_special(path: Path) -> bool:
    """Whether to write into a path as it stands: a device, a pipe, or a file that some process has open."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")) and path.exists():
        return not path.is_dir()
    return path.exists() and not path.is_file() and not path.is_dir()


def _open_special(path: Path) -> BinaryIO:
    if own := _OWN.fullmatch(os.path.abspath(path)):  # opened by its name, a file would be written from its beginning
        sys.stdout.flush()
        sys.stderr.flush()
        return os.fdopen(os.dup(int(own[2] or {"stdout": 1, "stderr": 2}[own[1]])), "wb")
    return path.open("ab")


def _make_parents(folder: Path) -> None:
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if made and folder.stat().st_mode & 0o700 != 0o700:
        for parent in made:
            parent.rmdir()
        raise UserError(f"{folder} could be used by nobody under this umask: set it, for instance by umask 022.")


def clear_temporaries(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, but not below it; nobody may be writing there."""
    for path in folder.glob(".conam-tmp-*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_figure(path: Path, figure: "Figure", **options: Any) -> None:
    """Write a matplotlib figure atomically, with options of ``savefig``, silent about letters that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))


def make_folder(path: Path) -> Path:
    """Make a folder for output, or raise a ``UserError`` if it cannot be made or written to."""
    path = expand_path(path)
    try:
        _make_parents(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"The folder {path} cannot be written ({error.strerror or error}): choose another.") from error
    return path
