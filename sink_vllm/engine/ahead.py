"""Head pages that are composed before the eviction that puts them into a table (engine core).

What an eviction makes of the sinks is known long before: its rotation is a function of how many
evictions there were, and the page that follows the sinks then is complete. So the page is composed
a few streams per step, into a page of the pool that nobody needs, and the eviction itself only
exchanges an entry of the table::

    table    [P0: s s s s 4..15][P1: 16..31][P2: 32..47][P3 ......
    ahead                                   [H0: s s s s 36..47]      composed from P0 and P2
    evicted  [H0: s s s s 36..47][P3 ......                           P0 is pinned, P1, P2 dropped

A page composed ahead is on loan: it counts as free in admission, and goes back to the pool, its
work lost, as soon as the pages are needed. Then the eviction composes its head page itself.
"""

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from sink_vllm.policy.schedule import EvictionPages, Schedule, cdiv


class ComposedAhead:
    """The pages of all streams that wait for their eviction."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pages: dict[str, dict[int, KVCacheBlock]] = {}
        self._num_pages = 0

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
        return [block for groups in self._pages.values() for block in groups.values()]

    def take(self, group: int, request_id: str) -> KVCacheBlock:
        """A free page for the next head page of a request in a KV cache group."""
        (block,) = self._pool.get_new_blocks(1)
        self._pages.setdefault(request_id, {})[group] = block
        self._num_pages += 1
        return block

    def has(self, request_id: str) -> bool:
        """Whether the next head pages of a request have been composed."""
        return request_id in self._pages

    def use(self, group: int, request_id: str) -> KVCacheBlock | None:
        """The request evicts: its composed page, with the reference; ``None`` if there is none."""
        groups = self._pages.get(request_id)
        block = groups.pop(group, None) if groups else None
        if block is not None:
            self._num_pages -= 1
            if not groups:
                del self._pages[request_id]
        return block

    def give_back(self, request_id: str) -> None:
        """The pages of a request go back to the pool."""
        groups = self._pages.pop(request_id, {})
        self._num_pages -= len(groups)
        self._pool.free_blocks(groups.values())


def composable_at(schedule: Schedule, block_size: int) -> int:
    """Cached tokens from which on the next head page may be composed; the capacity for never.

    Not before the last stride below the capacity: most requests end before they evict. Only of
    streams with one page of sinks, so that nobody borrows more than a page per group.
    """
    pages = EvictionPages.of(schedule, block_size)
    if pages.sinks != 1:
        return schedule.capacity
    complete = (pages.sink_full + pages.dropped + pages.num_border) * block_size
    return min(max(complete, schedule.capacity - schedule.stride + 1), schedule.capacity)


def streams_per_step(running: int, schedule: Schedule) -> int:
    """How many streams compose in a step, so that all ``running`` have in half a stride."""
    return max(cdiv(2 * running, schedule.stride), 1)
