"""The eviction schedule: pure arithmetic on stream positions (no torch, no vLLM).

What a query may see is a function of its stream position alone, so results cannot depend on
batching, chunking, prefix-cache hits or the order in which requests are scheduled::

    stream    [0, S)            [S, S + e*g)          [S + e*g, p)
              sink tokens       evicted               window
    cache     [0, S)                                  [S, p - e*g)

with ``p`` tokens computed and ``e = evictions(p)``. Eviction is lazy: it happens when the cache
holds ``C = S + W + g`` tokens and one more must be computed, so the cache never holds more than
``C`` tokens and, once the stream is longer than ``C``, always more than ``S + W``.

Difference from the reference implementation (arXiv 2309.17453, section 3.2): that one evicts one
token per step; this one evicts ``g`` tokens at once. Sinks are exact, the window is never smaller
than ``W``.
"""

import functools
from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b`` for non-negative ``a`` and positive ``b``."""
    return -(-a // b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Sink tokens ``S``, window ``W`` and stride ``g``, all in tokens."""

    sink_tokens: int
    window: int
    stride: int

    @property
    def capacity(self) -> int:
        """Most tokens a stream ever has cached: ``C = S + W + g``."""
        return self.sink_tokens + self.window + self.stride

    def evictions(self, computed: int) -> int:
        """Evictions made by the time ``computed`` tokens of the stream have been computed."""
        return cdiv(max(computed - self.capacity, 0), self.stride)

    def evicted(self, computed: int) -> int:
        """Tokens evicted by the time ``computed`` tokens of the stream have been computed."""
        return self.evictions(computed) * self.stride

    def cached(self, computed: int) -> int:
        """Tokens in the cache when ``computed`` tokens of the stream have been computed."""
        return computed - self.evicted(computed)

    def window_start(self, computed: int) -> int:
        """Stream position of the first cached token after the sinks."""
        return self.sink_tokens + self.evicted(computed)

    def cached_positions(self, computed: int) -> list[int]:
        """Stream positions of the cached tokens, in cache order."""
        sinks = range(min(self.sink_tokens, computed))
        first = min(self.sink_tokens, computed) + self.evicted(computed)
        return [*sinks, *range(first, computed)]


@dataclass(frozen=True, slots=True)
class EvictionPages:
    """Which entries of a stream's block table one eviction touches (table as before it).

    ``[0, sink_full)``                       head pages that hold sink tokens only
    ``[sink_full, sink_full + dropped)``     pages that leave the table
    ``border``                               page whose first ``border_sinks`` slots become sinks
                                             (``None`` when the sinks are page aligned)
    """

    sink_full: int
    dropped: int
    border: int | None
    border_sinks: int

    @property
    def sinks(self) -> int:
        """Pages that hold sink tokens."""
        return self.sink_full + (self.border is not None)

    @property
    def num_border(self) -> int:
        """Pages that hold sink tokens and window tokens: 0 or 1."""
        return int(self.border is not None)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, schedule: Schedule, block_size: int) -> "EvictionPages":
        """Page arithmetic of ``schedule`` for pages of ``block_size`` tokens.

        Token ``S + g`` sits in page ``S // block + g // block`` at slot ``S % block``, and still
        sits in that slot afterwards, because ``g`` is a multiple of the block size.
        """
        sink_full, border_sinks = divmod(schedule.sink_tokens, block_size)
        dropped = schedule.stride // block_size
        return cls(
            sink_full=sink_full,
            dropped=dropped,
            border=sink_full + dropped if border_sinks else None,
            border_sinks=border_sinks,
        )


@dataclass(frozen=True, slots=True)
class RopeAnchors:
    """Where the rope positions of a stream start, as a function of its evictions.

    The offset between rope positions and cache positions grows by the stride with every eviction,
    so that the window's keys can stay as they are. Before positions would leave the RoPE table it
    returns to 0 (re-anchoring), which takes one rotation of the window by ``-span``.
    """

    stride: int
    period: int
    """Evictions from one re-anchoring to the next; 0 when the model does not rotate keys."""

    @classmethod
    def of(cls, schedule: Schedule, rope_rows: int | None) -> "RopeAnchors":
        """Anchors for tables of ``rope_rows`` positions (at least the capacity), or for none."""
        period = 0
        if rope_rows is not None:
            period = (rope_rows - schedule.capacity) // schedule.stride + 1
        return cls(stride=schedule.stride, period=period)

    @property
    def span(self) -> int:
        """Rope positions between two anchors."""
        return self.period * self.stride

    def offset(self, evictions: int) -> int:
        """Rope position minus cache position after ``evictions``."""
        return evictions % self.period * self.stride if self.period else 0

    def reanchors(self, evictions: int) -> bool:
        """Whether the last of so many evictions (at least one) re-anchors."""
        return self.period > 0 and evictions % self.period == 0

    def reanchorings(self, evictions: int) -> int:
        """Re-anchorings that the first ``evictions`` evictions brought along."""
        return evictions // self.period if self.period else 0


def pages_per_stream(schedule: Schedule, block_size: int) -> int:
    """Pages one stream holds at most: its block table and its pinned sink pages."""
    return cdiv(schedule.capacity, block_size) + cdiv(schedule.sink_tokens, block_size)
