"""Commands for one model: evaluate, finetune and export."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import (
    DATA_HELP,
    MODEL_HELP,
    Data,
    Json,
    Model,
    Settings,
    app,
    console,
    json_only,
    model_files,
    warn,
)
from conam_zoo.escape import for_shell


@app.command(
    epilog="Examples: conam evaluate resnet20_conam.cifar10 --data cifar10 --json scores.json · "
    "conam evaluate local-dir:runs/my_pictures/final --data my_pictures"
)
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(help="test, val or train; by default the first that exists, else all images."),
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
    from conam_zoo.deploy.export import dataset_of
    from conam_zoo.deploy.runtime import open_classifier
    from conam_zoo.files import check_suffix, expand_path, refuse_overwriting, refuse_replacing
    from conam_zoo.training.evaluate import evaluate as run
    from conam_zoo.training.evaluate import run_folder_of, write_logits
    from conam_zoo.training.run_folder import RUN
    from conam_zoo.weights import load_manifest

    if logits is not None:
        check_suffix(logits, ".npz")
    refuse_replacing(json_file)
    run_folder = run_folder_of(model)
    record = [] if run_folder is None else [run_folder / RUN]
    refuse_overwriting([logits, json_file], [expand_path(data), *record, *model_files(model)])
    net = open_classifier(model).to("cuda" if torch.cuda.is_available() else "cpu")
    cfg = net.pretrained_cfg
    done = run(net, data, dataset_of(net), part=split, corrupt=corrupt, run=run_folder)
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


@app.command(
    epilog="Example: conam finetune my_pictures --model resnet20_conam.cifar10 --output runs/my_pictures --epochs 20"
)
def finetune(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of CLASS/* or train/CLASS/* pictures, perhaps with val and test; a folder of .npy arrays; "
            "an .npz file; or a timm data-set name such as hfds/OWNER/NAME."
        ),
    ],
    model: Annotated[str, typer.Option(help="The net to start from. " + MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="The run folder: report, curves, log, and final/ with the weights.")],
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images; 20 if left out.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step; by default 32, 16 or 8, depending on their number.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side to resize images to; by default 32 or 64, depending on their size."),
    ] = None,
    freeze: Annotated[
        str, typer.Option(help="Layers that are not trained: none, stem, a stage such as layer2, or backbone.")
    ] = "none",
    layer_decay: Annotated[
        float, typer.Option(help="Learning-rate factor of each layer relative to the next; 1 for none.")
    ] = 1.0,
    balance: Annotated[bool, typer.Option("--balance", help="Show every class equally often.")] = False,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Mirror half of the images; not for writing and the like.")
    ] = True,
    val_share: Annotated[
        float, typer.Option(help="Share of each class for validation, where there is no validation split.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seeds the split, new head, order and augmentation.")] = 0,
    corrupt: Annotated[str, typer.Option(help="What to do about images that cannot be read: stop or skip.")] = "stop",
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with random weights, for comparison.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run folder.")] = False,
    settings: Settings = None,
) -> None:
    """Fine-tune a net on your own pictures, and write a report with accuracy, classes, and mistakes."""
    from conam_zoo.finetuning.run import finetune as run
    from conam_zoo.training.distributed import process_group

    with process_group():
        run(**context.params, command=for_shell("conam", *sys.argv[1:]))


@app.command(epilog="Example: conam export resnet20_conam.cifar10 --output net.onnx --int8 --data cifar10")
def export(
    model: Model,
    output: Annotated[Path, typer.Option(help="The file: .onnx, or .pt2 for torch.export.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise to int8, calibrated on training images of --data.")
    ] = False,
    data: Annotated[str | None, typer.Option(help=f"For --int8. {DATA_HELP}")] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Take (N, H, W, 3) uint8 pixels; the normalisation is inside.")
    ] = False,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Give the confidences of each ConAM as well.")
    ] = False,
    opset: Annotated[int, typer.Option(min=18, help="ONNX operator set.")] = 18,
) -> None:
    """Write a net as an ONNX or torch.export file, checked against PyTorch; the outputs are logits."""
    from conam_zoo.deploy.export import export_named
    from conam_zoo.files import expand_path, refuse_overwriting

    refuse_overwriting([expand_path(output)], [*model_files(model), *([expand_path(data)] if data else [])])
    lines = export_named(model, output, data=data, int8=int8, pixels=pixels, confidence=confidence, opset=opset)
    for line in lines:
        console().print(line)
