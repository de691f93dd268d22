"""Files that a user names: checked before they are opened, and written so that they are there whole or not at all."""

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from conam_zoo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Folders of ours, in which a file is filled before it is moved to its place, with whatever a library puts beside it.
_TEMPORARY = re.compile(r"\.conam-tmp-\d+-\w{8}~")

_OWN = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")  # what this process has open

REASONS: dict[int | None, str] = {
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
}


def expand_path(path: str | Path) -> Path:
    """A path with ``~`` and ``~name`` replaced; ``UserError`` for an unknown user, an empty path, or a zero byte."""
    if not str(path) or "\0" in str(path):
        raise UserError(f"The path {str(path)!r} is empty or holds a zero byte: name a file or folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with a home folder that does not exist: write the path out.") from error


def status(path: Path) -> os.stat_result | None:
    """What the system says of a path, links followed; None if there is nothing, ``UserError`` if it cannot be asked."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = REASONS.get(getattr(error, "errno", None), str(error))
        raise UserError(f"{path} cannot be opened, because {reason}: check the path.") from error


def check_file(path: Path, kind: str = "file") -> None:
    """Refuse (``UserError``) what is not a readable regular file; nothing is opened that could wait for ever."""
    found = status(path)
    a_kind = f"{'an' if kind[0] in 'aeiou' or kind.startswith('.n') else 'a'} {kind}"
    if found is None:
        raise UserError(f"There is no {kind} {path}: check the path.")
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is a folder, but it should be {a_kind}: name a file.")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is a pipe, a device or a socket, but it should be {a_kind}.")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be opened, because permission is denied: check its rights.")


def check_suffix(path: Path, suffix: str) -> None:
    """Refuse (``UserError``) a name for output that does not end in ``suffix``, such as ``.png``."""
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} cannot be written: its name has to end in {suffix}.")


def refuse_overwriting(outputs: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Refuse (``UserError``) to write onto what is read, or twice onto one file; links and hard links are followed.

    The outputs None and ``-`` are not files.
    """
    read: dict[object, Path] = {}
    for path in inputs:
        with suppress(UserError):  # what cannot be asked for cannot be written onto; reading it says why
            read[_identity(expand_path(path))] = path
    written: dict[object, Path] = {}
    for output in outputs:
        if output is None or str(output) == "-":
            continue
        identity = _identity(expand_path(output))
        if identity in read:
            raise UserError(f"{output} cannot be written: it is the input {read[identity]}; choose another name.")
        if identity in written:
            raise UserError(f"{output} cannot be written twice: choose another name for {written[identity]}.")
        written[identity] = output


def refuse_replacing(json_file: Path | None) -> None:
    """Refuse (``UserError``) to write JSON onto what is not called ``.json`` and does not begin as JSON does."""
    if json_file is None or json_file.suffix.lower() == ".json" or not expand_path(json_file).is_file():
        return
    try:
        with expand_path(json_file).open("rb") as file:
            begins = file.read(1)
    except OSError:
        return  # whatever writes it says why it cannot
    if begins not in (b"", b"{", b"["):
        raise UserError(f"{json_file} exists and is not JSON, so it is not replaced: choose another name.")


def _identity(path: Path) -> object:
    found = status(path)
    if found is None:
        return os.path.realpath(path)
    if stat.S_ISCHR(found.st_mode):
        return object()  # /dev/null and terminals: nothing is lost there
    return found.st_dev, found.st_ino


# --- writing --------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file on the same disk, then move it to ``path``.

    A link stays a link, and the file it points to is replaced; a device or a named pipe is written to. A file that is
    replaced keeps its permissions, a new one gets those of the umask. After a ``UserError`` all is as it was.
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
            raise UserError(f"{path} would be unreadable under this umask: set it, for instance by umask 022.")
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


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as one .npz file, as ``write_atomically`` does."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # numpy would add to a name that ends in .NPZ
            np.savez(file, **arrays)

    write_atomically(path, write)


def _is_special(path: Path) -> bool:
    """Whether to write into a path as it stands: a device, a pipe, or a file that some process has open."""
    name = os.path.abspath(path)
    if _OWN.fullmatch(name) or name.startswith("/proc/"):
        return path.exists() and not path.is_dir()
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
        raise UserError(f"{folder} would be unusable under this umask: set it, for instance by umask 022.")


def clear_temporaries(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, but not below it; nobody may be writing there."""
    for path in folder.glob(".conam-tmp-*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_figure(path: Path, figure: "Figure", **options: Any) -> None:
    """Write a matplotlib figure atomically, with options of ``savefig``, silent about letters that its font lacks.

    Its texts are never TeX, whatever the user's matplotlibrc says.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_usetex(False)
    with warnings.catch_warnings(), rc_context({"text.usetex": False}):
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
