"""One unit of work: an arm over texts, from the engine to a file of rows, with progress."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.arms import Arm, engine, host
from benchmarks.quality.buckets import BUCKET, Buckets
from benchmarks.quality.forcing import Losses, last_losses, stream
from benchmarks.quality.isolate import isolated
from benchmarks.quality.store import Store
from sink_vllm.policy.schedule import Schedule

RECOMPUTE_BATCH = 16
"""Windows prefilled in one engine step."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which losses are kept one by one, and how fine the rest is."""

    every: int = 50
    bucket: int = BUCKET


class Progress:
    """A line on standard error every few seconds."""

    def __init__(self, what: str, total: int, seconds: float = 15.0) -> None:
        self._what, self._total, self._seconds = what, total, seconds
        self._done = 0
        self._began = self._shown = time.monotonic()
        self._show(self._began)

    def add(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._shown >= self._seconds or self._done == self._total:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        rate = self._done / max(now - self._began, 1e-9)
        left = f", {(self._total - self._done) / rate:,.0f} s left" if self._done else ""
        print(
            f"{self._what}: {self._done:,} of {self._total:,} ({rate:,.0f}/s{left})",
            file=sys.stderr,
            flush=True,
        )


def run_streams(
    store: Store,
    model: str,
    arms: Mapping[str, Arm],
    texts: Mapping[str, Sequence[int]],
    sampling: Sampling,
    how: str = "prompt",
    streams: int = 8,
) -> None:
    """Stream all texts through all arms; one file per unit and text, those that exist left alone.

    Args:
        arms: by the name of their unit; they must fit on one engine (``arms.shared``).
        streams: requests at once.
    """
    todo = [(unit, text) for unit in arms for text in texts if not store.done(f"{unit}-{text}")]
    for first in range(0, len(todo), streams):
        some = todo[first : first + streams]
        ids = {f"t{i}": list(texts[text]) for i, (_, text) in enumerate(some)}
        options = {f"t{i}": arms[unit].options for i, (unit, _) in enumerate(some)}
        rows = {name: _Unit(sampling) for name in ids}
        what = f"{', '.join(dict.fromkeys(unit for unit, _ in some))} on {len(texts)} texts"
        progress = Progress(what, sum(map(len, ids.values())))
        members = list(arms.values())
        given = options if len(members) > 1 else None
        for losses in isolated(_stream, host(members), model, ids, how, given):
            for name, values in losses.items():
                rows[name].add(values)
            progress.add(sum(map(len, losses.values())))
        for (unit, text), one in zip(some, rows.values(), strict=True):
            facts = unit_facts(unit, text, model, arms[unit], sampling, how)
            with store.unit(f"{unit}-{text}", **facts) as file:
                for row in one.finish():
                    file.add(**row)


def run_windows(
    store: Store,
    prefix: str,
    model: str,
    schedule: Schedule,
    texts: Mapping[str, Sequence[int]],
    sampling: Sampling,
    bos: int | None,
    begin: int,
    end: int,
    dtype: str = "float32",
) -> None:
    """The sliding window with re-computation at positions divisible by ``every``.

    The window is as many tokens as a stream under ``schedule`` has cached there.

    Args:
        bos: token in front of every window, counted as one of its tokens; ``None`` for none.
    """
    arm = Arm(name=prefix, kind="recompute", limit=schedule.capacity + 1, dtype=dtype)
    todo = {name: text for name, text in texts.items() if not store.done(f"{prefix}-{name}")}
    names = list(todo)
    jobs: list[tuple[str, list[int]]] = []
    for name, text in todo.items():
        first = -(-begin // sampling.every) * sampling.every
        for p in range(first, min(end, len(text)), sampling.every):
            jobs.append(
                (f"{names.index(name)}p{p}", [*window_before(text, p, schedule, bos), text[p]])
            )
    progress = Progress(f"{prefix} on {', '.join(todo)}", len(jobs))
    measured: dict[str, dict[int, float]] = {name: {} for name in todo}
    for losses in isolated(_windows, arm, model, jobs):
        for job, loss in losses.items():
            index, _, position = job.partition("p")
            measured[names[int(index)]][int(position)] = round(loss, 4)
        progress.add(len(losses))
    for name, at in measured.items():
        facts = unit_facts(prefix, name, model, arm, sampling, "prompt")
        with store.unit(f"{prefix}-{name}", **facts) as file:
            file.add(at=list(at), losses=list(at.values()))


def window_before(
    text: Sequence[int], position: int, schedule: Schedule, bos: int | None
) -> list[int]:
    """The last tokens before ``position``, as many as a stream has cached there."""
    size = schedule.cached(position)
    if bos is None:
        return list(text[position - size : position])
    return [bos, *text[position - size + 1 : position]]


def unit_facts(
    prefix: str, text: str, model: str, arm: Arm, sampling: Sampling, how: str
) -> dict[str, Any]:
    return {
        "unit": prefix,
        "text": text,
        "model": model.rstrip("/").rpartition("/")[2],
        "arm": arm.row(),
        "every": sampling.every,
        "how": how,
    }


class _Unit:
    """Rows of one stream, kept until all streams of the engine have ended."""

    def __init__(self, sampling: Sampling) -> None:
        self._buckets = Buckets(sampling.every, sampling.bucket)
        self._rows: list[dict[str, Any]] = []

    def add(self, losses: Sequence[float]) -> None:
        self._rows.extend(self._buckets.add(losses))

    def finish(self) -> list[dict[str, Any]]:
        return [*self._rows, *self._buckets.rest()]


def _stream(
    arm: Arm,
    model: str,
    texts: Mapping[str, Sequence[int]],
    how: str,
    options: Mapping[str, Mapping[str, int]] | None = None,
) -> Iterator[Losses]:
    with engine(arm, model, len(texts)) as core:
        yield from stream(core, texts, how, options)


def _windows(
    arm: Arm, model: str, jobs: Sequence[tuple[str, list[int]]]
) -> Iterator[dict[str, float]]:
    with engine(arm, model, RECOMPUTE_BATCH) as core:
        yield from last_losses(core, jobs, RECOMPUTE_BATCH)
