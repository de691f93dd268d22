"""Records as tables: cells for the terminal, Markdown for the documentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conam_zoo.errors import UserError
from experiments.speed.record import BenchmarkRecord, Row, command_today, read_record

__all__ = ["BENCHMARKS", "benchmark_tables", "record_tables"]

BENCHMARKS = ("train", "inference", "cost", "densenet")
Cells = list[list[str]]  # the first row holds the titles


def _number(value: float) -> str:
    """Three significant digits, and thousands separated."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _span(row: Row) -> str:
    middle = f"{_number(row.median)} {row.unit}"
    return middle if row.n == 1 else f"{middle} ({_number(row.min)} to {_number(row.max)})"


def _fact(value: Any) -> str:
    return "-" if value is None else _number(value) if isinstance(value, int | float) else str(value)


def record_tables(record: BenchmarkRecord) -> list[tuple[str, Cells]]:
    """The tables of a record, each with a sentence that says how to read it.

    The cost comes as one line for each group, one column for each contender; the others as one line for each contender.
    """
    if record.what != "cost":
        return [(f"Ratios are times, relative to {record.rows[0].ratio_to}: below 1 is faster.", _long(record.rows))]
    tables = []
    for part, sentence in (
        ("module", "The attention alone. Ratios are times, relative to ConAM: above 1 is slower than ConAM."),
        ("net", "Nets that hold the attention. Ratios are times, relative to the plain twin: above 1 is slower."),
        ("memory", "Memory of a training step. Ratios are relative to the plain twin."),
    ):
        rows = [row for row in record.rows if row.group["part"] == part]
        if rows:
            tables.append((sentence, _wide(rows)))
    return tables


def _long(rows: Sequence[Row]) -> Cells:
    groups = list(dict.fromkeys(key for row in rows for key in row.group))
    facts = list(dict.fromkeys(key for row in rows for key in row.facts))
    cells = [[*groups, "", "median (min to max)", "ratio", *(fact.replace("_", " ") for fact in facts)]]
    for row in rows:
        known = [str(row.group.get(key, "")) for key in groups]
        extra = [_fact(row.facts.get(fact)) for fact in facts]
        cells.append([*known, row.name, _span(row), f"{row.ratio:.2f}", *extra])
    return cells


def _wide(rows: Sequence[Row]) -> Cells:
    groups = [key for key in rows[0].group if key != "part"]
    reference = rows[0].ratio_to
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != reference]
    cells = [[*groups, reference, *names]]
    by_group: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        by_group.setdefault(tuple(str(row.group[key]) for key in groups), {})[row.name] = row
    for key, contenders in by_group.items():
        base = contenders[reference]
        ratios = [f"{contenders[name].ratio:.3f}" if name in contenders else "-" for name in names]
        cells.append([*key, f"{_number(base.median)} {base.unit}", *ratios])
    return cells


def _markdown(cells: Cells, text_columns: int) -> str:
    """A Markdown table; all columns but the first ``text_columns`` are aligned to the right."""
    title, *lines = cells
    rule = ["---" if index < text_columns else "--:" for index in range(len(title))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [title, rule, *lines])


def _conditions(record: BenchmarkRecord) -> str:
    versions = ", ".join(f"{name} {record.library_versions[name]}" for name in ("torch", "timm"))
    return f"`{command_today(record.command)}` on {record.hardware}, {versions}."


def benchmark_tables(folder: Path) -> dict[str, str]:
    """Markdown for each of ``BENCHMARKS`` from all records ``<benchmark>*.json`` in a folder, in order of their names.

    Raises:
        UserError: If such a file is no record, or one of another benchmark.
    """
    tables = {}
    for what in BENCHMARKS:
        pieces = []
        for path in sorted(folder.glob(f"{what}*.json")):
            record = read_record(path)
            if record.what != what:
                raise UserError(f"{path} is a record of 'experiments {record.what}': rename it.")
            pieces.append(_conditions(record))
            for sentence, cells in record_tables(record):
                columns = next(i for i, title in enumerate(cells[0]) if title in ("", record.rows[0].ratio_to, "none"))
                pieces += [sentence, _markdown(cells, columns + (cells[0][columns] == ""))]
            pieces += [_skips(record)] if record.skipped else []
        tables[what] = "\n\n".join(pieces) or "Not measured yet."
    return tables


def _skips(record: BenchmarkRecord) -> str:
    reasons = dict.fromkeys((skip.name.removeprefix("plain, "), skip.reason) for skip in record.skipped)
    return "Not measured: " + "; ".join(f"{name} ({reason})" for name, reason in reasons) + "."
