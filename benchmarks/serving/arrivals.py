"""Arithmetic on arrival times of tokens: gaps, percentiles, rates (no vLLM, no I/O)."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sink_vllm.policy.schedule import Schedule

PERCENTILES = (50, 95, 99)
GAP_LIMIT = 1.5
"""No gap at an eviction should be longer than this many medians."""


@dataclass(slots=True)
class Log:
    """What one stream delivered; times in seconds of the monotonic clock."""

    prompt: int
    """Stream tokens before the first generated one."""
    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """One entry per token; tokens of one event share theirs."""
    restarts: list[int] = field(default_factory=list)
    """Indices in ``arrivals`` of tokens that began a request after the first."""

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.arrivals)]


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between order statistics.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile of nothing was asked for; give at least one value")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Number, mean, p50, p95, p99 and the largest; only the number when there are none."""
    if not values:
        return {"n": 0}
    found = {"n": len(values), "mean": statistics.fmean(values), "max": max(values)}
    return {**found, **{f"p{p}": percentile(values, p) for p in PERCENTILES}}


def is_evicting(schedule: Schedule, prompt: int, gap: int) -> bool:
    """Whether a stream evicted within its ``gap``-th gap between tokens (0: first to second).

    Token ``i`` leaves the engine when ``prompt + i`` tokens have been computed.
    """
    before = prompt + gap
    return schedule.evictions(before + 1) > schedule.evictions(before)


def split_gaps(logs: Iterable[Log], schedule: Schedule) -> tuple[list[float], list[float]]:
    """Gaps in which a stream evicted or restarted, and all others."""
    at: list[float] = []
    elsewhere: list[float] = []
    for log in logs:
        restarts = set(log.restarts)
        for index, gap in enumerate(log.gaps):
            interrupted = (
                index + 1 in restarts if restarts else is_evicting(schedule, log.prompt, index)
            )
            (at if interrupted else elsewhere).append(gap)
    return at, elsewhere


def common_rate(logs: Sequence[Log]) -> float | None:
    """Tokens per second of all streams together while all of them run.

    None when fewer than half of the tokens arrived in that time.
    """
    if not logs or not all(len(log.arrivals) > 1 for log in logs):
        return None
    begin = max(log.arrivals[0] for log in logs)
    end = min(log.arrivals[-1] for log in logs)
    if end <= begin:
        return None
    inside = sum(begin < time <= end for log in logs for time in log.arrivals)
    return inside / (end - begin) if 2 * inside >= sum(len(log.arrivals) for log in logs) else None


def summary(logs: Sequence[Log], schedule: Schedule, *, evicts: bool) -> dict[str, Any]:
    """The figures of one run.

    Args:
        logs: one per stream.
        schedule: of the policy; says which gaps contain an eviction.
        evicts: whether this arm evicts by that schedule (otherwise only restarts interrupt).
    """
    tokens = sum(len(log.arrivals) for log in logs)
    times = [time for log in logs for time in log.arrivals]
    elapsed = max(times) - min(log.started for log in logs) if times else 0.0
    per_token = [
        (log.arrivals[-1] - log.arrivals[0]) / (len(log.arrivals) - 1)
        for log in logs
        if len(log.arrivals) > 1
    ]
    gaps = [gap for log in logs for gap in log.gaps]
    found: dict[str, Any] = {
        "tokens": tokens,
        "seconds": elapsed,
        "tokens_per_second": tokens / elapsed if elapsed else None,
        "common_tokens_per_second": common_rate(logs),
        "first_token": spread([log.arrivals[0] - log.started for log in logs if log.arrivals]),
        "per_token": spread(per_token),
        "gaps": spread(gaps),
    }
    if evicts or any(log.restarts for log in logs):
        at, elsewhere = split_gaps(logs, schedule)
        found["interruptions"] = interruptions(at, elsewhere)
    return found


def interruptions(at: Sequence[float], elsewhere: Sequence[float]) -> dict[str, Any]:
    """How much longer gaps at evictions are, beside how long the other gaps get by themselves."""
    # The median is zero if the client was so late that it read most tokens at once.
    if not at or not elsewhere or not (median := statistics.median([*at, *elsewhere])):
        return {"n": len(at)}
    return {
        "n": len(at),
        "median_gap": median,
        "median_ratio": statistics.median(at) / median,
        "p95_ratio": percentile(at, 95) / median,
        "max_ratio": max(at) / median,
        "share_above": sum(gap > GAP_LIMIT * median for gap in at) / len(at),
        "elsewhere_p95_ratio": percentile(elsewhere, 95) / median,
        "elsewhere_max_ratio": max(elsewhere) / median,
        "elsewhere_share_above": sum(gap > GAP_LIMIT * median for gap in elsewhere)
        / len(elsewhere),
    }


def by_position(logs: Iterable[Log], width: int) -> dict[int, float]:
    """Median gap per span of ``width`` stream positions, by the span's first position."""
    spans: dict[int, list[float]] = {}
    for log in logs:
        for index, gap in enumerate(log.gaps):
            position = (log.prompt + index + 1) // width * width
            spans.setdefault(position, []).append(gap)
    return {position: statistics.median(gaps) for position, gaps in sorted(spans.items())}


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Growth of counters."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
