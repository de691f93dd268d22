"""Commands for a GPU that is available for a limited time: gpu split, gpu take, gpu train."""

from pathlib import Path
from typing import Annotated

import typer

from conam_zoo.cli._shared import console
from experiments.speed.commands import app

gpu = typer.Typer(help="Train the whole zoo on one GPU that is available for a limited time.", no_args_is_help=True)
app.add_typer(gpu, name="gpu")

Work = Annotated[
    Path,
    typer.Argument(help="The folder of the campaign on that machine, outside the checkout."),
]


@gpu.command(epilog="Example: python -m experiments gpu split data parts --part-mib 40")
def split(
    data: Annotated[Path, typer.Argument(help="A folder with cifar100/ and cifar10/.")],
    parts: Annotated[Path, typer.Argument(help="Where the parts go.")],
    part_mib: Annotated[int, typer.Option(min=1, help="Size of a part.")] = 40,
) -> None:
    """Cut the data sets into parts, so that they can be copied to the machine one at a time."""
    from conam_zoo.errors import UserError
    from experiments.gpu.parts import MIB, write_parts

    for dataset in ("cifar100", "cifar10"):
        if not (data / dataset).is_dir():
            raise UserError(f"{data} has no folder {dataset}: name the folder that holds both data sets.")
    for dataset in ("cifar100", "cifar10"):
        for part in write_parts(dataset, [data / dataset], data, parts, part_mib * MIB, prefix=Path("data")):
            console().print(str(part))


@gpu.command(epilog="Example: python -m experiments gpu take carried ~/campaign")
def take(
    source: Annotated[Path, typer.Argument(help="A folder with parts of data sets, or of what was handed back.")],
    work: Work,
) -> None:
    """Collect parts, some or all, and unpack the complete archives.

    Data sets go to WORK/data, trainings to WORK/runs. It also unpacks what was handed back, so that a campaign can
    continue on a fresh machine.
    """
    from experiments.gpu.parts import join_parts

    unpacked, missing = join_parts(source, work)
    for archive in unpacked:
        console().print(f"{archive}: unpacked")
    for line in missing:
        console().print(line)


@gpu.command(epilog="Example: python -m experiments gpu train ~/campaign --out $OUT --minutes 8 --compile")
def train(
    work: Work,
    out: Annotated[Path, typer.Option(help="What is handed back: logs.tar, and weights in at most 7 parts.")],
    minutes: Annotated[
        float, typer.Option(min=0, help="Time for training; saving and handing back take one more. 0: hand back only.")
    ] = 8.0,
    parallel: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 6,
    nets: Annotated[
        list[str] | None,
        typer.Option("--net", help="Weights of the table; repeatable. Default: all."),
    ] = None,
    length: Annotated[str, typer.Option(help="Which recipe where a net has several: campaign, or long.")] = "campaign",
    bank_epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of a bank, an even number; students with more epochs start it over.")
    ] = 100,
    limit_mib: Annotated[int, typer.Option(min=1, help="Size of all that is handed back in one call.")] = 60,
    again: Annotated[bool, typer.Option("--again", help="Hand back what was handed back before as well.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Train with torch.compile.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of all recipes: a trial.")
    ] = None,
) -> None:
    """Train until the time is up, teachers first, and hand back logs and finished weights.

    Repeat the command to go on where it stopped.
    """
    from conam_zoo.errors import UserError
    from conam_zoo.weights import find_checkout
    from experiments.gpu.campaign import MAX_FILES, PART_BYTES, deliver, deliver_logs, prepare_code, run_tasks
    from experiments.gpu.parts import MIB
    from experiments.gpu.plan import NETS, plan_tasks

    checkout = find_checkout()
    if checkout is None:
        raise UserError("The weights are packed into a checkout of conam_zoo: run from one.")
    work = work.expanduser().resolve()
    prepare_code(checkout, work, length, settings or [])
    tasks = plan_tasks(work, nets=nets or list(NETS), length=length, bank_epochs=bank_epochs, compile=compile)

    def report(line: str) -> None:
        console().print(line)

    state = run_tasks(
        tasks, work, seconds=60 * minutes, parallel=parallel, report=report, each_while=lambda: deliver_logs(work, out)
    )
    handed, left = deliver(tasks, work, out, limit_bytes=limit_mib * MIB, again=again)
    for task in tasks:
        console().print(f"{task.name}: {state[task.name]}{', handed back' if task.name in handed else ''}")
    if left:
        most = (MAX_FILES - 1) * PART_BYTES // MIB
        console().print(
            f"No room for {', '.join(left)}: repeat the command, with --minutes 0 to hand back only. A state of more "
            f"than {most} MiB never fits."
        )
    if failed := [name for name, result in state.items() if result.startswith("failed")]:
        console().print(f"{len(failed)} failed: their logs are in logs.tar")
        raise typer.Exit(1)
