"""``python -m experiments``: the commands of both kinds, and the words for what goes wrong."""

from conam_zoo.cli import run_app
from experiments.accuracy import commands  # noqa: F401 (registers its commands)
from experiments.gpu import commands as gpu_commands  # noqa: F401 (registers its commands)
from experiments.speed.commands import app


def main() -> None:
    """Run the command."""
    run_app(app, "python -m experiments")


if __name__ == "__main__":
    main()
