"""The ``conam`` command: arguments in, calls out."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conam_zoo.errors import UserError

app = typer.Typer(
    name="conam",
    help="Small image classifiers with ConAM, the confidence attention module.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Small image classifiers with ConAM, the confidence attention module."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package, such as resnet20_conam.cifar10, or a .toml file.")],
    data: Annotated[str, typer.Option(help="Folder of images or arrays, or cifar10/cifar100 to download.")],
    output: Annotated[Path, typer.Option(help="The run folder.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="Replace a setting: --set epochs=5. Repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last whole epoch in the run folder.")] = False,
) -> None:
    """Train a recipe and evaluate once at the end."""
    from conam_zoo.training.recipe import load_recipe
    from conam_zoo.training.train import train as run

    run(load_recipe(recipe, settings), data, output, resume=resume, command=shlex.join(["conam", *sys.argv[1:]]))


def main() -> None:
    """Run the command; bad input ends in one sentence and exit code 2."""
    from conam_zoo.training.engine import NonFiniteLossError
    from conam_zoo.weights import ManifestError, WeightsError

    try:
        app()
    except (UserError, WeightsError, ManifestError, NonFiniteLossError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]conam:[/red] {error}", highlight=False)
        sys.exit(2)
