"""Commands that measure speed: train, step, inference, cost, densenet, onnx-speed; and onnx-accuracy."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from conam_zoo.cli._shared import DATA_HELP, Json, console, json_only

if TYPE_CHECKING:
    from experiments.speed.record import BenchmarkRecord

app = typer.Typer(
    name="python -m experiments",
    help="Measure speed, cost and benefit, each together with its baselines in one run.",
    no_args_is_help=True,
    epilog="Measure on an otherwise idle machine. docs/benchmarks.md describes the methods.",
)
Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny run that only shows that everything works; its numbers mean nothing.")
]
Sets = Annotated[Path, typer.Option(help="A data set, or a folder of data sets by name.")]
Weights = Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Default: all of the manifest.")]
Repeats = Annotated[int, typer.Option(help="Rounds; each round measures ours and every baseline once.")]


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """A line on the terminal's error stream that says what is being measured."""
    stderr = Console(stderr=True)
    with stderr.status("") as status:
        yield lambda text: status.update(text)


def typed_command() -> str:
    """The command line as it would be typed again, without where its result went."""
    words = ["python", "-m", "experiments", *sys.argv[1:]]
    if "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return shlex.join(words)


def _measure(
    benchmark: "Callable[..., BenchmarkRecord]", json_file: Path | None, *arguments: Any, **options: Any
) -> None:
    """Run a benchmark, print its tables, and write its record where that was asked for."""
    from experiments.speed.record import record_tables

    with progress_line() as progress:
        record = benchmark(*arguments, **options, command=typed_command(), progress=progress)
    if json_only(record.to_dict(), json_file):
        return
    out = console(wide=True)
    for sentence, (titles, *lines) in record_tables(record):
        table = Table(box=None)
        for title in titles:
            table.add_column(title, overflow="fold")
        for line in lines:
            table.add_row(*line)
        out.print(sentence)
        out.print(table)
    for skip in record.skipped:
        where = ", ".join(f"{key} {value}" for key, value in skip.group.items())
        out.print(f"not measured: {skip.name} ({where}): {skip.reason}", highlight=False, markup=False)
    out.print(f"{record.hardware}, torch {record.library_versions['torch']}", highlight=False)


@app.command(epilog="Example: python -m experiments train --model resnet20_conam --json train.json")
def train(
    model: Annotated[str, typer.Option(help="A model of 'conam list'.")] = "resnet20_conam",
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 128,
    steps: Annotated[int, typer.Option(help="Training steps in one measurement.")] = 40,
    repeats: Repeats = 5,
    workers: Annotated[int, typer.Option(help="Worker processes of each data loader.")] = 2,
    data: Annotated[str | None, typer.Option(help=f"Noise if not given. {DATA_HELP}")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile for our loop and timm's.")] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Our loop with a teacher as well: from a bank of logits, and online.")
    ] = False,
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """Images per second of our training loop, compared with a plain DataLoader loop and timm's loop."""
    from experiments.speed.train import benchmark_train

    _measure(
        benchmark_train,
        json_file,
        model,
        batch_size=batch_size,
        steps=steps,
        repeats=repeats,
        workers=workers,
        data=data,
        compile=compile,
        teacher=teacher,
        quick=quick,
    )


@app.command(epilog="Example: python -m experiments step --model resnet56_conam --json step.json")
def step(
    model: Annotated[str, typer.Option(help="A ResNet of basic blocks.")] = "resnet20_conam",
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 128,
    repeats: Repeats = 15,
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """Where the time of a training step goes, and how much of it in-place joins and torch.compile save."""
    from experiments.speed.step import benchmark_step

    _measure(benchmark_step, json_file, model, batch_size=batch_size, repeats=repeats, quick=quick)


@app.command(epilog="Example: python -m experiments inference resnet56_conam --batch 1 --batch 64 --mode 'eager bf16'")
def inference(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help="Models of 'conam list'.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images in a batch; repeatable. Default: 1, 64, 512.")] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="'eager fp32', 'compiled bf16', 'onnx fp32', ...; repeatable. Default: all that suit the device."
        ),
    ] = None,
    repeats: Repeats = 15,
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """Latency and throughput of models and their plain twins: eager, compiled, ONNX Runtime."""
    from experiments.speed.inference import BATCH_SIZES, benchmark_inference

    _measure(
        benchmark_inference,
        json_file,
        models or ["resnet20_conam"],
        batch=batch or BATCH_SIZES,
        modes=mode,
        repeats=repeats,
        quick=quick,
    )


@app.command(epilog="Example: python -m experiments cost --part module --image-size 32 --json cost_module.json")
def cost(
    part: Annotated[
        list[str] | None, typer.Option(help="module (the attention alone), net, memory; repeatable. Default: all.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Nets to put the attentions into; repeatable. Default: one of each family.")
    ] = None,
    image_size: Annotated[
        list[int] | None,
        typer.Option(help="32 or 224; repeatable. Default: both, but nets at 224 only on a GPU."),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="channels_last or nchw; repeatable. Default: both for modules, channels_last for nets."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32 or bf16; repeatable. Default: both for modules, what trains faster for nets."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images of 32 x 32, an eighth of it at 224. Default: 128 for modules, 64 for nets."),
    ] = None,
    repeats: Repeats = 9,
    compile: Annotated[
        bool | None, typer.Option(help="Time the module under torch.compile too. Default: on a GPU.")
    ] = None,
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """The cost of ConAM in time and memory, compared with the rearrange formulation and six other attentions."""
    from experiments.speed.cost import NETS, PARTS, benchmark_cost

    _measure(
        benchmark_cost,
        json_file,
        parts=part or PARTS,
        models=model or NETS,
        image_sizes=image_size,
        layouts=layout,
        precisions=precision,
        batch_size=batch_size,
        repeats=repeats,
        compile=compile,
        quick=quick,
    )


@app.command(epilog="Example: python -m experiments densenet --batch-size 32 --json densenet.json")
def densenet(
    model: Annotated[
        str, typer.Option(help="densenetbc100_12_conam or densenetbc190_40_conam.")
    ] = "densenetbc100_12_conam",
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 32,
    repeats: Repeats = 7,
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """A DenseNet's training step compared with torchvision's DenseNet of the same configuration: time and memory."""
    from experiments.speed.densenet import benchmark_densenet

    _measure(benchmark_densenet, json_file, model, batch_size=batch_size, repeats=repeats, quick=quick)


@app.command(epilog="Example: python -m experiments onnx-accuracy --data ~/data resnet20_conam.cifar10")
def onnx_accuracy(data: Sets, names: Weights = None) -> None:
    """Record top-1 of shipped weights and of their ONNX files, float32 and int8, in experiments/results."""
    from conam_zoo.weights import load_manifest
    from experiments.speed.onnx_files import add_accuracy
    from experiments.tables import RESULTS

    with progress_line() as progress:
        for name in names or sorted(load_manifest().entries):
            progress(name)
            row = add_accuracy(RESULTS / "onnx_accuracy.json", name, data)
            top1 = ", ".join(f"{way} {value:.2f} %" for way, value in row["top1_percent"].items())
            console(wide=True).print(f"{name}: {top1}", highlight=False)


@app.command(
    epilog="Example: python -m experiments onnx-speed --data ~/data --json experiments/results/onnx_speed.json"
)
def onnx_speed(
    data: Sets,
    names: Weights = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images in a batch; repeatable. Default: 1, 64.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch and of ONNX Runtime.")] = 2,
    repeats: Repeats = 15,
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """Latency and throughput of shipped weights on the CPU: eager PyTorch, ONNX in float32 and in int8."""
    from conam_zoo.weights import load_manifest
    from experiments.speed.onnx_files import BATCH_SIZES, benchmark_onnx

    _measure(
        benchmark_onnx,
        json_file,
        names or sorted(load_manifest().entries),
        data,
        batch=batch or BATCH_SIZES,
        threads=threads,
        repeats=repeats,
        quick=quick,
    )
