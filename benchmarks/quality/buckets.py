"""Losses by stream position: buckets, sampled positions, perplexities, confidence intervals."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BUCKET = 1000
"""Tokens per row of raw data, unless a run asks for finer ones."""
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
"""Student's t for 95% by degrees of freedom, from 1; 1.96 beyond."""


class Buckets:
    """Takes the losses of one stream in order; gives a row per full bucket.

    A row is ``{"start": first position, "tokens": n, "sum": of losses, "sampled": [...]}``, the
    last of them the losses at positions divisible by ``every``. Position 0 has no loss.
    """

    def __init__(self, every: int, size: int = BUCKET) -> None:
        self._every = every
        self._size = size
        self._position = 1
        self._pending: list[float] = []

    def add(self, losses: Iterable[float]) -> Iterator[dict[str, Any]]:
        self._pending.extend(losses)
        while (size := self._size - self._position % self._size) <= len(self._pending):
            yield self._row(size)

    def rest(self) -> Iterator[dict[str, Any]]:
        """The last bucket, which may be short."""
        if self._pending:
            yield self._row(len(self._pending))

    def _row(self, size: int) -> dict[str, Any]:
        losses, self._pending = self._pending[:size], self._pending[size:]
        start, self._position = self._position, self._position + size
        first = -start % self._every
        return {
            "start": start,
            "tokens": size,
            "sum": round(math.fsum(losses), 4),
            "sampled": [round(loss, 4) for loss in losses[first :: self._every]],
        }


@dataclass(slots=True)
class Series:
    """The losses of one arm on one text, as read back from its rows."""

    rows: list[Mapping[str, Any]] = field(default_factory=list)
    at: dict[int, float] = field(default_factory=dict)
    """Loss by sampled position."""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], every: int) -> "Series":
        series = cls()
        for row in rows:
            if "at" in row:  # recompute: positions are given
                series.at.update(zip(row["at"], row["losses"], strict=True))
                continue
            series.rows.append(row)
            first = -(-row["start"] // every) * every
            series.at.update({first + i * every: v for i, v in enumerate(row["sampled"])})
        return series

    def perplexity(self, begin: float = 0, end: float = math.inf) -> float:
        """Over whole rows that start in ``[begin, end)``."""
        rows = [row for row in self.rows if begin <= row["start"] < end]
        tokens = sum(row["tokens"] for row in rows)
        return math.exp(math.fsum(row["sum"] for row in rows) / tokens) if tokens else math.nan

    def by_bucket(self, size: int) -> dict[int, float]:
        """Perplexity by the first position of buckets of ``size`` tokens; full ones only."""
        sums: dict[int, list[float]] = {}
        for row in self.rows:
            key = row["start"] // size * size
            total = sums.setdefault(key, [0.0, 0])
            total[0] += row["sum"]
            total[1] += row["tokens"]
        least = size - 1  # position 0 has no loss
        return {key: math.exp(s / n) for key, (s, n) in sorted(sums.items()) if n >= least}


def differences(one: Series, other: Series, begin: float = 0, end: float = math.inf) -> list[float]:
    """Loss of ``one`` minus that of ``other`` at the positions both have sampled."""
    return [loss - other.at[p] for p, loss in one.at.items() if p in other.at and begin <= p < end]


def ratio(one: Series, other: Series, begin: float = 0, end: float = math.inf) -> float:
    """Perplexity of ``one`` over that of ``other`` at the positions both have sampled."""
    found = differences(one, other, begin, end)
    return math.exp(statistics.fmean(found)) if found else math.nan


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% confidence interval (Student's t over independent values)."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        n = len(values)
        if n < 2:
            return cls(statistics.fmean(values), math.nan, n)
        t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n)

    def as_ratio(self) -> str:
        """The interval of a difference of logarithms, as a ratio."""
        low, mid, high = (math.exp(self.mean + k * self.half) for k in (-1, 0, 1))
        return f"{mid:.3f} ({low:.3f} to {high:.3f})"
