"""The record of a benchmark: a row for each thing measured, the machine and versions, and the tables made of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conam_zoo.errors import UserError
from conam_zoo.training.run_folder import describe_environment


@dataclass(frozen=True)
class Row:
    """One measured thing, ours or a baseline, of one group; those of a group were measured in turns."""

    group: dict[str, Any]  # what all rows of the group have in common
    name: str  # what was measured
    unit: str  # of ``median``, ``min`` and ``max``: "ms" or "MiB"
    n: int  # number of measurements
    median: float
    min: float
    max: float
    ratio: float  # median over the rounds of this measurement divided by that of ``ratio_to`` in the same round
    ratio_min: float  # smallest of these quotients
    ratio_max: float  # largest of these quotients
    ratio_to: str  # the row of the group that ``ratio`` refers to
    facts: dict[str, Any] = field(default_factory=dict)  # anything else that was measured; the unit is part of the key


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    group: dict[str, Any]
    name: str
    reason: str


@dataclass(frozen=True)
class BenchmarkRecord:
    """A whole benchmark. It holds no date, so that the same measurement is the same file."""

    what: str  # "train", "step", "inference", "cost", "densenet" or "onnx-speed"
    command: str  # the command line, or what was called
    hardware: str  # processor or accelerator
    threads: int  # CPU threads within an operation
    library_versions: dict[str, str]  # of Python and of the libraries that were run
    code_commit: str | None  # state of the code, None outside a checkout
    settings: dict[str, Any]  # the arguments
    rows: list[Row]
    skipped: list[Skipped] = field(default_factory=list)  # what was not measured

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON takes it, with numbers of five significant digits."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def summarise(
    measurements: Mapping[str, Sequence[float]],
    *,
    group: Mapping[str, Any],
    reference: str,
    unit: str,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """One row for each name of a group.

    ``measurements`` has for each name one number per round, in ``unit``, ``"ms"`` or ``"MiB"``; the ratios refer to the
    name ``reference``. A reference that was not measured is a ``ValueError``, as are different numbers of rounds.
    ``facts`` are further ones, by name.
    """
    if reference not in measurements:
        raise ValueError(f"The reference {reference!r} was not measured: {', '.join(measurements)} were.")
    base = measurements[reference]
    rows = []
    for name, values in measurements.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        rows.append(
            Row(
                group=dict(group),
                name=name,
                unit=unit,
                n=len(values),
                median=median(values),
                min=min(values),
                max=max(values),
                ratio=median(ratios),
                ratio_min=min(ratios),
                ratio_max=max(ratios),
                ratio_to=reference,
                facts=dict((facts or {}).get(name, {})),
            )
        )
    return rows


def time_rows(
    seconds: Mapping[str, Sequence[float]],
    *,
    group: Mapping[str, Any],
    reference: str,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """The rows, in milliseconds, of what ``time_in_turns`` measured in seconds."""
    milliseconds = {name: [1000 * value for value in values] for name, values in seconds.items()}
    return summarise(milliseconds, group=group, reference=reference, unit="ms", facts=facts)


def make_record(
    what: str,
    rows: list[Row],
    *,
    settings: Mapping[str, Any],
    command: str,
    skipped: Sequence[Skipped] = (),
    versions: Mapping[str, str] | None = None,
) -> BenchmarkRecord:
    """Put the rows together with the machine and the versions they were measured on."""
    environment = describe_environment()
    return BenchmarkRecord(
        what=what,
        command=command,
        hardware=environment["hardware"],
        threads=torch.get_num_threads(),
        library_versions={**environment["library_versions"], **(versions or {})},
        code_commit=environment["code_commit"],
        settings=dict(settings),
        rows=rows,
        skipped=list(skipped),
    )


def command_today(command: str) -> str:
    """The command of a record as it is given today: the first records name ``conam benchmark``."""
    today = command.replace("conam benchmark attention", "conam benchmark compare")
    today = today.replace("conam benchmark ", "python -m experiments ")
    return today.replace(" benchmarks/", " experiments/results/")


def read_rows(path: Path, key: str) -> Any:
    """What a file of results holds under its key; None if there is no such file. A damaged one is refused."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of {key} ({error}): restore it.") from error


def read_record(path: Path) -> BenchmarkRecord:
    """Read a record that ``--json`` wrote."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in facts.pop("rows")]
        skipped = [Skipped(**entry) for entry in facts.pop("skipped")]
        return BenchmarkRecord(**facts, rows=rows, skipped=skipped)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not the record of a benchmark: write it again with --json.") from error


BENCHMARKS = ("train", "step", "inference", "cost", "densenet")
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

    The cost has a line for each group and a column for each attention; the others have a line for each row.
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
    for key, measured in by_group.items():
        base = measured[reference]
        ratios = [f"{measured[name].ratio:.3f}" if name in measured else "-" for name in names]
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

    A file of such a name that is not a record, or is one of another benchmark, is refused.
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
