"""Commands that train: train, distill."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import DATA_HELP, MODEL_HELP, app, console
from conam_zoo.escape import for_shell

RecipeName = Annotated[
    str, typer.Argument(help="A recipe of the package, such as resnet20_conam.cifar10, or a .toml file.")
]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Output = Annotated[Path, typer.Option(help="The run folder: checkpoints, logs, curves, and final/ with the weights.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe. Repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the run folder.")]
Compile = Annotated[bool, typer.Option("--compile", help="Run the net through torch.compile.")]
CheckpointMinutes = Annotated[
    float,
    typer.Option(min=0, metavar="MINUTES", help="Save the state this often within an epoch, too; 0 for every step."),
]
TeacherBank = Annotated[
    Path | None,
    typer.Option(help="Read the teacher's outputs from what conam record-teacher kept here, instead of running it."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, its time and memory; write nothing.")]


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
    dry_run: DryRun = False,
    compile: Compile = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
) -> None:
    """Train a recipe, then evaluate once on the test split.

    The test split is not opened before the end.
    """
    _train(recipe, data, output, settings, resume, dry_run, compile, checkpoint_minutes, teacher_bank)


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
    from conam_zoo.training.record_teacher import record_teacher as record

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
    dry_run: DryRun = False,
    compile: Compile = False,
    checkpoint_minutes: CheckpointMinutes = 10.0,
) -> None:
    """Train a recipe whose net also learns from the outputs of a teacher.

    The settings distill_weight and distill_temperature say how much, and of how soft an output.
    """
    settings = [*(settings or []), f"teacher={json.dumps(teacher)}"]
    _train(recipe, data, output, settings, resume, dry_run, compile, checkpoint_minutes)


def _train(
    name: str,
    data: str,
    output: Path,
    settings: list[str] | None,
    resume: bool,
    dry_run: bool,
    compile: bool,
    checkpoint_minutes: float,
    teacher_bank: Path | None = None,
) -> None:
    from conam_zoo.training.recipe import load_recipe

    recipe = load_recipe(name, settings)
    if dry_run:
        from conam_zoo.training.dry_run import plan

        facts = asdict(plan(recipe, data, output, teacher_bank=teacher_bank, resume=resume, compile=compile))
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, text in _plan_rows(facts):
            table.add_row(key, text)
        console().print(table)
        return
    from conam_zoo.training.train import train as run

    run(
        recipe,
        data,
        output,
        teacher_bank=teacher_bank,
        resume=resume,
        compile=compile,
        checkpoint_minutes=checkpoint_minutes,
        command=for_shell("conam", *sys.argv[1:]),
    )


def _plan_rows(plan: dict) -> list[tuple[str, str]]:
    held_out = f", and {plan['held_out']:,} held out" if plan["held_out"] else ""
    minutes, compiled = plan["estimated_minutes"], plan["compile_seconds"]
    compiling = f", and {compiled:.0f} s for torch.compile" if compiled is not None else ""
    return [
        ("net", f"{plan['model']}, {plan['parameters']:,} parameters, {plan['macs']:,} multiply-accumulates an image"),
        ("images", f"{plan['images']:,} of {plan['classes']} classes from {plan['source']}{held_out}"),
        (
            "steps",
            f"{plan['epochs']} epochs x {plan['steps_per_epoch']:,} = {plan['total_steps']:,}, "
            f"of {plan['batch_size']} images",
        ),
        ("loading", plan["loading"]),
        ("device", plan["device"]),
        ("time", f"{plan['seconds_per_step'] * 1000:.0f} ms a step, about {minutes:.1f} minutes in all{compiling}"),
        ("memory", f"{plan['peak_memory_bytes'] / 2**20:,.0f} MiB at its peak"),
        ("output", f"{plan['output']}: {', '.join(plan['files'])}"),
        ("written", "nothing yet: leave --dry-run out to start"),
    ]
