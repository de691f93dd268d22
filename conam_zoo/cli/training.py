"""Commands that train: train, record-teacher, distill, and queue for many recipes."""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from conam_zoo.cli._shared import MODEL_HELP, Compile, Data, Settings, app, console
from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole, for_shell
from conam_zoo.files import expand_path

if TYPE_CHECKING:
    from conam_zoo.training.queue import Job, Progress

RecipeName = Annotated[
    str, typer.Argument(help="A recipe of the package, such as resnet20_conam.cifar10, or a .toml file.")
]
Output = Annotated[Path, typer.Option(help="The run folder: checkpoints, logs, curves, and final/ with the weights.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the run folder.")]
CheckpointMinutes = Annotated[
    float,
    typer.Option(min=0, metavar="MINUTES", help="Also save the state this often within an epoch; 0 for every step."),
]
TeacherBank = Annotated[
    Path | None,
    typer.Option(help="Read the teacher's outputs from what conam record-teacher kept here, instead of running it."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, its time and memory; write nothing.")
]


@app.command(
    epilog="Example: conam train resnet20_conam.cifar10 --data cifar10 --output runs/first --set epochs=1. "
    "Several devices: torchrun --nproc_per_node=2 -m conam_zoo train ..."
)
def train(
    recipe: RecipeName,
    data: Data,
    output: Output,
    settings: Settings = None,
    teacher_bank: TeacherBank = None,
    resume: Resume = False,
    dry_run: DryRunOption = False,
    compile: Compile = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
) -> None:
    """Train a recipe, then evaluate once on the test split.

    The test split is not opened before the end.
    """
    from conam_zoo.training import train as training
    from conam_zoo.training.recipe import load_recipe

    chosen = load_recipe(recipe, settings)
    options: dict[str, Any] = {"teacher_bank": teacher_bank, "compile": compile}
    if not dry_run:
        options |= {"resume": resume, "checkpoint_minutes": checkpoint_minutes}
        training.train(chosen, data, output, **options, command=for_shell("conam", *sys.argv[1:]))
        return
    if resume:
        raise UserError("A dry run describes a training from its start: leave out --resume or --dry-run.")
    plan = training.dry_run(chosen, data, output, **options)
    held_out = ", and {held_out:,} held out" if plan["held_out"] else ""
    compiling = ", and {compile_seconds:.0f} s for torch.compile" if compile else ""
    values = plan | {
        "milliseconds": 1000 * plan["seconds_per_step"],
        "mebibytes": (plan["peak_memory_bytes"] or math.nan) / 2**20,
        "made": ", ".join(plan["files"]),
    }
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in (
        ("net", "{model}, {parameters:,} parameters, {macs:,} multiply-accumulates an image"),
        ("images", "{images:,} of {classes} classes from {source}" + held_out),
        ("steps", "{epochs} epochs x {steps_per_epoch:,} = {total_steps:,}, of {batch_size} images"),
        ("loading", "{loading}"),
        ("device", "{device}"),
        ("time", "{milliseconds:.0f} ms a step, about {estimated_minutes:.1f} minutes in all" + compiling),
        ("memory", "{mebibytes:,.0f} MiB at its peak"),
        ("output", "{output}: {made}"),
        ("written", "nothing yet: leave --dry-run out to start"),
    ):
        table.add_row(label, text.format_map(values))
    console().print(table)


@app.command(
    epilog="Example: conam record-teacher resnet20_conam.cifar10 --set teacher=wide_resnet16_4_conam.cifar10 "
    "--data cifar10 --output banks/cifar10"
)
def record_teacher(
    recipe: RecipeName,
    data: Data,
    output: Annotated[Path, typer.Option(help="The bank: a folder with a file of logits for each epoch.")],
    settings: Settings = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="How many epochs; those of the recipe if not given.")
    ] = None,
) -> None:
    """Record a teacher's outputs on a recipe's batches, for any number of trainings.

    Repeat the command after an interruption. conam train --teacher-bank reads the bank.
    """
    from conam_zoo.training.recipe import load_recipe
    from conam_zoo.training.train import record_teacher as record

    record(load_recipe(recipe, settings), data, output, epochs=epochs)


@app.command(
    epilog="Example: conam distill resnet32_conam.cifar10 --teacher resnet20_conam.cifar10 --data cifar10 "
    "--output runs/learnt"
)
def distill(
    recipe: RecipeName,
    teacher: Annotated[str, typer.Option(help=f"The net to learn from. {MODEL_HELP}")],
    data: Data,
    output: Output,
    settings: Settings = None,
    resume: Resume = False,
    dry_run: DryRunOption = False,
    compile: Compile = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
) -> None:
    """Train a recipe whose net also learns from the outputs of a teacher.

    --set distill_weight=0.9 sets how much (dkd_alpha and dkd_beta do where the recipe's distill_loss is dkd), and
    distill_temperature how far the outputs are softened.
    """
    settings = [*(settings or []), f"teacher={json.dumps(teacher, ensure_ascii=False)}"]
    train(recipe, data, output, settings, None, resume, dry_run, compile, checkpoint_minutes)


@app.command(
    rich_help_panel="For those who publish",
    epilog="Example: conam queue 'resnet20*' 'resnet56*' --data DATA --seed 0 --seed 1 --seed 2 --parallel 4",
)
def queue(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Patterns of packaged recipes, such as 'resnet*'; all if left out.")
    ] = None,
    data: Annotated[str, typer.Option(help="A folder that holds cifar10/ and cifar100/; see --data of train.")] = "",
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
    """Train all recipes that have no weights yet, one or several at a time, and pack the weights.

    Run again, it resumes where it stopped. A recipe whose weights are in the manifest is not trained again. The
    weights of the recipe's own seed are packed, unless the manifest has those of another recipe with at least as many
    epochs.
    """
    from conam_zoo.training.queue import plan_queue, run_queue
    from conam_zoo.training.run_folder import read_run
    from conam_zoo.weights import find_checkout, load_manifest

    if not data:
        raise UserError("The queue has no data: pass --data, a folder that holds cifar10/ and cifar100/.")
    if find_checkout() is None and not settings:
        raise UserError("The queue packs weights into a checkout of conam_zoo: run from one.")
    entries = load_manifest().entries
    jobs = plan_queue(
        patterns or [],
        expand_path(output),
        seeds=seeds or [],
        settings=settings or [],
        teacher_bank=teacher_bank and expand_path(teacher_bank),
    )

    def ships_already(job: "Job") -> bool:
        """Whether the manifest has weights of this recipe, or of one of at least as many epochs."""
        try:
            done = job.is_done()
        except UserError:
            done = False  # its record is damaged: unless there are weights, the job itself will say so
        entry = entries.get(job.weights) if job.ships and not done else None
        return entry is not None and (entry.recipe == job.recipe_name or entry.epochs >= job.recipe.epochs)

    there = [job for job in jobs if ships_already(job)]
    jobs = [job for job in jobs if job not in there]
    out = console()
    if dry_run:
        table = Table(box=None)
        for title in ("training", "epochs", "folder", "state"):
            table.add_column(title, overflow="fold")
        for job in (*there, *jobs):
            try:
                state = "in the manifest" if job in there else "done" if job.is_done() else "to be trained"
            except UserError as error:
                state = str(error)
            table.add_row(job.name, str(job.recipe.epochs), str(job.folder), state)
        out.print(table)
        return

    def keep(job: "Job") -> None:
        from conam_zoo.cli.publishing import pack
        from conam_zoo.release.documents import our_checkout
        from conam_zoo.release.pack import PACKED

        if settings or not job.ships:
            return
        # Read anew: another command may have packed meanwhile.
        entry = load_manifest(our_checkout() / "weights_manifest.json").entries.get(job.weights)
        if entry is not None and entry.recipe != job.recipe_name and entry.epochs >= job.recipe.epochs:
            out.print(
                f"{job.name}: not packed: the manifest has weights of {entry.recipe}, trained for {entry.epochs} epochs"
            )
            return
        marker, run = job.folder / PACKED, read_run(job.folder) or {}
        packed = marker.is_file() and marker.read_text(encoding="utf-8") == run.get("sha256")
        if not packed or entry is None or entry.recipe != job.recipe_name:
            pack(job.folder, data)

    live = Live(console=out, transient=True, auto_refresh=False) if out.is_terminal else None
    reported: dict[str, int] = {}
    with live or nullcontext():
        results = run_queue(
            jobs,
            data,
            parallel=parallel,
            compile=compile,
            on_event=lambda job, event: out.print(f"{job.name}: {event}"),
            on_done=keep,
            on_poll=lambda running: _show(running, out, live, reported),
        )
    unfinished = [job for job in jobs if results.get(job.name) != "done"]
    out.print(f"{len(jobs) - len(unfinished)} done, {len(there)} in the manifest, {len(unfinished)} not done")
    if unfinished:
        raise typer.Exit(1)


def _show(running: "Sequence[Job]", out: PlainConsole, live: Live | None, reported: dict[str, int]) -> None:
    """One line for each training that runs: on a terminal they stay in place, else one is printed for each epoch."""
    grid = Table.grid(padding=(0, 2))
    for job in running:
        progress = job.progress()
        grid.add_row(job.name, *(_cells(progress) if progress else (f"epoch 0/{job.recipe.epochs}",)))
        if live is None and progress is not None and reported.get(job.name) != progress.epoch:
            reported[job.name] = progress.epoch
            out.print(f"{job.name}: {', '.join(_cells(progress))}")
    if live is not None:
        live.update(grid, refresh=True)


def _cells(progress: "Progress") -> tuple[str, str, str]:
    images = "held out" if progress.held_out else "training"
    left = timedelta(seconds=round(progress.seconds_left))
    return (
        f"epoch {progress.epoch}/{progress.epochs}",
        f"{progress.top1_percent:.2f} % {images}",
        f"{left} left",
    )
