"""The run folder: whose it is, logs as CSV and TensorBoard events, the record of the run."""

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from conam_zoo.errors import UserError
from conam_zoo.files import clear_temporaries, make_folder, write_text
from conam_zoo.inputs import status
from conam_zoo.training.checkpoint import CHECKPOINT, has_checkpoint
from conam_zoo.training.distributed import run_on_primary
from conam_zoo.training.recipe import Recipe

__all__ = [
    "LIVENESS",
    "LOG",
    "LOG_FIELDS",
    "RUN",
    "RunLog",
    "check_free",
    "hold",
    "liveness_columns",
    "read_log",
    "read_run",
    "write_recipe",
    "write_run",
]

RUN, RECIPE, LOG, EVENTS = "run.json", "recipe.toml", "log.csv", "tensorboard"
LOCK, HOLDER = ".conam-lock", ".conam-holder"
# What a training that ended before its first checkpoint may have left, beside its lock. What is written later is not
# among it: a user's own report.md, recipe.toml or raw/ would be written over.
BEGINNINGS = {LOG, EVENTS, LOCK, HOLDER}
# What systems put into every folder.
SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}

LOG_FIELDS = ("epoch", "lr", "loss", "train_top1_percent", "holdout_top1_percent", "seconds")
LIVENESS = "liveness "  # with a site's module name behind it, the key of that site's liveness


def check_free(output: Path, resume: bool) -> None:
    """Refuse a folder in which a training may not write; nothing is written.

    Raises:
        UserError: If the folder holds a training and ``resume`` is False, or none and it is True; if it holds
            something else; or if another process is training in it.
    """
    if status(output) is not None and not output.is_dir():
        raise UserError(f"{output} is no folder: choose another --output.")
    if (output / LOCK).exists():
        _acquire(output).release()
    if resume:
        if not has_checkpoint(output):
            raise UserError(
                f"There is no checkpoint {output / CHECKPOINT} to resume from: leave --resume out to start anew."
            )
    elif has_checkpoint(output):
        raise UserError(f"{output} holds a training already: add --resume to continue it, or choose another --output.")
    elif (output / RUN).exists():
        raise UserError(f"{output} holds a finished training, without its checkpoint: choose another --output.")
    elif output.is_dir() and (other := _not_ours(output)):
        raise UserError(f"{output} is not empty and no run folder (it holds {other[0]!r}): choose another --output.")


def _not_ours(folder: Path) -> list[str]:
    ours = SYSTEM | (BEGINNINGS if (folder / LOCK).exists() else set())
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in ours and not name.startswith(".conam-tmp-")]


def _acquire(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK, is_singleton=True)  # this process may take it again
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            holder = (folder / HOLDER).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            holder = "another process"
        raise UserError(
            f"{folder} is in use: {holder} is training in it; wait for its end, or choose another --output."
        ) from None
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written ({error.strerror}): choose another.") from error
    return lock


@contextmanager
def hold(output: Path, resume: bool) -> Iterator[None]:
    """Make the run folder, and keep other trainings out of it for as long as the block lasts, or the process lives.

    In a process group rank 0 does so for all.

    Raises:
        UserError: If the folder cannot be written, or for any reason of ``check_free``.
    """
    with ExitStack() as held:

        def take() -> None:
            check_free(output, resume)
            make_folder(output)
            held.callback(_acquire(output).release)
            clear_temporaries(output)
            for name in ("final", "raw", "ema"):
                clear_temporaries(output / name)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            write_text(output / HOLDER, f"process {os.getpid()} on {platform.node()}, since {since},\n")

        run_on_primary(take)
        yield


class RunLog:
    """The log of a run, one row for each epoch: ``log.csv``, and events for TensorBoard in ``tensorboard/``.

    Args:
        folder: The run folder.
        rows: One for each epoch, with the keys ``LOG_FIELDS`` and one of ``liveness_columns`` for each ConAM; the
            caller appends to it. Where a run is resumed, it holds the epochs that are done, and events of later ones
            are taken back.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.rows = folder, rows
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=len(rows) + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._events.close()

    def write(self) -> None:
        """Log the last row."""
        row = self.rows[-1]
        text = io.StringIO()
        columns = (*LOG_FIELDS[:-1], *liveness_columns(self.rows), LOG_FIELDS[-1])
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / LOG, text.getvalue())
        for name in columns[1:]:
            if row.get(name) is not None:
                self._events.add_scalar(name.replace(" ", "/"), row[name], row["epoch"])
        self._events.flush()


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of ``log.csv``, as they are written.

    Raises:
        UserError: If the file is absent or no table.
    """
    path = folder / LOG
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no log of a training: copy the run folder again.") from error


def liveness_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The liveness columns of a log, ``liveness layer1.0.attn``, in order; logs of older versions have none."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(LIVENESS)))


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write ``recipe.toml``, every setting spelt out: ``conam train FOLDER/recipe.toml`` trains the same again."""
    write_text(folder / RECIPE, recipe.to_toml())


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write ``run.json``, which tells a finished run from one that is not."""
    write_text(folder / RUN, json.dumps(run, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` holds, or None if the run is not finished.

    Raises:
        UserError: If the file is damaged.
    """
    path = folder / RUN
    if not path.exists():
        return None
    remedy = "copy the run folder again, or remove the file, then --resume writes it anew"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no record of a run ({error}): {remedy}.") from error
    if not isinstance(run, dict):
        raise UserError(f"{path} is no record of a run (it holds no table): {remedy}.")
    return run
