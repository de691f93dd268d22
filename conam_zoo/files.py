"""Writing files so that they are either there whole or not there."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conam_zoo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["make_folder", "write_atomically", "write_figure", "write_text"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then move it to ``path``.

    Raises:
        UserError: If the file cannot be written; what stood at ``path`` before is still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp made it private
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): choose a folder with space and rights."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_figure(path: Path, figure: "Figure", **options: Any) -> None:
    """Write a matplotlib figure atomically, without warnings about letters that its font lacks.

    Args:
        path: The picture.
        figure: What to draw.
        **options: Of ``Figure.savefig``, such as ``dpi``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))


def make_folder(path: Path) -> Path:
    """Make a folder for output.

    Raises:
        UserError: If it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"The folder {path} cannot be written ({error.strerror or error}): choose another.") from error
    return path
