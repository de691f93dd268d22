"""Commands about accuracy: compare, ablation, knockout, finetune, seeds, starts, shipped; and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conam_zoo.cli._shared import DATA_HELP, MODEL_HELP, Compile, Json, Settings, console, json_only
from experiments.accuracy.ablation_axes import AXES
from experiments.speed.baselines import attention_layers
from experiments.speed.commands import app, progress_line, typed_command

if TYPE_CHECKING:
    from experiments.accuracy.grid import Cell

Models = Annotated[list[str] | None, typer.Option("--model", help="Backbone, such as resnet56; repeatable.")]
Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="cifar10 or cifar100; repeatable.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Repeatable. Default: 0, 1, 2.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="short (15 epochs, labelled so) or full (200 epochs).")]
Holdout = Annotated[
    int, typer.Option(help="Training images kept out and evaluated instead of the test images, for choosing.")
]
Parallel = Annotated[int, typer.Option(min=1, help="Trainings at a time; they share the cores.")]
Output = Annotated[Path, typer.Option(help="Path without ending: OUTPUT.json, OUTPUT.png, and run folders in OUTPUT/.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the cells.")]
DataFolder = Annotated[str, typer.Option(help=f"A folder with all the data sets, or one of them: {DATA_HELP}")]


@app.command(epilog="Example: python -m experiments compare --data data --layer none --layer conam --layer se")
def compare(
    data: DataFolder,
    models: Models = None,
    datasets: Datasets = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", help=f"{', '.join(attention_layers())}; repeatable. Default: all."),
    ] = None,
    seeds: Seeds = None,
    recipe: RecipeName = "short",
    holdout: Holdout = 0,
    settings: Settings = None,
    output: Output = Path("experiments/results/compare"),
    parallel: Parallel = 1,
    compile: Compile = False,
    dry_run: DryRun = False,
) -> None:
    """Train nets with different attentions under one recipe and the same seeds, and compare them.

    Finished cells are not trained again, interrupted ones are resumed: repeat the command.
    """
    from experiments.accuracy.compare import attention_cells
    from experiments.accuracy.grid import grid_recipe

    shared = grid_recipe(recipe, settings or [], holdout=holdout)
    cells = attention_cells(
        models or ["resnet20"], datasets or ["cifar10"], layers or attention_layers(), seeds or [0, 1, 2], shared
    )
    _run("compare", cells, data, output, parallel, compile, dry_run)


@app.command(epilog="Example: python -m experiments ablation --data data --axis shortcut --axis patches")
def ablation(
    data: DataFolder,
    models: Models = None,
    datasets: Datasets = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--axis", help=f"{', '.join(AXES)}; repeatable. Default: all."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Settings to train beside the plain net and the paper's form; repeatable. Default: all."),
    ] = None,
    seeds: Seeds = None,
    recipe: RecipeName = "short",
    holdout: Holdout = 5000,
    settings: Settings = None,
    output: Output = Path("experiments/results/ablation"),
    parallel: Parallel = 1,
    compile: Compile = False,
    dry_run: DryRun = False,
) -> None:
    """Train forms of ConAM, axis by axis as in the paper's ablation, and candidates for a better one.

    Judged on held-out training images unless --holdout is 0. Repeat the command to go on where it stopped.
    """
    from experiments.accuracy.compare import ablation_cells
    from experiments.accuracy.grid import grid_recipe

    shared = grid_recipe(recipe, settings or [], holdout=holdout)
    cells = ablation_cells(
        models or ["resnet20"], datasets or ["cifar10"], axes or list(AXES), seeds or [0, 1, 2], shared, only or ()
    )
    _run("ablation", cells, data, output, parallel, compile, dry_run)


@app.command(epilog="Example: python -m experiments knockout resnet20_conam.cifar10 --data data")
def knockout(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    data: DataFolder,
    json_file: Json = None,
) -> None:
    """How much a trained net uses its ConAM: its accuracy when the confidences are replaced. Nothing is trained."""
    from rich.markdown import Markdown

    from experiments.accuracy.knockout import benchmark_knockout, knockout_table

    with progress_line() as progress:
        document = benchmark_knockout(models, data, command=typed_command(), progress=progress)
    if not json_only(document, json_file):
        console(wide=True).print(Markdown(knockout_table(document)))


@app.command(epilog="Example: python -m experiments finetune --data data --json experiments/results/finetune.json")
def finetune(data: DataFolder, json_file: Json = None) -> None:
    """Fine-tune and train from scratch on four small sets, five seeds each; needs scikit-learn and scikit-image."""
    from rich.markdown import Markdown

    from experiments.accuracy.finetune import benchmark_finetune, digits, faces, few_of_cifar100, finetune_table

    sets = [few_of_cifar100(data), few_of_cifar100(data, image_size=64), digits(), faces()]
    with progress_line() as progress:
        record = benchmark_finetune(sets, say=progress)
    if not json_only(record, json_file):
        console(wide=True).print(Markdown(finetune_table(record)))


@app.command(epilog="Example: python -m experiments seeds runs/resnet20_conam.cifar10.seed*")
def seeds(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders.")]) -> None:
    """Add finished runs to experiments/results/seeds.json: mean and deviation over the seeds of each recipe."""
    from experiments.accuracy.seeds import add_run, read_seeds, seed_table
    from experiments.tables import RESULTS

    for run in runs:
        add_run(RESULTS / "seeds.json", run)
    console().print(seed_table(read_seeds(RESULTS / "seeds.json")), markup=False, highlight=False)


@app.command(epilog="Example: python -m experiments starts --data cifar100 runs/start_*")
def starts(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders with held-out images.")],
    data: Annotated[Path, typer.Option(help=f"Training images. {DATA_HELP}")],
) -> None:
    """Add finished runs to experiments/results/starts.json: two initialisations of ConAM on held-out images."""
    from experiments.accuracy.starts import add_start, read_starts, start_table
    from experiments.tables import RESULTS

    for run in runs:
        add_start(RESULTS / "starts.json", run, data)
    console().print(start_table(read_starts(RESULTS / "starts.json")), markup=False, highlight=False)


@app.command(epilog="Example: python -m experiments shipped --data data resnet20_conam.cifar10")
def shipped(
    data: DataFolder,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Default: all of the manifest.")] = None,
) -> None:
    """Reproduce the published accuracy of shipped weights on all test images; exit code 2 if one differs."""
    from conam_zoo.weights import load_manifest
    from experiments.accuracy.shipped import check_shipped

    with progress_line() as progress:
        for name in names or sorted(load_manifest().entries):
            progress(name)
            check_shipped(name, data)
            console().print(f"{name}: as published", highlight=False)


@app.command()
def tables() -> None:
    """Rewrite the tables of docs/ and LOG.md that come from experiments/results, and docs/results.csv."""
    from conam_zoo.release.documents import rewrite
    from experiments.tables import generated_tables

    changed = rewrite(generated_tables(Path()))
    console().print("\n".join(f"written: {path}" for path in changed) or "All tables are up to date.", highlight=False)


def _run(what: str, cells: "list[Cell]", data: str, output: Path, parallel: int, compile: bool, dry_run: bool) -> None:
    """Train what is missing, and print the table; exit code 1 if a cell failed or is still missing."""
    from dataclasses import asdict

    from rich.markdown import Markdown

    from experiments.accuracy.compare import ablation_table, attention_table, run_comparison

    out = console()
    if dry_run:
        for cell in cells:
            out.print(cell.name, highlight=False)
        out.print(f"{len(cells)} cells of {cells[0].recipe.epochs} epochs", highlight=False)
        return
    grid = run_comparison(
        what,
        cells,
        data,
        output,
        parallel=parallel,
        compile=compile,
        command=typed_command(),
        on_event=lambda name, event: out.print(f"{name}: {event}", highlight=False, markup=False),
    )
    table = attention_table if what == "compare" else ablation_table
    console(wide=True).print(Markdown(table(asdict(grid))))
    finished = {cell["name"] for cell in grid.cells if "failed" not in cell}
    missing = [cell.name for cell in cells if cell.name not in finished]
    if missing:
        out.print(f"{len(missing)} of {len(cells)} cells are missing: repeat the command to go on.", highlight=False)
        raise typer.Exit(1)
