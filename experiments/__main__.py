"""``python -m experiments``: the commands of both kinds, and the words for what goes wrong."""

from conam_zoo.cli import run_app
from experiments.accuracy import commands  # noqa: F401 (registers its commands)
from experiments.speed.commands import app

if __name__ == "__main__":
    run_app(app, "python -m experiments")
