"""The command that takes nets out of Python: export."""

from pathlib import Path
from typing import Annotated

import typer

from conam_zoo.cli._shared import DATA_HELP, Model, app, console


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
    from conam_zoo.deploy.command import export_named

    lines = export_named(model, output, data=data, int8=int8, pixels=pixels, confidence=confidence, opset=opset)
    for line in lines:
        console().print(line)
