"""The command that trains many recipes: queue."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from conam_zoo.cli._shared import DATA_HELP, Compile, app, console
from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole
from conam_zoo.inputs import expand_path

if TYPE_CHECKING:
    from conam_zoo.training.queue import Job, Progress
    from conam_zoo.weights import WeightEntry


@app.command(
    rich_help_panel="For those who publish",
    epilog="Example: conam queue 'resnet20*' 'resnet56*' --data DATA --seed 0 --seed 1 --seed 2 --parallel 4",
)
def queue(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Patterns of packaged recipes, such as 'resnet*'; all if left out.")
    ] = None,
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "",
    output: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Seeds of each recipe; its own if left out. Repeatable.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of every recipe; nothing is packed then."),
    ] = None,
    teacher_bank: Annotated[
        Path | None,
        typer.Option(
            help="Logits that conam record-teacher kept, or a folder of such banks, named after the teachers."
        ),
    ] = None,
    compile: Compile = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what is done and what would be trained.")] = False,
) -> None:
    """Train all recipes whose weights are not there yet, one after the other or several at a time, and pack them.

    Called again, it goes on where it ended. A recipe whose weights are in the manifest is not trained again. The
    weights of the recipe's own seed are packed.
    """
    from conam_zoo.training.queue import plan_queue, run_queue
    from conam_zoo.training.run_folder import read_run
    from conam_zoo.weights import find_checkout, load_manifest

    if not data:
        raise UserError("The queue has no data: pass --data, a folder that holds cifar10/ and cifar100/.")
    checkout = find_checkout()
    if checkout is None and not settings:
        raise UserError("The queue packs weights into a checkout of conam_zoo: run from one.")
    entries = load_manifest().entries
    jobs = plan_queue(
        patterns or [],
        expand_path(output),
        seeds=seeds or [],
        settings=settings or [],
        teacher_bank=teacher_bank and expand_path(teacher_bank),
    )
    there = [job for job in jobs if job.ships and not job.is_done() and _ships_already(job, entries)]
    jobs = [job for job in jobs if job not in there]
    if dry_run:
        table = Table(box=None)
        for title in ("training", "epochs", "folder", "state"):
            table.add_column(title, overflow="fold")
        for job in (*there, *jobs):
            state = "in the manifest" if job in there else "done" if job.is_done() else "to be trained"
            table.add_row(job.name, str(job.recipe.epochs), str(job.folder), state)
        console().print(table)
        return

    out = console()
    lines = _Lines(out)

    def tell(job: "Job", event: str) -> None:
        out.print(f"{job.name}: {event}")

    def keep(job: "Job") -> None:
        if checkout is None or settings:
            return
        run = read_run(job.folder) or {}
        if job.ships and not _is_packed(job.folder, run):
            from conam_zoo.cli.publishing import pack

            pack(job.folder, data)
            (job.folder / "packed").write_text(run["sha256"], encoding="utf-8")

    with lines:
        results = run_queue(
            jobs, data, parallel=parallel, compile=compile, on_event=tell, on_done=keep, on_poll=lines.show
        )
    failed = {name: result for name, result in results.items() if result != "done"}
    out.print(f"{len(results) - len(failed)} done, {len(there)} in the manifest, {len(failed)} not done")
    if failed:
        raise typer.Exit(1)


def _ships_already(job: "Job", entries: "Mapping[str, WeightEntry]") -> bool:
    """Whether the manifest has weights of this recipe, or of one of at least as many epochs."""
    entry = entries.get(job.weights)
    return entry is not None and (entry.recipe == job.recipe_name or entry.epochs >= job.recipe.epochs)


def _is_packed(folder: Path, run: dict) -> bool:
    marker = folder / "packed"
    return marker.is_file() and marker.read_text(encoding="utf-8") == run.get("sha256")


class _Lines:
    """One line for each training that runs: on a terminal they stay in place, else one is printed for each epoch."""

    def __init__(self, out: PlainConsole) -> None:
        self._out = out
        self._live = Live(console=out, transient=True, auto_refresh=False) if out.is_terminal else None
        self._epochs: dict[str, int] = {}

    def __enter__(self) -> "_Lines":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, running: "Sequence[Job]") -> None:
        rows = [(job, job.progress()) for job in running]
        if self._live is not None:
            grid = Table.grid(padding=(0, 2))
            for job, progress in rows:
                grid.add_row(job.name, *(_cells(progress) if progress else (f"epoch 0/{job.recipe.epochs}",)))
            self._live.update(grid, refresh=True)
            return
        for job, progress in rows:
            if progress is not None and self._epochs.get(job.name) != progress.epoch:
                self._epochs[job.name] = progress.epoch
                self._out.print(f"{job.name}: {', '.join(_cells(progress))}")


def _cells(progress: "Progress") -> tuple[str, str, str]:
    images = "held out" if progress.held_out else "training"
    left = timedelta(seconds=round(progress.seconds_left))
    return (
        f"epoch {progress.epoch}/{progress.epochs}",
        f"{progress.top1_percent:.2f} % {images}",
        f"{left} left",
    )
