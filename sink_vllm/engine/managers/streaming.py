"""Block manager of streams: what ``evicting`` does, and resuming them from cached pages.

The names of pages are those of ``evicting``. A stream is resumed from its sink pages and the window
before a boundary, a number of pages from its start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from sink_vllm.engine.managers.evicting import EvictingManager
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import EvictionPages, Schedule


@dataclass(frozen=True, slots=True)
class Resumption:
    """The cached pages of one group that a stream is resumed from."""

    sinks: list[KVCacheBlock]
    window: list[KVCacheBlock]
    rotated: list[int]
    """Rope positions each window page has been rotated by since it was written."""

    @property
    def blocks(self) -> list[KVCacheBlock]:
        return [*self.sinks, *self.window]


class StreamingLLMManager(EvictingManager):
    """The block manager of layers that see everything in the cache."""

    def is_known(self, block_hash: BlockHash) -> bool:
        """Whether the prefix cache has a page of every table that is looked up with this one."""
        return self.block_pool.get_cached_block(block_hash, self.lookup_groups) is not None

    def is_cached(self, block_hash: BlockHash) -> bool:
        """The same, of pages that moves of this step may read."""
        return self.ledger.is_movable(block_hash, self.lookup_groups)

    def found(self, schedule: Schedule, hashes: Sequence[BlockHash], end: int) -> Resumption:
        """The cached pages that a stream is resumed from at a boundary ``find_resume`` gave."""
        sinks = EvictionPages.of(schedule, self.block_size).sinks
        first, evictions = self.first_page(schedule, end), self.evictions_at(schedule, end)
        return Resumption(
            self.ledger.cached(self.kv_cache_group_id, hashes[:sinks]),
            self.ledger.cached(self.kv_cache_group_id, hashes[first:end]),
            [
                self.age(schedule, page, evictions) * -self.anchors.span
                for page in range(first, end)
            ],
        )

    def resume(
        self, request_id: str, schedule: Schedule, found: Resumption, end: int, reserved: int
    ) -> list[PageMove]:
        """Build the block table a stream has after ``end`` pages, from cached pages.

        The result is what streaming up to there leaves behind: pages written before the last
        re-anchoring are rotated now, as they were then.

        Args:
            request_id: a request without pages.
            schedule: of its stream.
            found: its cached pages; the references held for the caller are taken over.
            end: pages before the boundary.
            reserved: free pages that must be left for others.
        """
        group, size = self.kv_cache_group_id, self.block_size
        pages = EvictionPages.of(schedule, size)
        self.ledger.pin(group, request_id, found.sinks)
        table = self.block_pool.get_new_blocks(pages.sink_full)
        self.req_to_blocks[request_id] = table
        moves: list[PageMove] = []
        changed = [
            bool(delta) or index < pages.num_border for index, delta in enumerate(found.rotated)
        ]
        mandatory = reserved + sum(
            self.ledger.is_shared(block)
            for block, change in zip(found.window, changed, strict=True)
            if change
        )
        for index, (block, delta) in enumerate(zip(found.window, found.rotated, strict=True)):
            target = block
            if changed[index]:
                mandatory -= self.ledger.is_shared(block)
                target = self.ledger.rewritten(block, mandatory)
                if target is not block:
                    self._copied.add(request_id, block, index // pages.dropped + 1)
                if target is not block or delta:
                    begin = pages.border_sinks if index == 0 else 0
                    moves.append(
                        PageMove(block.block_id, target.block_id, begin, size, delta, group)
                    )
            table.append(target)
        self.num_cached_block[request_id] = len(table)
        evictions = self.evictions_at(schedule, end)
        return moves + self._sink_moves(request_id, schedule, self.anchors.offset(evictions))

    def pages_to_resume(self, schedule: Schedule, found: Resumption) -> int:
        """Free pages a resumption takes beside the cached ones: head pages, and copies of pages
        that somebody else owns."""
        pages = EvictionPages.of(schedule, self.block_size)
        return pages.sink_full + sum(
            self.ledger.num_owners(block) > 0 and (bool(delta) or index < pages.num_border)
            for index, (block, delta) in enumerate(zip(found.window, found.rotated, strict=True))
        )

    def first_page(self, schedule: Schedule, end: int) -> int:
        """First page of the stream with a window token when it goes on after ``end`` pages."""
        return schedule.window_start(end * self.block_size + 1) // self.block_size

    def evictions_at(self, schedule: Schedule, end: int) -> int:
        """Evictions of a stream that is about to compute the token after ``end`` pages.

        One more than after those pages if that token finds the cache full.
        """
        return schedule.evictions(end * self.block_size + 1)

    def is_resumable(self, schedule: Schedule, end: int) -> bool:
        """Whether no key of the window has been rotated back more than once after ``end`` pages.

        Rotating it by the sum at once would be the same rotation, but not the same rounding.
        """
        first = self.first_page(schedule, end)
        return self.age(schedule, first, self.evictions_at(schedule, end)) <= 1

    def age(self, schedule: Schedule, page: int, evictions: int) -> int:
        """Re-anchorings between the completion of a page of the stream and ``evictions``."""
        written = schedule.evictions((page + 1) * self.block_size)
        return self.anchors.reanchorings(evictions) - self.anchors.reanchorings(written)
