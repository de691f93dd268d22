"""Commands that train and measure: train, evaluate."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import DATA_HELP, MODEL_HELP, Json, app, console, json_only


@app.command(epilog="Example: conam train resnet20_conam.cifar10 --data cifar10 --output runs/first --set epochs=1")
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of the package, such as resnet20_conam.cifar10, or a .toml file.")
    ],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="The run folder: checkpoint, log, curves, and final/ with the weights.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe. Repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last whole epoch in the run folder.")
    ] = False,
) -> None:
    """Train a recipe, then evaluate once on the test split.

    The test split is not opened before the end.
    """
    from conam_zoo.training.recipe import load_recipe
    from conam_zoo.training.train import train as run

    run(load_recipe(recipe, settings), data, output, resume=resume, command=shlex.join(["conam", *sys.argv[1:]]))


@app.command(epilog="Example: conam evaluate resnet20_conam.cifar10 --data cifar10 --json scores.json")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    json_file: Json = None,
) -> None:
    """Measure a model on the test split of its data set, in float32, without test-time augmentation."""
    import torch

    from conam_zoo.datasets import DATASETS
    from conam_zoo.models.lookup import open_model
    from conam_zoo.training.evaluate import evaluate as run
    from conam_zoo.weights import load_manifest

    net = open_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
    cfg = net.pretrained_cfg
    name = f"{cfg['architecture']}.{cfg.get('tag')}"
    known = [facts.name for facts in DATASETS.values() if facts.classes == tuple(cfg.get("label_names") or ())]
    scores, split = run(net, data, known[0] if known else None)
    result = {"model": model, "images": len(split), **asdict(scores)}
    if json_only(result, json_file):
        return
    entry = load_manifest().entries.get(name) if ":" not in model else None
    table = Table(box=None)
    for title in ("", "measured", *(("manifest",) if entry else ())):
        table.add_column(title, justify="right" if title else "left")
    for key, form in (("top1_percent", ".2f"), ("top5_percent", ".2f"), ("nll", ".4f"), ("ece", ".4f")):
        stated = [format(getattr(entry.metrics, key), form)] if entry else []
        table.add_row(key, format(result[key], form), *stated)
    console().print(f"{model} on {len(split):,} images of {split.source}", highlight=False)
    console().print(table)
