"""Commands that look at pictures: predict, explain, features and demo."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from conam_zoo.cli._shared import MODEL_HELP, Json, Model, app, console, json_only, model_files, warn
from conam_zoo.errors import UserError
from conam_zoo.escape import for_rich

if TYPE_CHECKING:
    from conam_zoo.visualize.explain import Explanation
    from conam_zoo.visualize.predict import Prediction

SHOW_PROGRESS = 20  # pictures from which there is a progress bar
SEVERAL = "More than 20 pictures take several files: sheet.png, sheet-2.png, …"


class _Failures:
    """Pictures that cannot be read: each reported when it is met, and in the exit code when all others are done."""

    def __init__(self, pictures: int) -> None:
        self.pictures, self.count = pictures, 0

    def __call__(self, path: Path, error: UserError) -> None:
        if self.pictures == 1:
            raise error
        self.count += 1
        warn(error)
        if self.count == self.pictures:
            raise UserError(f"None of the {self.count} pictures can be read.")

    def exit(self) -> None:
        if self.count:
            raise typer.Exit(1)


def _with_progress(paths: list[Path]) -> Iterable[Path]:
    """The paths, with a progress bar on a terminal if there are many."""
    terminal = Console(stderr=True)
    off = len(paths) < SHOW_PROGRESS or not terminal.is_terminal
    return track(paths, "reading pictures", console=terminal, transient=True, disable=off)


def _write_sheets(items: Iterator[Any], output: Path, draw: Callable[[list[Any], Path], None]) -> Iterator[Any]:
    """Draw the items, twenty to a file, and hand each on as soon as it is drawn."""
    from conam_zoo.visualize.plots import SHEET_ROWS, sheet_paths

    for path in sheet_paths(output):
        rows = list(islice(items, SHEET_ROWS))
        if not rows:
            return
        draw(rows, path)
        yield from rows


def _sheets(output: Path, pictures: int) -> list[Path]:
    from conam_zoo.visualize.plots import SHEET_ROWS, sheet_paths

    return list(islice(sheet_paths(output), -(-pictures // SHEET_ROWS)))


def _check_outputs(model: str, paths: list[Path], output: Path | None, json_file: Path | None) -> None:
    from conam_zoo.files import check_suffix, refuse_overwriting, refuse_replacing

    if output is not None:
        check_suffix(output, ".png")
    sheets = _sheets(output, len(paths)) if output is not None else []
    refuse_overwriting([*sheets, json_file], [*(path for path in paths if str(path) != "-"), *model_files(model)])
    refuse_replacing(json_file)


@app.command(epilog="Example: conam predict resnet20_conam.cifar10 cat.jpg dog.png --output sheet.png")
def predict(
    model: Model,
    images: Annotated[
        list[Path],
        typer.Argument(
            readable=False,  # typer would refuse the whole command for one that is not
            help="Pictures (AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WebP), folders, or - for standard input.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write a PNG that shows each picture, its top-5 bars and ConAM's confidence maps. " + SEVERAL
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Classify pictures: the five most probable classes of each.

    Unreadable pictures are reported and skipped; the exit code is 1 then, or 2 if all are unreadable.
    """
    from conam_zoo.deploy.runtime import open_classifier
    from conam_zoo.visualize.plots import THUMBNAIL, draw_sheet
    from conam_zoo.visualize.predict import expand_pictures, percent, predict_each

    paths = expand_pictures(images)
    _check_outputs(model, paths, output, json_file)
    failures = _Failures(len(paths))
    predictions: Iterator[Prediction] = predict_each(
        open_classifier(model), _with_progress(paths), side=THUMBNAIL, skip=failures, say=warn
    )
    if output is not None:
        predictions = _write_sheets(predictions, output, lambda rows, path: draw_sheet(rows, path, title=model))
    rows = [(p.path, p.top) for p in predictions]
    result = [
        {"image": str(path), "top": [{"class": name, "probability": value} for name, value in top]}
        for path, top in rows
    ]
    if not json_only(result, json_file):
        table = Table(box=None)
        for title in ("image", "class", "probability", "then"):
            table.add_column(title, justify="right" if title == "probability" else "left", overflow="fold")
        for path, ((name, value), *others) in rows:
            then = ", ".join(f"{other} {percent(share)}" for other, share in others)
            table.add_row(path.name, for_rich(name, "bold"), for_rich(percent(value), "bold"), then)
        console().print(table)
        for sheet in _sheets(output, len(rows)) if output is not None else []:
            console().print(f"written: {sheet}")
    failures.exit()


@app.command(
    epilog="Examples: conam explain resnet20_conam.cifar10 cat.jpg --output cat.png · "
    "conam explain resnet20_conam.cifar10 FOLDER --output sheet.png"
)
def explain(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(readable=False, help="Pictures, shown in detail; or one folder of them.")
    ],
    output: Annotated[
        Path,
        typer.Option(help="The PNG to write; for a folder, a contact sheet with one row per picture. " + SEVERAL),
    ],
    sites: Annotated[
        list[str] | None, typer.Option("--site", help="Show only this ConAM, such as layer3.0. Repeatable.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Draw where each ConAM is confident, and what changes when its most confident patch is blurred.

    The least confident patch is blurred too, for comparison. Unreadable pictures are reported and skipped; the exit
    code is 1 then, or 2 if all are unreadable.
    """
    from conam_zoo.models.registry import open_model
    from conam_zoo.visualize.explain import explain_each
    from conam_zoo.visualize.plots import THUMBNAIL, draw_explanations
    from conam_zoo.visualize.predict import expand_pictures

    paths = expand_pictures(images)
    folder = paths != images and any(path.is_dir() for path in images)
    if folder and len(images) > 1:
        raise UserError("A folder is explained alone: name one folder, or pictures.")
    _check_outputs(model, paths, output, json_file)
    failures = _Failures(len(paths))
    explanations = explain_each(
        open_model(model), _with_progress(paths), sites, side=THUMBNAIL, skip=failures, say=warn
    )
    drawn = _write_sheets(
        explanations, output, lambda rows, path: draw_explanations(rows, path, title=model, contact_sheet=folder)
    )
    rows = [(_row(e), f"{e.path.name}: {_sentence(e)}") for e in drawn]
    if not json_only([row for row, _ in rows], json_file):
        for line in [line for _, line in rows] + [f"written: {sheet}" for sheet in _sheets(output, len(rows))]:
            console().print(line)
    failures.exit()


def _row(e: "Explanation") -> dict[str, Any]:
    def effect(patch: Any) -> dict[str, Any] | None:
        if patch is None:
            return None
        after = float(patch.probabilities[e.predicted])
        return {"row": patch.row, "column": patch.column, "probability_after": after}

    return {
        "image": str(e.path),
        "top": [{"class": name, "probability": value} for name, value in e.top],
        "sites": [
            {"site": s.site, "confidence": s.confidence.tolist(), "most": effect(s.most), "least": effect(s.least)}
            for s in e.sites
        ],
    }


def _sentence(e: "Explanation") -> str:
    from conam_zoo.visualize.predict import percent

    name, before = e.top[0]
    last = e.sites[-1]
    site = last.site.removesuffix(".attn")
    if last.most is None or last.least is None:
        return f"{name} {percent(before)}; all patches of {site} are alike"
    most, least = (percent(float(p.probabilities[e.predicted])) for p in (last.most, last.least))
    change = f"{most} with the most confident patch of {site} blurred, {least} with the least confident"
    return f"{name} {percent(before)}; {change}"


@app.command(epilog="Example: conam features resnet20_conam.cifar10 my_pictures --output features.npz")
def features(
    model: Model,
    images: Annotated[
        list[Path],
        typer.Argument(readable=False, help="Pictures, and folders, which are searched at any depth."),
    ],
    output: Annotated[Path, typer.Option(help="The .npz file: features (N, channels) as float32, and names (N,).")],
) -> None:
    """Write the pooled features of pictures: the vectors that the classifier sees.

    Unreadable pictures are reported and skipped; the exit code is 1 then, or 2 if all are unreadable.
    """
    import numpy as np

    from conam_zoo.data.folders import pictures_below
    from conam_zoo.files import check_suffix, expand_path, refuse_overwriting, write_npz
    from conam_zoo.models.registry import open_model
    from conam_zoo.visualize.predict import pooled_features

    check_suffix(output, ".npz")
    paths: list[Path] = []
    for path in map(expand_path, images):
        inside, notes = pictures_below(path) if path.is_dir() else ([path], [])
        for note in notes:
            warn(f"{path}: {note}.")
        if not inside:
            raise UserError(f"The folder {path} holds no pictures: name one that does.")
        paths += inside
    refuse_overwriting([output], [*paths, *model_files(model)])
    failures = _Failures(len(paths))
    vectors, kept = pooled_features(open_model(model), _with_progress(paths), skip=failures, say=warn)
    write_npz(output, {"features": vectors.numpy(), "names": np.array([str(path) for path in kept], dtype=str)})
    console().print(f"written: {output}, {len(vectors):,} pictures, {vectors.shape[1]} features each")
    failures.exit()


@app.command(epilog="Example: conam demo resnet20_conam.cifar10")
def demo(
    model: Annotated[
        str | None, typer.Argument(help=f"The net to begin with; the most accurate one by default. {MODEL_HELP}")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to serve: 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860 by default.")
    ] = None,
) -> None:
    """Serve a page to try nets in: classes of a picture, and ConAM's confidences over it, for one net or two."""
    from conam_zoo.deploy.demo import serve

    serve(model, host, port, console().print)
