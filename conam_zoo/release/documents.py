"""Documents that are written from the manifest: tables of results, the model cards, the recipes' heads."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.models.registry import for_transformers
from conam_zoo.release.card import even_sites, model_card
from conam_zoo.release.peers import best_peer, like_for_like
from conam_zoo.weights import Manifest, Metrics, find_checkout, load_manifest

__all__ = ["fill_table", "generated_files", "recipe_head", "result_table", "results_csv", "rewrite", "rewrite_tables"]


def generated_files(checkout: Path) -> dict[Path, str]:
    """What each file that is written from a checkout's manifest has to hold.

    Raises:
        UserError: If the README has no place for the table.
    """
    manifest = load_manifest(checkout / "weights_manifest.json")
    readme = checkout / "README.md"
    text = readme.read_text(encoding="utf-8")
    files = {readme: fill_table(text, "results", result_table(manifest), readme)}
    files[checkout / "docs" / "results.csv"] = results_csv(manifest, _images_per_second(checkout))
    for name, entry in manifest.entries.items():
        files[checkout / "weights" / name / "README.md"] = model_card(entry, manifest)
        config = checkout / "weights" / name / "config.json"
        if config.is_file():
            files[config] = for_transformers(config.read_text(encoding="utf-8"))
    for path in sorted((checkout / "conam_zoo" / "training" / "recipes").glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(line for line in lines if not line.startswith("#"))
        files[path] = recipe_head(path.stem, manifest) + body
    return files


def result_table(manifest: Manifest) -> str:
    """The README's table of all weights, in Markdown; a top-1 above that of the usual recipe elsewhere is bold."""
    rows = [
        "| weights | top-1 | usual recipe elsewhere | best known elsewhere | NLL | ECE | parameters | MACs "
        "| epochs, hardware | sites where ConAM is even |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --- | --- |",
    ]
    for name, entry in sorted(manifest.entries.items()):
        metrics = entry.metrics
        usual, best = like_for_like(entry.arch, entry.dataset), best_peer(entry.arch, entry.dataset)
        even = ", ".join(f"`{site}`" for site in even_sites(entry)) or "none"
        even = "not measured" if entry.liveness is None else even
        top1 = f"{metrics.top1_percent:.2f} %"
        if usual is not None and metrics.top1_percent > usual.top1_percent:
            top1 = f"**{top1}**"
        rows.append(
            f"| `{name}` | {top1} | {usual.to_markdown() if usual else 'none known'} "
            f"| {best.to_markdown() if best else 'none known'} | {metrics.nll:.3f} | {metrics.ece:.3f} "
            f"| {entry.params / 1e6:.2f} M | {entry.macs / 1e6:.0f} M | {entry.epochs}, {entry.hardware} "
            f"| {even} |"
        )
    return "\n".join(rows) + "\n"


def results_csv(manifest: Manifest, images_per_second: Mapping[str, float]) -> str:
    """All weights as CSV, one a line; what is not known is empty."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    described = ("params", "macs", "size_bytes", "epochs", "teacher")
    pinned = ("sha256", "revision")
    metrics = [field.name for field in fields(Metrics)]
    writer.writerow(["name", "dataset", *metrics, *described, "images_per_second", *pinned])
    for name, entry in sorted(manifest.entries.items()):
        facts = asdict(entry)
        speed = images_per_second.get(name)
        values = [*facts["metrics"].values(), *(facts[key] for key in described), speed and round(speed)]
        writer.writerow([name, entry.dataset, *values, *(facts[key] for key in pinned)])
    return table.getvalue()


def _images_per_second(checkout: Path) -> dict[str, float]:
    """Of eager PyTorch at batch 64, as far as a checkout's record of ``experiments onnx-speed`` has it."""
    record = checkout / "experiments" / "results" / "onnx_speed.json"
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"] if record.is_file() else ()
    timed = [row for row in rows if (row["name"], row["group"]["batch"]) == ("eager fp32", 64)]
    return {row["group"]["weights"]: row["facts"]["images_per_second"] for row in timed}


def recipe_head(name: str, manifest: Manifest) -> str:
    """The comment that a recipe opens with: command, hardware, time and result of the shipped weights."""
    entry = next((entry for entry in manifest.entries.values() if entry.recipe == name), None)
    hardware, time, result = "-", "not run yet", "not run yet"
    if entry is not None:
        hardware = entry.hardware
        time = f"{entry.train_minutes:.0f} minutes for {entry.epochs} epochs"
        result = f"{entry.metrics.top1_percent:.2f} % top-1 on the test images, last epoch, seed {entry.seed}"
    dataset = name.split(".")[1]
    return (
        f"# Command   conam train {name} --data {dataset} --output runs/{name}\n"
        f"# Hardware  {hardware}\n# Time      {time}\n# Result    {result}\n"
    )


def fill_table(text: str, name: str, table: str, path: Path, command: str = "conam tables") -> str:
    """A Markdown text with a table between the markers of that name and of the command that writes it.

    Raises:
        UserError: If a marker is missing; ``path`` is what the message calls the document.
    """
    begin, end = f"<!-- {name}: written by `{command}` -->\n", f"<!-- end of {name} -->\n"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"{path} has no place for its table {name}: put the lines {begin}{end} back.")
    return f"{before}{begin}\n{table.strip()}\n\n{end}{after}"


def rewrite(files: dict[Path, str]) -> list[Path]:
    """Write the files whose text is another; returns their paths."""
    changed = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        write_text(path, files[path])
    return changed


def rewrite_tables() -> list[Path]:
    """Rewrite the generated files that are out of date; returns their paths."""
    checkout = find_checkout()
    if checkout is None:
        raise UserError("The tables are those of a checkout of conam_zoo: run from one.")
    return rewrite(generated_files(checkout))
