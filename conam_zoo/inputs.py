"""Paths that a user names for reading: checked before anything is opened, and never written to."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from conam_zoo.errors import UserError

__all__ = ["check_file", "check_suffix", "expand_path", "refuse_overwriting", "refuse_replacing", "status"]

REASONS: dict[int | None, str] = {
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
}


def expand_path(path: str | Path) -> Path:
    """A path with ``~`` and ``~name`` replaced by the home folder.

    Raises:
        UserError: If there is no such user, or the path is empty or holds a zero byte.
    """
    if not str(path) or "\0" in str(path):
        raise UserError(f"The path {str(path)!r} is empty or holds a zero byte: name a file or folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with a home folder that does not exist: write the path out.") from error


def status(path: Path) -> os.stat_result | None:
    """What the system says of a file or folder, links followed; None if there is none.

    Raises:
        UserError: If it cannot be asked: no permission on the way, a name that is too long, links in a circle.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = REASONS.get(getattr(error, "errno", None), str(error))
        raise UserError(f"{path} cannot be opened, because {reason}: check the path.") from error


def check_file(path: Path, kind: str = "file") -> None:
    """Refuse what is no regular file that can be read; nothing is opened that could wait for ever.

    Raises:
        UserError: If it is missing, a folder, a pipe, a device or a socket, or may not be read.
    """
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
    """Refuse to write onto what is read, whatever the two are called: links and hard links are followed.

    The outputs None and ``-`` are no files.

    Raises:
        UserError: If an output is an input, or two outputs are one file.
    """
    read: dict[object, Path] = {}
    for path in inputs:
        with suppress(UserError):  # what cannot be asked for cannot be written onto; reading it tells why
            read[_identity(path)] = path
    written: dict[object, Path] = {}
    for output in outputs:
        if output is None or str(output) == "-":
            continue
        identity = _identity(output)
        if identity in read:
            raise UserError(f"{output} cannot be written: it is the input {read[identity]}; choose another name.")
        if identity in written:
            raise UserError(f"{output} cannot be written twice: choose another name for {written[identity]}.")
        written[identity] = output


def refuse_replacing(json_file: Path | None) -> None:
    """Refuse to write JSON onto a file that is something else, such as a picture of a data set.

    Raises:
        UserError: If the file is there, is not called ``.json``, and does not begin as JSON does.
    """
    if json_file is None or json_file.suffix.lower() == ".json" or not json_file.is_file():
        return
    try:
        with json_file.open("rb") as file:
            begins = file.read(1)
    except OSError:
        return  # what writes it tells why it cannot
    if begins not in (b"", b"{", b"["):
        raise UserError(f"{json_file} is there and no JSON, so it is not replaced: choose another name.")


def _identity(path: Path) -> object:
    found = status(path)
    if found is None:
        return os.path.realpath(path)
    if stat.S_ISCHR(found.st_mode):
        return object()  # /dev/null and terminals: nothing is lost there
    return found.st_dev, found.st_ino
