"""The command that fine-tunes: finetune."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from conam_zoo.cli._shared import MODEL_HELP, Settings, app
from conam_zoo.escape import for_shell


@app.command(
    epilog="Example: conam finetune my_pictures --model resnet20_conam.cifar10 --output runs/my_pictures --epochs 20"
)
def finetune(
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
        int | None, typer.Option(help="Images in a step; 32, 16 or 8 by the number of images if left out.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side that images are resized to; 32 or 64 by the size of the images if left out."),
    ] = None,
    freeze: Annotated[
        str, typer.Option(help="Layers that are not trained: none, stem, a stage such as layer2, or backbone.")
    ] = "none",
    layer_decay: Annotated[
        float, typer.Option(help="Each layer learns this much slower than the one behind it; 1 for none.")
    ] = 1.0,
    balance: Annotated[bool, typer.Option("--balance", help="Show every class equally often.")] = False,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Mirror half of the images; not for writing and the like.")
    ] = True,
    val_share: Annotated[
        float, typer.Option(help="Share of each class for validation, where there is no validation split.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split, the new head, order and augmentation.")] = 0,
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
        run(
            data,
            model=model,
            output=output,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            image_size=image_size,
            freeze=freeze,
            layer_decay=layer_decay,
            balance=balance,
            flip=flip,
            val_share=val_share,
            seed=seed,
            corrupt=corrupt,
            from_scratch=from_scratch,
            resume=resume,
            settings=settings,
            command=for_shell("conam", *sys.argv[1:]),
        )
