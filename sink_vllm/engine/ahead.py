"""Pages that are composed before the eviction that puts them into a table (engine core process).

What an eviction makes of the sinks is known long before: its rotation is a function of how many
evictions there were, and the page that follows the sinks then is complete. So it is composed
before, for a few streams at once, in a page of the pool that nobody needs, and the eviction itself
only exchanges an entry of the table. Before an eviction that re-anchors, so are all pages that are
complete::

    table    [P0: s s s s 4..15][P1: 16..31][P2: 32..47][P3 ......
    ahead                                   [H0: s s s s 36..47]      composed from P0 and P2
    evicted  [H0: s s s s 36..47][P3 ......                           P0 is pinned, P1, P2 dropped

A page composed ahead is on loan: it counts as free in admission, and goes back to the pool, its
work lost, as soon as the pages are needed. Then the eviction does what it would have done.
"""

from collections.abc import Iterator

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from sink_vllm.policy.schedule import EvictionPages, Schedule, cdiv

Place = tuple[int, int]
"""KV cache group, and entry of the table as it is before the eviction."""


class ComposedAhead:
    """The pages of all streams that wait for their eviction."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pages: dict[str, dict[Place, KVCacheBlock]] = {}
        self._num_pages = 0
        self.done: set[str] = set()
        """Requests of which nothing is left to compose until they evict."""

    def __len__(self) -> int:
        """Pages on loan."""
        return self._num_pages

    @property
    def streams(self) -> list[str]:
        """Requests that have such pages."""
        return list(self._pages)

    @property
    def pages(self) -> list[KVCacheBlock]:
        """All of them."""
        return [block for places in self._pages.values() for block in places.values()]

    def __contains__(self, request_id: str) -> bool:
        """Whether a request has such pages."""
        return request_id in self._pages

    def has(self, request_id: str, place: Place) -> bool:
        """Whether what the next eviction puts there has been composed."""
        return place in self._pages.get(request_id, ())

    def take(self, request_id: str, place: Place) -> KVCacheBlock:
        """A free page for what the next eviction of a request puts there."""
        (block,) = self._pool.get_new_blocks(1)
        self._pages.setdefault(request_id, {})[place] = block
        self._num_pages += 1
        return block

    def use(self, request_id: str, place: Place) -> KVCacheBlock | None:
        """The request evicts: the composed page, with the reference; ``None`` if there is none."""
        places = self._pages.get(request_id)
        block = places.pop(place, None) if places else None
        if block is not None:
            self._num_pages -= 1
            if not places:
                del self._pages[request_id]
                self.done.discard(request_id)
        return block

    def give_back(self, request_id: str) -> None:
        """The pages of a request go back to the pool."""
        places = self._pages.pop(request_id, {})
        self._num_pages -= len(places)
        self._pool.free_blocks(places.values())
        self.done.discard(request_id)


def composable_at(schedule: Schedule, block_size: int) -> int:
    """Cached tokens from which on the next head page may be composed; the capacity for never.

    Not before the last stride below the capacity: most requests end before they evict. Only of
    streams with one page of sinks, which borrow a page per group between two evictions.
    """
    pages = EvictionPages.of(schedule, block_size)
    if pages.sinks != 1:
        return schedule.capacity
    complete = (pages.sink_full + pages.dropped + pages.num_border) * block_size
    return min(max(complete, schedule.capacity - schedule.stride + 1), schedule.capacity)


def places_ahead(
    schedule: Schedule, block_size: int, computed: int, *, reanchors: bool
) -> Iterator[int]:
    """Entries of a table whose next content can be composed, with so many cached tokens.

    Args:
        schedule: of a stream with one page of sinks.
        block_size: tokens of a page.
        computed: at least ``composable_at``.
        reanchors: the next eviction rotates all of the window.
    """
    pages = EvictionPages.of(schedule, block_size)
    yield 0 if pages.border is None else pages.border
    if reanchors:
        first = pages.sink_full + pages.dropped + pages.num_border
        yield from range(first, computed // block_size)


_BATCHES = 8
"""Heads of an eighth of the streams at once: the work of a step grows with the streams as the step
does, and what a batch costs whatever is in it is paid eight times per stride."""


def steps_between_batches(schedule: Schedule) -> int:
    """Steps after which heads are composed again, so that two thirds of a stride have all."""
    return max(2 * schedule.stride // (3 * _BATCHES), 1)


def heads_per_batch(running: int, groups: int) -> int:
    """How many heads to compose at once for ``running`` streams with so many tables."""
    return max(cdiv(running * groups, _BATCHES), 1)


def pages_per_step(rotating: int, pages: int, schedule: Schedule) -> int:
    """How many pages of a window to compose in every step, so that two thirds of a stride have
    those of ``rotating`` streams with ``pages`` each."""
    return max(cdiv(3 * rotating * pages, 2 * schedule.stride), 1)
