"""The ``conam`` command: arguments in, calls out. ``conam --help`` lists the commands in the order of the imports."""

# ruff: noqa: I001 (the order of the imports is that of the help)
import logging
import sys

import typer

from conam_zoo.cli import (  # noqa: F401 (each registers its commands)
    zoo,
    predicting,
    explaining,
    training,
    finetuning,
    publishing,
    queueing,
)
from conam_zoo.cli._heap import keep_freed_memory
from conam_zoo.cli._shared import app
from conam_zoo.errors import UserError

__all__ = ["app", "main", "run_app"]


def main() -> None:
    """Run the ``conam`` command."""
    run_app(app, "conam")


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command; bad input ends in one sentence and exit code 2."""
    from conam_zoo.training.engine import NonFiniteLossError
    from conam_zoo.training.stopping import TrainingStopped
    from conam_zoo.weights import ManifestError, WeightsError

    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="conam: %(message)s")
    try:
        app(prog_name=name)
    except (UserError, WeightsError, ManifestError, NonFiniteLossError) as error:
        sys.stderr.write(f"conam: {error}\n")
        sys.exit(2)
    except TrainingStopped as stop:
        sys.stderr.write(f"conam: {stop}\n")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("conam: interrupted\n")
        sys.exit(130)
