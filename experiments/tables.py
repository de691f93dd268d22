"""The tables of docs/ and LOG.md that are written from the measurements in ``experiments/results``."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

from conam_zoo.release.documents import fill_table
from conam_zoo.weights import Manifest, Metrics, load_manifest
from experiments.accuracy.compare import comparison_tables
from experiments.accuracy.finetune import finetune_table
from experiments.accuracy.knockout import knockout_table
from experiments.accuracy.seeds import read_seeds, seed_table
from experiments.accuracy.starts import read_starts, start_table
from experiments.speed.onnx_files import onnx_table
from experiments.speed.record import benchmark_tables, command_today, read_record

RESULTS = Path("experiments/results")
WRITTEN_BY = "python -m experiments tables"
NOT_MEASURED = "Not measured yet."
NAMES = {
    "plain DataLoader": "a plain fp32 DataLoader loop",
    "timm": "timm's loop in {precision}",
    "timm, channels_last": "timm's loop in {precision} and channels_last",
}


def _seeds(results: Path) -> str:
    seeds = read_seeds(results / "seeds.json")
    return seed_table(seeds) if seeds else NOT_MEASURED


def _starts(results: Path) -> str:
    runs = read_starts(results / "starts.json")
    return start_table(runs) if runs else NOT_MEASURED


def _finetune(results: Path) -> str:
    path = results / "finetune.json"
    if not path.is_file():
        return NOT_MEASURED
    record = json.loads(path.read_text(encoding="utf-8"))
    return finetune_table(record, replaced=_is_replaced(record["model"], record.get("sha256"), None, results))


def _is_replaced(name: str, sha256: str | None, top1_percent: float | None, results: Path) -> bool:
    """Whether the manifest has other weights of a name today; where no hash was recorded, top-1 has to tell."""
    entry = load_manifest(results.parents[1] / "weights_manifest.json").entries.get(name)
    if entry is None or sha256 is not None:
        return entry is not None and entry.sha256 != sha256
    return top1_percent is None or round(entry.metrics.top1_percent, 2) != round(top1_percent, 2)


def _speed(results: Path) -> str:
    """How much faster than each other loop ours is, one line for each record of ``train``."""
    lines = []
    for path in sorted(results.glob("train*.json")):
        record = read_record(path)
        ours, *others = (row for row in record.rows if row.name == "conam_zoo" or row.name in NAMES)
        precision = record.settings.get("precision", "bf16")  # earlier records had no other
        names = {row.name: NAMES[row.name].format(precision=precision) for row in others}
        ratios = ", ".join(f"**{row.ratio:.2f} times** those of {names[row.name]}" for row in others)
        speed = 1000 * ours.group["batch"] / ours.median
        lines.append(
            f"- Training `{ours.group['model']}` at batch {ours.group['batch']} on {record.hardware}: "
            f"{speed:,.0f} images a second, {ratios}, measured in one run (`{command_today(record.command)}`)."
        )
    return "\n".join(lines) or NOT_MEASURED


def _onnx(results: Path) -> str:
    manifest = load_manifest(results.parents[1] / "weights_manifest.json")
    return onnx_table(manifest, results / "onnx_accuracy.json", results / "onnx_speed.json")


def results_csv(manifest: Manifest, images_per_second: Mapping[str, float]) -> str:
    """All weights as CSV, one a line; what is not known is empty."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    described = ("params", "macs", "size_bytes", "epochs", "teacher")
    pinned = ("sha256", "revision")
    metrics = [field.name for field in fields(Metrics)]
    writer.writerow(["name", "dataset", *metrics, *described, "images_per_second", *pinned])
    for name, entry in sorted(manifest.entries.items()):
        facts = asdict(entry) | {"size_bytes": entry.weights_bytes}
        speed = images_per_second.get(name)
        values = [*facts["metrics"].values(), *(facts[key] for key in described), speed and round(speed)]
        writer.writerow([name, entry.dataset, *values, *(facts[key] for key in pinned)])
    return table.getvalue()


def _images_per_second(record: Path) -> dict[str, float]:
    """Of eager PyTorch at batch 64, as far as the record of ``onnx-speed`` has it."""
    rows = read_record(record).rows if record.is_file() else ()
    timed = [row for row in rows if (row.name, row.group["batch"]) == ("eager fp32", 64)]
    return {row.group["weights"]: row.facts["images_per_second"] for row in timed}


def _knockout(results: Path) -> str:
    tables = []
    for path in sorted(results.glob("knockout*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        replaced = {
            model["model"]
            for model in document["models"]
            if _is_replaced(model["model"], model.get("sha256"), model["unchanged"]["top1_percent"], results)
        }
        tables.append(knockout_table(document, replaced))
    return "\n\n".join(tables) or NOT_MEASURED


def _benchmark(name: str) -> Callable[[Path], str]:
    return lambda results: benchmark_tables(results)[name]


def _comparison(name: str) -> Callable[[Path], str]:
    return lambda results: comparison_tables(results)[name]


# Document, name between its markers, what stands there.
PLACES: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    ("docs/recipes.md", "seeds", _seeds),
    ("docs/finetuning.md", "finetune", _finetune),
    ("docs/benchmarks.md", "speed", _speed),
    ("docs/benchmarks.md", "benchmark train", _benchmark("train")),
    ("docs/benchmarks.md", "benchmark step", _benchmark("step")),
    ("docs/benchmarks.md", "benchmark inference", _benchmark("inference")),
    ("docs/benchmarks.md", "onnx", _onnx),
    ("experiments/LOG.md", "benchmark cost", _benchmark("cost")),
    ("docs/benchmarks.md", "benchmark densenet", _benchmark("densenet")),
    ("docs/conam.md", "starts", _starts),
    ("docs/conam.md", "benchmark knockout", _knockout),
    ("docs/conam.md", "benchmark compare", _comparison("compare")),
    ("experiments/LOG.md", "benchmark ablation", _comparison("ablation")),
)


def generated_tables(checkout: Path) -> dict[Path, str]:
    """What each document with tables of measurements has to hold, and ``docs/results.csv``; by path.

    A document without a place for its table is refused, as is a damaged file of measurements.
    """
    files: dict[Path, str] = {}
    for document, name, table in PLACES:
        path = checkout / document
        text = files.get(path) or path.read_text(encoding="utf-8")
        files[path] = fill_table(text, name, table(checkout / RESULTS), path, WRITTEN_BY)
    manifest = load_manifest(checkout / "weights_manifest.json")
    speeds = _images_per_second(checkout / RESULTS / "onnx_speed.json")
    files[checkout / "docs" / "results.csv"] = results_csv(manifest, speeds)
    return files
