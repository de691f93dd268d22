"""Means over seeds, and differences to a baseline seed by seed, with their confidence intervals.

The intervals are those of a two-way layout: a score is modelled as the sum of an effect of its variant, an effect of
its seed, and chance, whose deviation is the same for all. That deviation is estimated from all variants together, since
two or three seeds of a single pair say little about it. With two variants it is the paired t-test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np

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
    """A variant over its seeds."""

    variant: str  # short name
    values: list[float]  # what is compared, top-1 in percent if nothing else is said, seed by seed
    mean: float | None  # of the values; None if there are none
    deviation: float | None  # their standard deviation (n - 1); None for fewer than two
    difference: float | None  # mean difference to the baseline over common seeds; None without any, or for the baseline
    half_width: float | None  # of its 95 % confidence interval, see above; None without it or an estimate of chance
    pairs: int  # how many seeds it and the baseline have in common; 0 for the baseline itself
    failed: int  # how many cells failed
    facts: dict[str, Any]  # the cell of the first seed, for what does not depend on it


def t_quantile(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution; beyond 30 degrees of freedom that of 30, which is larger."""
    return T_975[min(degrees, len(T_975)) - 1]


def compare(
    cells: Sequence[dict[str, Any]], baseline: str, order: Sequence[str] = (), metric: str = "top1_percent"
) -> list[Comparison]:
    """Every variant of one model on one data set beside the baseline.

    ``cells`` are those of a ``Grid`` that differ in variant and seed alone, and ``metric`` is the key of what is
    compared. The variants in ``order`` come first, in this order; the others follow by name.
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
    chance, degrees = _chance(scores)
    rows = []
    for name in names:
        values = list(scores[name].values())
        differences = [value - base[seed] for seed, value in scores[name].items() if seed in base]
        if name == baseline:
            differences = []
        estimated = bool(differences) and degrees > 0
        rows.append(
            Comparison(
                variant=name,
                values=values,
                mean=fmean(values) if values else None,
                deviation=stdev(values) if len(values) > 1 else None,
                difference=fmean(differences) if differences else None,
                half_width=t_quantile(degrees) * chance * sqrt(2 / len(differences)) if estimated else None,
                pairs=len(differences),
                failed=failed[name],
                facts=facts[name],
            )
        )
    return rows


def _chance(scores: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """Standard deviation of the residuals after variant and seed, by least squares, and its degrees of freedom."""
    cells = [(variant, seed, score) for variant, of_seeds in scores.items() for seed, score in of_seeds.items()]
    variants, seeds = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells})
    design = np.zeros((len(cells), len(variants) + len(seeds)))
    for row, (variant, seed, _) in enumerate(cells):
        design[row, variants.index(variant)] = design[row, len(variants) + seeds.index(seed)] = 1
    values = np.array([score for _, _, score in cells])
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    degrees = len(cells) - int(rank)
    squares = float(((values - design @ effects) ** 2).sum())
    return (sqrt(squares / degrees) if degrees else 0.0), degrees
