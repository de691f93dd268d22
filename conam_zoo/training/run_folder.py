"""What a run leaves behind besides its weights: logs as CSV and TensorBoard events, the record of the run."""

import csv
import io
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from conam_zoo.files import write_text
from conam_zoo.training.recipe import Recipe

__all__ = ["LOG_FIELDS", "RunLog", "write_recipe", "write_run"]

LOG_FIELDS = ("epoch", "lr", "loss", "train_top1_percent", "holdout_top1_percent", "seconds")


class RunLog:
    """The log of a run, one row for each epoch: ``log.csv``, and events for TensorBoard in ``tensorboard/``.

    Args:
        folder: The run folder.
        rows: One for each epoch, with the keys ``LOG_FIELDS``; the caller appends to it. Where a run is resumed, it
            holds the epochs that are done, and events of later ones are taken back.
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
        writer = csv.DictWriter(text, LOG_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / "log.csv", text.getvalue())
        for name in LOG_FIELDS[1:]:
            if row[name] is not None:
                self._events.add_scalar(name, row[name], row["epoch"])
        self._events.flush()


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write ``recipe.toml``, every setting spelt out: ``conam train FOLDER/recipe.toml`` trains the same again."""
    write_text(folder / "recipe.toml", recipe.to_toml())


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write ``run.json``, which tells a finished run from one that is not."""
    write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
