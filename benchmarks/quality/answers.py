"""Streams that are asked questions at the same time: what StreamEval and chat do with them."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from benchmarks.quality.store import Store

Stream = TypeVar("Stream")


def answered(
    store: Store,
    unit: str,
    facts: Mapping[str, Any],
    ask: Callable[[Stream], Iterable[dict[str, Any]]],
    streams: Sequence[Stream],
) -> None:
    """Ask all streams of a unit at once, keep a row per question, say how many were right."""
    with ThreadPoolExecutor(len(streams)) as pool:
        rows = [row for found in pool.map(ask, streams) for row in found]
    with store.unit(unit, **facts) as file:
        for row in rows:
            file.add(**row)
    right = sum(row["right"] for row in rows)
    print(f"{unit}: {right} of {len(rows)} right", file=sys.stderr, flush=True)
