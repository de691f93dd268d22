"""Commands that look at pictures: predict."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from conam_zoo.cli._shared import MODEL_HELP, Json, app, console, json_only
from conam_zoo.escape import for_rich


@app.command(epilog="Example: conam predict resnet20_conam.cifar10 cat.jpg dog.png --output sheet.png")
def predict(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    images: Annotated[list[Path], typer.Argument(help="Pictures of any size, mode and format that Pillow reads.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Write a PNG that shows each picture, its top-5 bars and ConAM's confidence maps."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Classify pictures: the five most probable classes of each."""
    from conam_zoo.deploy.command import open_classifier
    from conam_zoo.visualize.predict import percent
    from conam_zoo.visualize.predict import predict as run

    predictions = run(open_classifier(model), images)
    if output is not None:
        from conam_zoo.visualize.sheet import draw_sheet

        draw_sheet(predictions, output, title=model)
    rows = [
        {"image": str(p.path), "top": [{"class": name, "probability": value} for name, value in p.top]}
        for p in predictions
    ]
    if json_only(rows, json_file):
        return
    table = Table(box=None)
    for title in ("image", "class", "probability", "then"):
        table.add_column(title, justify="right" if title == "probability" else "left", overflow="fold")
    for prediction in predictions:
        (name, value), *others = prediction.top
        then = ", ".join(f"{other} {percent(share)}" for other, share in others)
        table.add_row(prediction.path.name, for_rich(name, "bold"), for_rich(percent(value), "bold"), then)
    console().print(table)
    if output is not None:
        console().print(f"written: {output}")
