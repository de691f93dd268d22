"""Means over seeds, and differences to a baseline seed by seed, with their confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

__all__ = ["Comparison", "compare", "t_quantile"]

# 97.5 % points of Student's t distribution with 1, 2, ... 30 degrees of freedom, as in any table of it.
# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


@dataclass(frozen=True)
class Comparison:
    """A variant over its seeds.

    Attributes:
        variant: Short name.
        values: What is compared, top-1 in percent if nothing else is said, seed by seed.
        mean: Their mean.
        deviation: Their standard deviation (n - 1); None for one seed.
        difference: Mean difference to the baseline over the seeds that both have; None without such seeds.
        half_width: Half of its 95 % confidence interval (Student's t); None for one such seed.
        pairs: How many seeds both have.
        failed: How many cells failed.
        facts: The cell of the first seed, for what does not depend on it.
    """

    variant: str
    values: list[float]
    mean: float | None
    deviation: float | None
    difference: float | None
    half_width: float | None
    pairs: int
    failed: int
    facts: dict[str, Any]


def t_quantile(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution; beyond 30 degrees of freedom that of 30, which is larger."""
    return T_975[min(degrees, len(T_975)) - 1]


def compare(
    cells: Sequence[dict[str, Any]], baseline: str, order: Sequence[str] = (), metric: str = "top1_percent"
) -> list[Comparison]:
    """Every variant of one model on one data set beside the baseline.

    Args:
        cells: Cells of a ``Grid`` that differ in variant and seed alone.
        baseline: Variant that the differences refer to.
        order: Variants that come first, in this order; the others follow by name.
        metric: Key of the cells: what is compared.
    """
    scores: dict[str, dict[int, float]] = {}
    failed: dict[str, int] = {}
    facts: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda cell: int(cell["seed"])):
        variant = cell["variant"]
        facts.setdefault(variant, cell)
        scores.setdefault(variant, {})
        failed[variant] = failed.get(variant, 0) + ("failed" in cell)
        if "failed" not in cell:
            scores[variant][cell["seed"]] = cell[metric]
    names = [name for name in order if name in facts] + sorted(name for name in facts if name not in order)
    base = scores.get(baseline, {})
    rows = []
    for name in names:
        values = list(scores[name].values())
        differences = [value - base[seed] for seed, value in scores[name].items() if seed in base]
        if name == baseline:
            differences = []
        rows.append(
            Comparison(
                variant=name,
                values=values,
                mean=fmean(values) if values else None,
                deviation=stdev(values) if len(values) > 1 else None,
                difference=fmean(differences) if differences else None,
                half_width=_half_width(differences) if len(differences) > 1 else None,
                pairs=len(differences),
                failed=failed[name],
                facts=facts[name],
            )
        )
    return rows


def _half_width(differences: list[float]) -> float:
    count = len(differences)
    return t_quantile(count - 1) * stdev(differences) / sqrt(count)
