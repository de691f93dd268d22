"""What a run leaves behind besides its weights: logs as CSV and TensorBoard events, the record of the run."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from conam_zoo.files import write_text
from conam_zoo.training.recipe import Recipe

__all__ = ["LIVENESS", "LOG_FIELDS", "RunLog", "liveness_columns", "write_recipe", "write_run"]

LOG_FIELDS = ("epoch", "lr", "loss", "train_top1_percent", "holdout_top1_percent", "seconds")
LIVENESS = "liveness "  # with a site's module name behind it, the key of that site's liveness


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
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=len(rows) + 1)

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
        write_text(self.folder / "log.csv", text.getvalue())
        for name in columns[1:]:
            if row.get(name) is not None:
                self._events.add_scalar(name.replace(" ", "/"), row[name], row["epoch"])
        self._events.flush()


def liveness_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The liveness columns of a log, ``liveness layer1.0.attn``, in order; logs of older versions have none."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(LIVENESS)))


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write ``recipe.toml``, every setting spelt out: ``conam train FOLDER/recipe.toml`` trains the same again."""
    write_text(folder / "recipe.toml", recipe.to_toml())


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write ``run.json``, which tells a finished run from one that is not."""
    write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
