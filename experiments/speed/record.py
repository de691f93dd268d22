"""What a benchmark measured, in one form for all: rows of one contender each, and on what they were measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conam_zoo.errors import UserError
from conam_zoo.training.environment import describe_environment

__all__ = [
    "BenchmarkRecord",
    "Row",
    "Skipped",
    "command_today",
    "make_record",
    "read_record",
    "summarise",
]


@dataclass(frozen=True)
class Row:
    """One contender of one group; the contenders of a group were measured in turns.

    Attributes:
        group: What all contenders of the group have in common.
        name: The contender.
        unit: Of ``median``, ``min`` and ``max``: ``"ms"`` or ``"MiB"``.
        n: Number of measurements.
        median: Their median.
        min: The smallest.
        max: The largest.
        ratio: Median over the rounds of this contender's measurement divided by that of ``ratio_to`` in the same round.
        ratio_min: Smallest of these quotients.
        ratio_max: Largest of these quotients.
        ratio_to: The contender of the group that ``ratio`` refers to.
        facts: Whatever else is known of the contender; the unit stands in the key.
    """

    group: dict[str, Any]
    name: str
    unit: str
    n: int
    median: float
    min: float
    max: float
    ratio: float
    ratio_min: float
    ratio_max: float
    ratio_to: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A contender that was not measured, and why."""

    group: dict[str, Any]
    name: str
    reason: str


@dataclass(frozen=True)
class BenchmarkRecord:
    """A whole benchmark. It holds no date, so that the same measurement is the same file.

    Attributes:
        what: ``"train"``, ``"inference"``, ``"cost"`` or ``"densenet"``.
        command: The command line, or what was called.
        hardware: Processor or accelerator.
        threads: CPU threads within an operation.
        library_versions: Versions of Python and of the libraries that were run.
        code_commit: State of the code, None outside a checkout.
        settings: The arguments.
        rows: The measurements.
        skipped: What was not measured.
    """

    what: str
    command: str
    hardware: str
    threads: int
    library_versions: dict[str, str]
    code_commit: str | None
    settings: dict[str, Any]
    rows: list[Row]
    skipped: list[Skipped] = field(default_factory=list)

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
    """One row for each contender of a group.

    Args:
        measurements: For each contender one number a round, in ``unit``; all have the same number of rounds.
        group: What the contenders have in common.
        reference: The contender that the ratios refer to.
        unit: ``"ms"`` or ``"MiB"``.
        facts: Further facts by contender.

    Raises:
        ValueError: If the reference is not among the contenders, or the numbers of rounds differ.
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


def read_record(path: Path) -> BenchmarkRecord:
    """Read a record that ``--json`` wrote.

    Raises:
        UserError: If the file is none.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in facts.pop("rows")]
        skipped = [Skipped(**entry) for entry in facts.pop("skipped")]
        return BenchmarkRecord(**facts, rows=rows, skipped=skipped)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not the record of a benchmark: write it again with --json.") from error
