"""The run folder: whose it is, logs as CSV, TensorBoard events and curves, the weights and the record of the run."""

import csv
import io
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from conam_zoo.errors import UserError
from conam_zoo.escape import for_matplotlib
from conam_zoo.files import clear_temporaries, make_folder, status, write_figure, write_text
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import export_model
from conam_zoo.training.checkpoint import CHECKPOINT, has_checkpoint
from conam_zoo.training.distributed import ranks, run_on_primary
from conam_zoo.training.recipe import Recipe
from conam_zoo.weights.manifest import EVEN, find_checkout

RUN, RECIPE, LOG, EVENTS = "run.json", "recipe.toml", "log.csv", "tensorboard"
LOCK, HOLDER = ".conam-lock", ".conam-holder"
# What a training that ended before its first checkpoint may have left, beside its lock. What is written later is not
# among it: a user's own report.md, recipe.toml or raw/ would be written over.
BEGINNINGS = {LOG, EVENTS, LOCK, HOLDER}
# What systems put into every folder.
SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}

LOG_FIELDS = ("epoch", "lr", "loss", "train_top1_percent", "holdout_top1_percent", "seconds")
LIVENESS = "liveness "  # with a site's module name behind it, the key of that site's liveness
LIBRARIES = ("torch", "torchvision", "timm", "safetensors", "numpy")


def check_free(output: Path, resume: bool) -> None:
    """Refuse a folder that another process uses, or that holds no training to ``resume``, or else anything."""
    if status(output) is not None and not output.is_dir():
        raise UserError(f"{output} is not a folder: choose another --output.")
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
    elif output.is_dir():
        ours = SYSTEM | (BEGINNINGS if (output / LOCK).exists() else set())
        for name in sorted(path.name for path in output.iterdir()):
            if name not in ours and not name.startswith(".conam-tmp-"):
                raise UserError(
                    f"{output} is not empty and no run folder (it holds {name!r}): choose another --output."
                )


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
    """Check and make the run folder, and keep other trainings out of it while the block lasts."""
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
    """The log of a run: ``log.csv``, and events for TensorBoard, of which those after the last of ``rows`` are dropped.

    The caller appends a row (``LOG_FIELDS``, and the liveness of each ConAM) to ``rows`` and calls ``write``.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.rows = folder, rows
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=len(rows) + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with suppress(OSError) if kind else nullcontext():  # it would take the place of what went wrong
            self._events.close()

    def write(self) -> None:
        """Log the last row."""
        row = self.rows[-1]
        text = io.StringIO()
        columns = (*LOG_FIELDS[:-1], *_liveness_columns(self.rows), LOG_FIELDS[-1])
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / LOG, text.getvalue())
        try:
            for name in columns[1:]:
                if row.get(name) is not None:
                    self._events.add_scalar(name.replace(" ", "/"), row[name], row["epoch"])
            self._events.flush()
        except OSError as error:
            raise UserError(
                f"{self.folder / EVENTS} cannot be written ({error.strerror or error}): the checkpoints before are "
                "kept, so make room and continue with --resume."
            ) from error


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of ``log.csv`` as texts; a file that is absent or no table is refused."""
    path = folder / LOG
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no log of a training: copy the run folder again.") from error


def _liveness_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The liveness columns of a log, ``liveness layer1.0.attn``, in order; logs of older versions have none."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(LIVENESS)))


def draw_curves(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss, accuracy, learning rate and, where the log has it, each site's liveness over the epochs as a PNG."""
    from matplotlib.figure import Figure

    marker = "o" if len(log) == 1 else ""  # a line of one point cannot be seen
    sites = _liveness_columns(log)
    panels = 4 if sites else 3
    figure = Figure(figsize=(3.4 * panels, 3.4), layout="constrained")
    loss, accuracy, rate, *further = figure.subplots(1, panels)

    def plot(axes: Any, column: str, **options: Any) -> None:
        values = [row.get(column, math.nan) for row in log]
        axes.plot([row["epoch"] for row in log], values, marker=marker, **options)

    plot(loss, "loss", color="tab:blue")
    loss.set_ylabel("training loss")
    plot(accuracy, "train_top1_percent", color="tab:blue", label="training, augmented")
    if log[0]["holdout_top1_percent"] is not None:
        plot(accuracy, "holdout_top1_percent", color="tab:orange", label="held out")
    accuracy.set_ylabel("top-1 (%)")
    accuracy.legend(loc="lower right", frameon=False)
    plot(rate, "lr", color="tab:gray")
    rate.set_ylabel("learning rate at the epoch's end")
    for alive in further:
        for column in sites:
            plot(alive, column, label=column.removeprefix(LIVENESS))
        alive.axhline(EVEN, color="black", linewidth=0.8, linestyle="--", label=f"{EVEN:.0%}: even below")
        alive.set_ylabel("liveness: std / mean over the patches")
        alive.set_ylim(bottom=0)
        alive.legend(frameon=False, fontsize="small")
    for axes in (loss, accuracy, rate, *further):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(for_matplotlib(title))
    write_figure(path, figure, dpi=120)


def read_run(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` holds, or None if the run is not finished; a damaged file is refused."""
    path = folder / RUN
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a run record ({error}): copy the run folder again, or remove the file, then --resume "
            "writes it anew."
        ) from error
    return run


@dataclass(frozen=True)
class FitResult:
    """What a training ends in."""

    final: StagedClassifier  # the net whose weights the recipe ships, raw or ema
    raw: StagedClassifier  # as the optimiser left it
    ema: StagedClassifier | None  # the moving average over the steps
    log: list[dict[str, Any]]  # one row for each epoch, as RunLog takes it
    history: list[dict[str, Any]]  # the environments that it ran in, each with the epoch that it began in
    train_minutes: float  # that the epochs took, over all interruptions
    compile_seconds: float | None  # of the first step, most of it compilation; None without compile


def export_run(result: FitResult, recipe: Recipe, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Write what a finished training leaves: recipe, weights, curves, and ``run.json``, which is returned, at the end.

    It gets ``sha256`` of the weights in ``final/`` and, if there is a moving average, ``other_sha256`` of the others.
    """
    write_text(output / RECIPE, recipe.to_toml())
    run = {**run, "sha256": export_model(result.final, output / "final", tag=None)}
    if result.ema is not None:
        other, name = (result.raw, "raw") if result.final is result.ema else (result.ema, "ema")
        run["other_sha256"] = export_model(other, output / name, tag=None)
    draw_curves(result.log, output / "curves.png", title=f"{recipe.model} on {recipe.dataset}")
    write_text(output / RUN, json.dumps(run, indent=2) + "\n")
    return run


def describe_environment() -> dict[str, Any]:
    """``hardware`` of all processes, taken to be like this one, ``library_versions``, and ``code_commit`` or None."""
    return {
        "hardware": _hardware(),
        "library_versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "code_commit": _commit(),
    }


def where_it_ran(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The environment of a training for its record; of several the last, hardware and precision of all, and each."""
    if len(history) == 1:
        return {key: value for key, value in history[0].items() if key != "begun_in_epoch"}
    joined = {key: ", then ".join(dict.fromkeys(part[key] for part in history)) for key in ("hardware", "precision")}
    return {**{key: history[-1][key] for key in ("library_versions", "code_commit")}, **joined, "history": history}


def _hardware() -> str:
    processes = ranks().world_size
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name(0)}"
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    cpu = named[1].strip() if named else platform.processor() or platform.machine()
    several = f"{processes} processes with " if processes > 1 else ""
    threads = torch.get_num_threads()
    return f"{several}{threads} CPU thread{'' if threads == 1 else 's'} ({cpu})"


def _commit() -> str | None:
    """The commit, with ``-dirty`` if code or weights differ from it: documents and records change nothing measured."""
    if find_checkout() is None:  # an installed package may lie in the repository of another project
        return None

    def git(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        commit = git("describe", "--always", "--abbrev=12").stdout.strip()
        dirty = git(
            "diff",
            "--quiet",
            "HEAD",
            "--",
            ":/",
            *(f":(top,exclude){path}" for path in ("*.md", "docs", "experiments/results")),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit}{'-dirty' if dirty.returncode else ''}" if commit else None
