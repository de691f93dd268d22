"""Fine-tuning from a data set to a report: what ``conam finetune`` does, as a function with the same arguments."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from conam_zoo.data import ImageData, open_images
from conam_zoo.data.dataset import data_sha256, image_hashes
from conam_zoo.data.load import check_image_size
from conam_zoo.errors import UserError
from conam_zoo.escape import PlainConsole, for_shell
from conam_zoo.files import expand_path, write_atomically, write_text
from conam_zoo.finetuning.net import (
    FineTuned,
    NetForData,
    check_layer_decay,
    finetune_recipe,
    freeze_layers,
    net_for_data,
    train_on,
)
from conam_zoo.finetuning.report import build_report, draw_report, report_markdown
from conam_zoo.models.registry import open_model
from conam_zoo.training.distributed import precision_on, ranks, run_on_primary
from conam_zoo.training.engine import score
from conam_zoo.training.evaluate import TRAINED_ON
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.run_folder import check_free, describe_environment, hold, where_it_ran
from conam_zoo.training.train_state import check_optimizer

COMPARABLE = 3.0  # up to this ratio of the largest to the smallest class, a set counts as balanced


def finetune(
    data: str | Path,
    *,
    model: str,
    output: str | Path,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    freeze: str = "none",
    layer_decay: float = 1.0,
    balance: bool = False,
    flip: bool = True,
    val_share: float = 0.1,
    seed: int = 0,
    corrupt: str = "stop",
    from_scratch: bool = False,
    resume: bool = False,
    settings: list[str] | None = None,
    command: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune a net on images of any kind, and report on the test split, or without one on the validation split.

    The weights are those of the last epoch: the validation split chooses nothing, so a report on it is as honest as one
    on a test split. The arguments are the options of ``conam finetune``, with its command line for the record, and
    ``quiet`` to print nothing; docs/finetuning.md lists what is written. Returns what ``report.json`` holds.
    """
    here, output = ranks(), expand_path(output)
    console = PlainConsole(quiet=quiet or not here.first, soft_wrap=True)
    run_on_primary(lambda: check_free(output, resume))
    _check_apart(data, output)

    given: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "flip": flip, "seed": seed}
    place = expand_path(data)
    name = place.resolve().name if place.exists() else str(data)  # wherever the data lie and however that is written
    recipe_for = partial(finetune_recipe, model, name, settings=settings, from_scratch=from_scratch, **given)
    # What is refused is refused before any image is read.
    check_image_size(image_size)
    recipe = recipe_for(image_size=image_size or 32, images=1_000)
    check_optimizer(recipe)
    check_layer_decay(layer_decay, recipe)
    freeze_layers(open_model(model, pretrained=not from_scratch), freeze)
    environment = {"precision": precision_on(here.device, recipe.precision), **describe_environment()}
    console.print(f"Reading {data}")
    images = open_images(data, image_size=image_size, val_share=val_share, seed=recipe.seed, corrupt=corrupt)
    recipe = recipe_for(image_size=images.image_size, images=len(images.train))
    net = net_for_data(model, images, recipe, from_scratch=from_scratch)
    trained = freeze_layers(net.model, freeze)
    options: dict[str, Any] = {"freeze": freeze, "layer_decay": layer_decay, "balance": balance}
    choices = _choices(images, recipe, net, trained=trained, **options)
    table = Table(box=None, show_header=False, title=f"Fine-tuning on {images.source}", title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in choices:
        table.add_row(*row)
    console.print(table)
    hashes = image_hashes(images.train, images.image_size)
    with hold(output, resume):
        tuned = train_on(
            net,
            images,
            recipe,
            output,
            layer_decay=layer_decay,
            balance=balance,
            resume=resume,
            record={
                "classes": list(images.classes),
                "counts": list(images.counts),
                **options,
                "from_scratch": from_scratch,
                "data_sha256": data_sha256(hashes, np.asarray(images.train.labels)),
            },
            environment=environment,
            quiet=quiet,
        )
        if not here.first:
            return {}
        write_atomically(output / TRAINED_ON, lambda path: np.save(path, np.sort(hashes)))
        rule = {"val_share": val_share, "seed": recipe.seed, "corrupt": corrupt}
        facts = {"split_rule": rule, "command": command, **where_it_ran(tuned.history)}
        return _report(images, recipe, tuned, output, choices, facts, console)


def _check_apart(data: str | Path, output: Path) -> None:
    folder = expand_path(data).resolve()
    if folder.is_dir() and output.resolve().is_relative_to(folder):
        raise UserError(f"The run folder {output} lies in the data {data}: choose an --output elsewhere.")


def _choices(
    images: ImageData, recipe: Recipe, net: NetForData, *, freeze: str, layer_decay: float, balance: bool, trained: int
) -> list[tuple[str, str]]:
    low, high = min(images.counts), max(images.counts)
    mean, deviation = (", ".join(f"{value:.3f}" for value in net.model.pretrained_cfg[key]) for key in ("mean", "std"))
    steps = (
        (f"crop after {recipe.crop_padding} px of padding", recipe.crop_padding),
        ("flip", recipe.flip),
        (f"Cutout {recipe.cutout} px", recipe.cutout),
        (f"mixup {recipe.mixup:g}", recipe.mixup),
        (f"CutMix {recipe.cutmix:g}", recipe.cutmix),
    )
    names = ", ".join(images.classes[:6]) + (", …" if len(images.classes) > 6 else "")
    head = "a new head" if net.new_head else "the head of the weights, which know the same classes"
    rows = [
        ("net", f"{recipe.model} with {head}; {trained:,} parameters learn"),
        ("weights to start from", net.started_from),
        ("mean and deviation", f"({mean}) and ({deviation}), of {net.statistics_from}"),
        ("classes", f"{len(images.classes)}: {names}"),
        ("training images", f"{sum(images.counts):,}; of a class {low:,}" + (f" to {high:,}" if high > low else "")),
        ("validation images", f"{len(images.val):,} ({images.val.source})" if images.val is not None else "none"),
        ("report on", f"the {len(images.test):,} test images" if images.test is not None else "the validation images"),
        ("image size", f"{images.image_size} px; the median short side is {images.median_side:.0f} px"),
        (
            "training",
            f"{recipe.epochs} epochs, batches of {recipe.batch_size}, {recipe.opt}, learning rate {recipe.lr:g}, "
            f"{precision_on(ranks().device, recipe.precision)}, seed {recipe.seed}",
        ),
        ("augmentation", ", ".join(text for text, used in steps if used) or "none"),
        ("frozen", freeze),
        ("layer-wise decay of the rate", f"{layer_decay:g}" if layer_decay < 1 else "none"),
    ]
    if balance:
        rows.append(("balance", "every class is shown equally often"))
    elif high > COMPARABLE * low:
        rows.append(("balance", f"none, but a class has {high / low:.0f} times the images of another: try --balance"))
    if images.unreadable:
        shown = ", ".join(image.name for image in images.unreadable[:3])
        more = ", …" if len(images.unreadable) > 3 else ""
        rows.append(("left out as unreadable", f"{len(images.unreadable)}: {shown}{more}"))
    rows += [("note", note) for note in images.notes]
    return rows


def _report(
    images: ImageData,
    recipe: Recipe,
    tuned: FineTuned,
    output: Path,
    choices: list[tuple[str, str]],
    provenance: dict[str, Any],
    console: PlainConsole,
) -> dict[str, Any]:
    split = tuned.report_on
    kind = "test" if images.test is not None else "validation"
    report = build_report(tuned.logits, tuned.flipped_logits, split.labels.cpu(), split.classes, split.names)
    title = f"{recipe.model} on {Path(images.source).name}"
    about = f"Measured on the {len(split):,} {kind} images of {split.source}, with the weights of the last epoch."
    facts = {"source": split.source, "split": kind, **asdict(report)}
    run = {
        "recipe": recipe.to_dict(),
        "choices": {what: choice for what, choice in choices if what != "note"},
        "notes": list(images.notes),
        "classes": dict(zip(images.classes, images.counts, strict=True)),
        "unreadable": [image.name for image in images.unreadable],
        "evaluated_on": f"{kind} images",
        "scores": asdict(score(tuned.logits, split.labels.cpu())),
        "train_minutes": tuned.train_minutes,
        "sha256": tuned.sha256,
        **provenance,
    }
    write_text(output / "report.json", json.dumps(facts, indent=2) + "\n")
    page = report_markdown(report, title=title, about=about, choices=choices, usage=_usage(output, images.source))
    write_text(output / "report.md", page)
    write_text(output / "run.json", json.dumps(run, indent=2) + "\n")
    for failure in draw_report(report, split.images, tuned.log, output, title):
        console.print(failure)
    top5 = f", top-5 {report.top5_percent:.2f} %" if report.top5_percent is not None else ""
    console.print(
        f"top-1 {report.top1_percent:.2f} %{top5} on {report.images:,} {kind} images "
        f"({report.flip_top1_percent:.2f} % with the mirror image averaged in)"
    )
    console.print(f"written: {output / 'report.md'}, weights in {output / 'final'}")
    return facts


def _usage(output: Path, source: str) -> str:
    weights = f"local-dir:{(output / 'final').as_posix()}"
    return (
        "```sh\n"
        f"{for_shell('conam', 'predict', weights, 'PICTURE.jpg')}\n"
        f"{for_shell('conam', 'evaluate', weights, '--data', source)}\n"
        "```\n\n"
        "`evaluate` takes the same images as this report.\n\n"
        "```python\n"
        "import conam_zoo, timm\n\n"
        f"model = timm.create_model({weights!r}, pretrained=True).eval()\n"
        "```"
    )
