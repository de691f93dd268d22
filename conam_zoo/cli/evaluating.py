"""The command that measures: evaluate."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import DATA_HELP, MODEL_HELP, Json, app, console, json_only


@app.command(epilog="Example: conam evaluate resnet20_conam.cifar10 --data cifar10 --json scores.json")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    json_file: Json = None,
) -> None:
    """Measure a model on the test split of its data set, in float32, without test-time augmentation."""
    import torch

    from conam_zoo.datasets import DATASETS
    from conam_zoo.deploy.command import open_classifier
    from conam_zoo.training.evaluate import evaluate as run
    from conam_zoo.weights import load_manifest

    net = open_classifier(model).to("cuda" if torch.cuda.is_available() else "cpu")
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
    console().print(f"{model} on {len(split):,} images of {split.source}")
    console().print(table)
