"""Commands that train: train, record-teacher, distill."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import MODEL_HELP, Compile, Data, Settings, app, console
from conam_zoo.escape import for_shell

if TYPE_CHECKING:
    from conam_zoo.training.train import DryRun

RecipeName = Annotated[
    str, typer.Argument(help="A recipe of the package, such as resnet20_conam.cifar10, or a .toml file.")
]
Output = Annotated[Path, typer.Option(help="The run folder: checkpoints, logs, curves, and final/ with the weights.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the run folder.")]
CheckpointMinutes = Annotated[
    float,
    typer.Option(min=0, metavar="MINUTES", help="Save the state this often within an epoch, too; 0 for every step."),
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
    from conam_zoo.training.recipe import load_recipe

    chosen = load_recipe(recipe, settings)
    if dry_run:
        from conam_zoo.training.train import dry_run as try_steps

        told = try_steps(chosen, data, output, teacher_bank=teacher_bank, resume=resume, compile=compile)
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for row in _rows(told):
            table.add_row(*row)
        console().print(table)
        return
    from conam_zoo.training.train import train as run

    run(
        chosen,
        data,
        output,
        teacher_bank=teacher_bank,
        resume=resume,
        compile=compile,
        checkpoint_minutes=checkpoint_minutes,
        command=for_shell("conam", *sys.argv[1:]),
    )


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
    """Keep a teacher's outputs on a recipe's batches, for any number of trainings.

    The same command goes on after an interruption. conam train --teacher-bank reads the bank.
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

    The settings distill_weight and distill_temperature say how much, and of how soft an output.
    """
    settings = [*(settings or []), f"teacher={json.dumps(teacher)}"]
    train(recipe, data, output, settings, None, resume, dry_run, compile, checkpoint_minutes)


def _rows(told: "DryRun") -> list[tuple[str, str]]:
    held_out = f", and {told.held_out:,} held out" if told.held_out else ""
    compiling = f", and {told.compile_seconds:.0f} s for torch.compile" if told.compile_seconds is not None else ""
    steps = f"{told.epochs} epochs x {told.steps_per_epoch:,} = {told.total_steps:,}, of {told.batch_size} images"
    milliseconds = 1000 * told.seconds_per_step
    return [
        ("net", f"{told.model}, {told.parameters:,} parameters, {told.macs:,} multiply-accumulates an image"),
        ("images", f"{told.images:,} of {told.classes} classes from {told.source}{held_out}"),
        ("steps", steps),
        ("loading", told.loading),
        ("device", told.device),
        ("time", f"{milliseconds:.0f} ms a step, about {told.estimated_minutes:.1f} minutes in all{compiling}"),
        ("memory", f"{told.peak_memory_bytes / 2**20:,.0f} MiB at its peak"),
        ("output", f"{told.output}: {', '.join(told.files)}"),
        ("written", "nothing yet: leave --dry-run out to start"),
    ]
