"""Raw rows of a folder, and the ratios between arms (no vLLM)."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Row, read


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 1, unit: float = 1.0) -> str:
        middle, low, high = (f"{unit * v:,.{digits}f}" for v in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} [{low}–{high}]"


class Report:
    """The rows of all finished scenarios of a folder."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    @classmethod
    def read(cls, folder: Path) -> "Report":
        parts = read(folder).values()
        return cls({**facts, **row} for facts, *found in parts for row in found)

    def scenarios(self, kind: str) -> list[str]:
        """Names of the scenarios of a kind, in the order in which they were found."""
        return list(dict.fromkeys(row["scenario"] for row in self.rows if row["kind"] == kind))

    def of(self, scenario: str, streams: int | None = None, arm: str | None = None) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["scenario"] == scenario
            and (streams is None or row["streams"] == streams)
            and (arm is None or row["arm"] == arm)
        ]

    def streams(self, scenario: str) -> list[int]:
        return sorted({row["streams"] for row in self.of(scenario)})

    def arms(self, scenario: str, streams: int | None = None) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.of(scenario, streams)))

    def rate_of(self, scenario: str, streams: int) -> Callable[[Row], float]:
        """Tokens per second: while all streams run, or over the whole run where they do not.

        One of the two for all arms: the whole run as soon as one row has only that, or a stream
        of it was preempted (until memory ran out, all of them ran).
        """
        common = "common_tokens_per_second"
        rows = self.of(scenario, streams)
        steady = all(row.get(common) and not row.get("preemptions") for row in rows)
        key = common if steady else "tokens_per_second"
        return lambda row: float(row[key])

    def rates(self, scenario: str, streams: int, arm: str) -> Spread | None:
        rate = self.rate_of(scenario, streams)
        return Spread.of([rate(row) for row in self.of(scenario, streams, arm)])

    def ratio(self, scenario: str, streams: int, over: str, under: str) -> Spread | None:
        """Rate of ``over`` divided by that of ``under``, repetition by repetition."""
        rate = self.rate_of(scenario, streams)
        pairs = self._pairs(scenario, streams, over, under)
        return Spread.of([rate(a) / rate(b) for a, b in pairs])

    def value_ratio(
        self, scenario: str, streams: int, over: str, under: str, value: Callable[[Row], float]
    ) -> Spread | None:
        """The same for any value of a row."""
        pairs = self._pairs(scenario, streams, over, under)
        return Spread.of([value(a) / value(b) for a, b in pairs])

    def _pairs(self, scenario: str, streams: int, over: str, under: str) -> list[tuple[Row, Row]]:
        below = {row["repetition"]: row for row in self.of(scenario, streams, under)}
        return [
            (row, below[row["repetition"]])
            for row in self.of(scenario, streams, over)
            if row["repetition"] in below
        ]

    def pooled_p95(self, scenario: str, streams: int, arm: str) -> float:
        """95th percentile of the first-token times of all repetitions, in seconds."""
        from benchmarks.serving.arrivals import percentile

        times = [us for row in self.of(scenario, streams, arm) for us in row["first_token_us"]]
        return percentile(times, 95) / 1e6
