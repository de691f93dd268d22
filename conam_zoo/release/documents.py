"""Documents whose tables come from measurements: rewriting them from the manifest and from ``benchmarks/``."""

import json
from collections.abc import Callable
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.release.card import model_card, recipe_head, result_table
from conam_zoo.weights import find_checkout, load_manifest
from experiments.accuracy.compare import evidence_tables
from experiments.accuracy.finetune import finetune_table
from experiments.accuracy.knockout import knockout_table
from experiments.accuracy.seeds import read_seeds, seed_table
from experiments.speed.record import read_record
from experiments.speed.tables import benchmark_tables

__all__ = ["fill_table", "generated_files", "rewrite_tables"]

NOT_MEASURED = "Not measured yet."
NAMES = {
    "plain DataLoader": "a plain fp32 DataLoader loop",
    "timm": "timm's loop in {precision}",
    "timm, channels_last": "timm's loop in {precision} and channels_last",
}


def _results(checkout: Path) -> str:
    return result_table(load_manifest(checkout / "weights_manifest.json"))


def _seeds(checkout: Path) -> str:
    results = read_seeds(checkout / "benchmarks" / "seeds.json")
    return seed_table(results) if results else NOT_MEASURED


def _finetune(checkout: Path) -> str:
    path = checkout / "benchmarks" / "finetune.json"
    return finetune_table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else NOT_MEASURED


def _speed(checkout: Path) -> str:
    """How much faster than each other loop ours is, one line for each record of ``conam benchmark train``."""
    lines = []
    for path in sorted((checkout / "benchmarks").glob("train*.json")):
        record = read_record(path)
        ours, *others = record.rows
        precision = record.settings.get("precision", "bf16")  # earlier records had no other
        names = {row.name: NAMES[row.name].format(precision=precision) for row in others}
        ratios = ", ".join(f"**{row.ratio:.2f} times** those of {names[row.name]}" for row in others)
        speed = 1000 * ours.group["batch"] / ours.median
        lines.append(
            f"- Training `{ours.group['model']}` at batch {ours.group['batch']} on {record.hardware}: "
            f"{speed:,.0f} images a second, {ratios}, measured in one run (`{record.command}`)."
        )
    return "\n".join(lines) or NOT_MEASURED


def _knockout(checkout: Path) -> str:
    paths = sorted((checkout / "benchmarks").glob("knockout*.json"))
    return "\n\n".join(knockout_table(json.loads(path.read_text(encoding="utf-8"))) for path in paths) or NOT_MEASURED


def _benchmark(name: str) -> Callable[[Path], str]:
    return lambda checkout: benchmark_tables(checkout / "benchmarks")[name]


def _evidence(name: str) -> Callable[[Path], str]:
    return lambda checkout: evidence_tables(checkout / "benchmarks")[name]


# Document, name between its markers, what stands there.
PLACES: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    ("README.md", "results", _results),
    ("README.md", "speed", _speed),
    ("docs/recipes.md", "seeds", _seeds),
    ("docs/finetuning.md", "finetune", _finetune),
    ("docs/benchmarks.md", "benchmark train", _benchmark("train")),
    ("docs/benchmarks.md", "benchmark inference", _benchmark("inference")),
    ("docs/benchmarks.md", "benchmark cost", _benchmark("cost")),
    ("docs/benchmarks.md", "benchmark densenet", _benchmark("densenet")),
    ("docs/conam.md", "benchmark knockout", _knockout),
    ("docs/conam.md", "benchmark attention", _evidence("attention")),
    ("docs/conam.md", "benchmark ablation", _evidence("ablation")),
)


def generated_files(checkout: Path) -> dict[Path, str]:
    """What each generated file of a checkout has to hold.

    Raises:
        UserError: If a document has no place for its table, or a file of measurements is damaged.
    """
    files: dict[Path, str] = {}
    for document, name, table in PLACES:
        path = checkout / document
        if path.is_file() or document == "README.md":
            text = files.get(path) or path.read_text(encoding="utf-8")
            files[path] = fill_table(text, name, table(checkout), path)
    manifest = load_manifest(checkout / "weights_manifest.json")
    for name, entry in manifest.entries.items():
        files[checkout / "weights" / name / "README.md"] = model_card(entry, manifest)
    for path in sorted((checkout / "conam_zoo" / "training" / "recipes").glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(line for line in lines if not line.startswith("#"))
        files[path] = recipe_head(path.stem, manifest) + body
    return files


def fill_table(text: str, name: str, table: str, path: Path) -> str:
    """A Markdown text with a table between the markers of that name.

    Raises:
        UserError: If a marker is missing; ``path`` is what the message calls the document.
    """
    begin, end = f"<!-- {name}: written by `conam tables` -->\n", f"<!-- end of {name} -->\n"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"{path} has no place for its table {name}: put the lines {begin}{end} back.")
    return f"{before}{begin}\n{table.strip()}\n\n{end}{after}"


def rewrite_tables() -> list[Path]:
    """Rewrite the generated files that are out of date; returns their paths."""
    checkout = find_checkout()
    if checkout is None:
        raise UserError("The tables are those of a checkout of conam_zoo: run from one.")
    changed = []
    for path, text in generated_files(checkout).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            changed.append(path)
    return changed
