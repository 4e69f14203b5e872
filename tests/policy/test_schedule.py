"""The schedule against a simulation that moves one token at a time, on exhaustive small grids."""

import itertools
from collections.abc import Iterator

import pytest

from sink_vllm.policy.schedule import EvictionPages, RopeAnchors, Schedule, cdiv, pages_per_stream

STREAM = 60
"""Tokens per simulated stream: several evictions for every schedule of the grid."""

SCHEDULES = [
    Schedule(sink_tokens=sinks, window=window, stride=stride)
    for sinks, window, stride in itertools.product(range(6), range(1, 8), range(1, 9))
]
# Strides are multiples of the block size, and sinks may end anywhere in a page.
PAGED = [
    (Schedule(sink_tokens=sinks, window=window, stride=block * blocks), block)
    for block, sinks, window, blocks in itertools.product(
        (1, 2, 3, 4), range(10), (1, 2, 5, 9), (1, 2, 3)
    )
]


def naive_cache(schedule: Schedule, tokens: int) -> Iterator[list[int]]:
    """Cached stream positions after 0, 1, 2, ... computed tokens, one token at a time."""
    cache: list[int] = []
    yield []
    for position in range(tokens):
        if len(cache) == schedule.capacity:  # full, and one more has to be computed
            del cache[schedule.sink_tokens : schedule.sink_tokens + schedule.stride]
        cache.append(position)
        yield list(cache)


@pytest.mark.parametrize("sinks", range(6))
def test_schedule_is_the_simulation(sinks: int) -> None:
    for schedule in (s for s in SCHEDULES if s.sink_tokens == sinks):
        evicted = 0
        for computed, cache in enumerate(naive_cache(schedule, STREAM)):
            assert schedule.cached_positions(computed) == cache
            assert schedule.cached(computed) == len(cache)
            assert schedule.evicted(computed) == computed - len(cache)
            assert schedule.evictions(computed) * schedule.stride == schedule.evicted(computed)
            assert schedule.evicted(computed) >= evicted
            evicted = schedule.evicted(computed)


@pytest.mark.parametrize("sinks", range(6))
def test_sinks_and_window_are_always_cached(sinks: int) -> None:
    for schedule in (s for s in SCHEDULES if s.sink_tokens == sinks):
        for computed in range(STREAM):
            cached = set(schedule.cached_positions(computed))
            assert cached >= set(range(min(sinks, computed)))
            assert cached >= set(range(max(computed - schedule.window, 0), computed))
            assert len(cached) <= schedule.capacity
            if computed > schedule.capacity:
                assert len(cached) > sinks + schedule.window


def test_no_chunk_after_an_eviction_is_longer_than_the_stride() -> None:
    """Tokens between two evictions, which is what one prefill chunk may compute at most."""
    for schedule in SCHEDULES:
        counts = [schedule.evictions(computed) for computed in range(1, STREAM)]
        lengths = [len(list(group)) for _, group in itertools.groupby(counts)]
        assert lengths[0] == min(schedule.capacity, STREAM - 1)
        assert set(lengths[1:-1]) <= {schedule.stride}


def test_sizes_are_the_smallest_that_hold_the_tokens() -> None:
    assert [cdiv(n, 4) for n in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_eviction_by_pages_moves_no_window_token_to_another_slot(block: int) -> None:
    """A naive page model: pages hold stream positions, an eviction touches whole pages.

    After each eviction the block table must read as the cache does, where only the pages that
    ``EvictionPages`` names have changed.
    """
    for schedule, _ in (case for case in PAGED if case[1] == block):
        pages = EvictionPages.of(schedule, block)
        table: list[list[int]] = []
        for computed, cache in enumerate(naive_cache(schedule, STREAM)):
            if computed and schedule.evictions(computed) > schedule.evictions(computed - 1):
                table = _evict(table, pages, schedule.sink_tokens)
            if computed:
                _append(table, computed - 1, block)
            assert [position for page in table for position in page] == cache
            assert [len(page) for page in table[:-1]] == [block] * (len(table) - 1)


def _append(table: list[list[int]], position: int, block: int) -> None:
    if not table or len(table[-1]) == block:
        table.append([])
    table[-1].append(position)


def _evict(table: list[list[int]], pages: EvictionPages, sink_tokens: int) -> list[list[int]]:
    """Drop whole pages; the border page keeps its slots but for those that become sinks."""
    heads = table[: pages.sink_full]
    kept = table[pages.sink_full + pages.dropped :]
    if pages.border is not None:
        assert kept[0] is table[pages.border]
        sinks = list(range(sink_tokens - pages.border_sinks, sink_tokens))
        kept = [sinks + kept[0][pages.border_sinks :], *kept[1:]]
    return heads + kept


def test_border_page_exists_exactly_when_sinks_end_inside_a_page() -> None:
    for schedule, block in PAGED:
        pages = EvictionPages.of(schedule, block)
        assert pages.sink_full * block + pages.border_sinks == schedule.sink_tokens
        assert pages.dropped * block == schedule.stride
        assert (pages.border is None) is (schedule.sink_tokens % block == 0)


def test_pages_of_a_stream_are_its_table_and_its_pinned_sinks() -> None:
    """The most pages at once: the table of a full cache, and the original sink pages beside it."""
    for schedule, block in PAGED:
        longest = max(len(cache) for cache in naive_cache(schedule, STREAM))
        table = -(-longest // block)
        pinned = len({position // block for position in range(schedule.sink_tokens)})
        assert pages_per_stream(schedule, block) == table + pinned


@pytest.mark.parametrize("spare", [0, 1, 5, 30])
def test_rope_offset_grows_until_positions_would_leave_the_table(spare: int) -> None:
    """``spare`` rows of the RoPE table beyond the capacity; with none, every eviction anchors."""
    for schedule in SCHEDULES:
        rows = schedule.capacity + spare
        anchors = RopeAnchors.of(schedule, rows)
        offset = reanchorings = 0
        for evictions in range(STREAM):
            assert anchors.offset(evictions) == offset
            assert anchors.reanchorings(evictions) == reanchorings
            offset += schedule.stride
            is_over = offset + schedule.capacity > rows
            assert anchors.reanchors(evictions + 1) == is_over
            if is_over:
                assert anchors.span == offset
                offset, reanchorings = 0, reanchorings + 1


def test_models_that_do_not_rotate_keys_never_reanchor() -> None:
    anchors = RopeAnchors.of(SCHEDULES[0], None)

    assert {anchors.offset(evictions) for evictions in range(STREAM)} == {0}
    assert anchors.reanchorings(STREAM) == 0
    assert not any(anchors.reanchors(evictions) for evictions in range(1, STREAM))
