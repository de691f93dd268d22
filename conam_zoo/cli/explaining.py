"""Commands that show what a net sees: explain."""

from pathlib import Path
from typing import Annotated

import typer

from conam_zoo.cli._shared import MODEL_HELP, Json, app, console, json_only
from conam_zoo.errors import UserError


@app.command(
    epilog="Examples: conam explain resnet20_conam.cifar10 cat.jpg --output cat.png · "
    "conam explain resnet20_conam.cifar10 FOLDER --output sheet.png"
)
def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    images: Annotated[list[Path], typer.Argument(help="Pictures, shown in detail; or one folder of them.")],
    output: Annotated[
        Path, typer.Option(help="The PNG to write; of a folder it is a contact sheet with one row for each picture.")
    ],
    sites: Annotated[
        list[str] | None, typer.Option("--site", help="Show only this ConAM, such as layer3.0. Repeatable.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Draw where each ConAM is confident, and what changes when its most confident patch is blurred.

    The least confident patch is blurred too, for comparison.
    """
    from conam_zoo.models.registry import open_model
    from conam_zoo.visualize.explain import explain as run
    from conam_zoo.visualize.explain import pictures_in
    from conam_zoo.visualize.explain_plots import draw_explanations
    from conam_zoo.visualize.predict import percent
    from conam_zoo.visualize.sheet import check_png

    check_png(output)
    folder = images[0].is_dir()
    if len(images) > 1 and any(path.is_dir() for path in images):
        raise UserError("A folder is explained alone: name one folder, or pictures.")
    explanations = run(open_model(model), pictures_in(images[0]) if folder else images, sites)
    draw_explanations(explanations, output, title=model, contact_sheet=folder)
    rows = [
        {
            "image": str(e.path),
            "top": [{"class": name, "probability": value} for name, value in e.top],
            "sites": [
                {
                    "site": s.site,
                    "confidence": s.confidence.tolist(),
                    **{
                        name: effect
                        and {
                            "row": effect.row,
                            "column": effect.column,
                            "probability_after": float(effect.probabilities[e.predicted]),
                        }
                        for name, effect in (("most", s.most), ("least", s.least))
                    },
                }
                for s in e.sites
            ],
        }
        for e in explanations
    ]
    if json_only(rows, json_file):
        return
    for e in explanations:
        name, before = e.top[0]
        last = e.sites[-1]
        site = last.site.removesuffix(".attn")
        if last.most is None or last.least is None:
            change = f"all patches of {site} are alike"
        else:
            most, least = (percent(float(p.probabilities[e.predicted])) for p in (last.most, last.least))
            change = f"{most} with the most confident patch of {site} blurred, {least} with the least confident"
        console().print(f"{e.path.name}: {name} {percent(before)}; {change}")
    console().print(f"written: {output}")
