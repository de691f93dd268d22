"""The command that measures: evaluate."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import Data, Json, Model, app, console, json_only, warn


@app.command(
    epilog="Examples: conam evaluate resnet20_conam.cifar10 --data cifar10 --json scores.json · "
    "conam evaluate local-dir:runs/my_pictures/final --data my_pictures"
)
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(help="test, val or train; the first of them that there is, or all images, if left out."),
    ] = None,
    corrupt: Annotated[
        str | None,
        typer.Option(help="What to do about images that cannot be read: stop or skip; as in fine-tuning if left out."),
    ] = None,
    logits: Annotated[
        Path | None, typer.Option(help="Also write logits and labels of the split to this .npz file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure a model on a split of a data set, in float32, without test-time augmentation.

    On the images that it was fine-tuned on, the split is the one of its report.
    """
    import torch

    from conam_zoo.datasets import DATASETS
    from conam_zoo.deploy.command import open_classifier
    from conam_zoo.inputs import check_suffix, expand_path, refuse_overwriting, refuse_replacing
    from conam_zoo.training.evaluate import evaluate as run
    from conam_zoo.training.evaluate import run_folder_of, write_logits
    from conam_zoo.weights import load_manifest

    if logits is not None:
        check_suffix(logits, ".npz")
    read = expand_path(data), expand_path(model.removeprefix("local-dir:"))
    refuse_replacing(json_file)
    refuse_overwriting([logits, json_file], [*read, read[1] / "config.json", read[1] / "model.safetensors"])
    net = open_classifier(model).to("cuda" if torch.cuda.is_available() else "cpu")
    cfg = net.pretrained_cfg
    known = [facts.name for facts in DATASETS.values() if facts.classes == tuple(cfg.get("label_names") or ())]
    done = run(net, data, known[0] if known else None, part=split, corrupt=corrupt, run=run_folder_of(model))
    if logits is not None:
        write_logits(done, logits)
    result = {
        "model": model,
        "source": done.split.source,
        "split": done.part,
        "images": len(done.split),
        "trained_on": done.trained_on,
        **asdict(done.scores),
    }
    for note in done.notes:
        warn(note)
    if json_only(result, json_file):
        return
    entry = load_manifest().entries.get(f"{cfg['architecture']}.{cfg.get('tag')}") if ":" not in model else None
    if entry is not None and (done.part, len(done.split)) != ("test", DATASETS[entry.dataset].test_images):
        entry = None  # other images than those of the manifest's figures
    table = Table(box=None)
    for title in ("", "measured", *(("manifest",) if entry else ())):
        table.add_column(title, justify="right" if title else "left")
    for key, form in (("top1_percent", ".2f"), ("top5_percent", ".2f"), ("nll", ".4f"), ("ece", ".4f")):
        stated = [format(getattr(entry.metrics, key), form)] if entry else []
        table.add_row(key, format(result[key], form), *stated)
    what = "all" if done.part == "all" else f"the {done.part}"
    console().print(f"{model} on {what} images of {done.split.source}: {len(done.split):,}")
    console().print(table)
