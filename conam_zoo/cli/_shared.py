"""What the commands share: the application, the words for common options, and how results are printed."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from conam_zoo.escape import PlainConsole, for_terminal

app = typer.Typer(
    name="conam",
    help="Small image classifiers with ConAM, the confidence attention module, registered in timm.",
    epilog="Start with 'conam list', then 'conam predict resnet20_conam.cifar10 PICTURE.jpg'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("conam-zoo")
        except PackageNotFoundError:  # a checkout on PYTHONPATH
            number = "unknown (not installed)"
        console().print(f"conam {number}")
        raise typer.Exit


@app.callback()
def conam(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Small image classifiers with ConAM, the confidence attention module, registered in timm."""


MODEL_HELP = "A name such as resnet20_conam.cifar10, local-dir:FOLDER for a model of your own, or hf-hub:OWNER/NAME."
DATA_HELP = (
    "A folder with train/CLASS/* and test/CLASS/* pictures, or with arrays, train_images.npy, train_labels.npy and the "
    "same of test, and classes.txt; or the word cifar10 or cifar100, to have torchvision download it into ./data."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe. Repeatable.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Train with torch.compile, on a GPU with CUDA graphs.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result as JSON to this file; without one, or with -, print only JSON."),
]


def console(*, wide: bool = False) -> PlainConsole:
    """Where results are printed: a ``str`` is plain text, and style is given by ``for_rich`` or ``rich.text.Text``.

    ``wide`` is for tables whose columns a file need not fold.
    """
    terminal = sys.stdout.isatty()
    return PlainConsole(soft_wrap=not terminal, width=200 if wide and not terminal else None)


def warn(note: object) -> None:
    """A sentence on standard error, beside the result."""
    sys.stderr.write(f"conam: {for_terminal(note)}\n")


def model_files(name: str) -> list[Path]:
    """The files that a model is read from, the manifest among them, as far as its name says."""
    from conam_zoo.files import expand_path
    from conam_zoo.weights import find_manifest

    place = expand_path(name.removeprefix("local-dir:"))
    return [find_manifest(), place, place / "config.json", *place.glob("*.safetensors*")]


def json_only(result: Any, json_file: Path | None) -> bool:
    """Write the result as JSON if that was asked for; True if nothing else is to be printed."""
    if json_file is None:
        return False
    text = json.dumps(result, indent=2) + "\n"
    if str(json_file) == "-":
        sys.stdout.write(text)
        return True
    from conam_zoo.files import refuse_overwriting, refuse_replacing, write_text
    from conam_zoo.weights import find_manifest

    refuse_replacing(json_file)
    refuse_overwriting([json_file], [find_manifest()])
    write_text(json_file, text)
    return False
