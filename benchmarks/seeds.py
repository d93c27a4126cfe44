"""Statistics over seeds: means with 95 % intervals, of numbers and of whole trees of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom (n - 1 seeds).
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % interval (Student's t); nan for one seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of values, one for each seed."""
        mean, n = statistics.fmean(values), len(values)
        half = STUDENT_T[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(mean, half)

    def text(self, digits: int = 3, scale: float = 1) -> str:
        """E.g. '3.951 ± 0.012', both multiplied by `scale`."""
        spread = "" if math.isnan(self.half) else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{spread}"


def steps_at(rows: list[dict[str, Any]], steps: int) -> int:
    """The index of the row of so many thinking steps; the first row is of one, or of none where that predicts."""
    return next(i for i, row in enumerate(rows) if row["steps"] == steps)


def over_seeds(values: Sequence[Any], left_out: Collection[str] = ()) -> Any:
    """Equal trees of numbers -> one tree of intervals; what is no number is the first one's.

    Args:
        values: a tree for each seed.
        left_out: keys that the result has not.
    """
    first = values[0]
    if isinstance(first, dict):
        return {key: over_seeds([v[key] for v in values], left_out) for key in first if key not in left_out}
    if isinstance(first, list):
        return [over_seeds(rows, left_out) for rows in zip(*values, strict=True)]
    if isinstance(first, int | float) and None not in values:
        return vars(Interval.of(values))
    return first


def text_of(entry: Mapping[str, float] | None, digits: int = 3, scale: float = 1, unit: str = "") -> str:
    """`Interval.text` of an interval of `over_seeds`, and its unit; "-" for None."""
    return "-" if entry is None else Interval(**entry).text(digits, scale) + unit
