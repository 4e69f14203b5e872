"""Block manager of streams: pins sink pages, recycles window pages (engine core process).

One eviction, sinks not page aligned (``S = 4``, blocks of 16, ``g = 32``)::

    before  [P0: s s s s 4..15][P1: 16..31][P2: 32..47][P3: 48..63] ...
    after   [H0: s s s s 36..47][P3: 48..63] ...           P0 stays pinned as the sink page

H0 is P2 itself when nobody else can see it, else a private copy: a page that is hashed or shared
never changes its content.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from sink_vllm.plan import PageMove
from sink_vllm.schedule import EvictionPages, RopeAnchors, Schedule
from sink_vllm.scheduler.dropped import CopiedPages, DroppedPages
from sink_vllm.scheduler.page_change import ALL_PAGES, PageChange, move_of
from sink_vllm.scheduler.spec import StreamingLLMSpec


class StreamingLLMManager(FullAttentionManager):
    """``FullAttentionManager`` whose requests may drop ``g`` tokens after their sinks.

    Before its first eviction a request is an ordinary one. Afterwards its block table starts with
    private head pages, which are never hashed, and its original sink pages stay pinned, findable
    by other requests. Behind the head pages, entry ``i`` of the table is page ``i + e * g / block``
    of the stream.
    """

    def __init__(self, kv_cache_spec: StreamingLLMSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        # For the largest capacity a stream may have; a smaller one only leaves rows unused.
        self.anchors = RopeAnchors.of(kv_cache_spec.schedule, kv_cache_spec.rope_rows)
        # Admission must see the cost of a whole stream, sink pages included.
        self.max_admission_blocks_per_request = kv_cache_spec.pages_per_stream
        self.sink_pages: dict[str, list[KVCacheBlock]] = {}
        """Pinned pages with the sinks' keys as first computed, per request that has evicted."""
        self.lookup_groups = [self.kv_cache_group_id]
        """KV cache groups that must all have a page for the prefix cache to have it."""
        self.dropped = DroppedPages(self.block_pool)
        self._copied = CopiedPages()

    # -- eviction ---------------------------------------------------------------------------

    def evict(
        self,
        request_id: str,
        schedule: Schedule,
        window_delta: int,
        sink_delta: int,
        reserved: int = 0,
    ) -> PageChange | None:
        """Drop the ``g`` tokens after the sinks of a request whose cache is full.

        Args:
            request_id: a request with exactly ``C`` cached tokens and none in flight.
            schedule: of this request; the same in every call.
            window_delta: rope positions to rotate the window's keys by; 0 leaves them alone,
                anything else is a re-anchoring.
            sink_delta: rope positions between the sinks as first computed and as seen from now on.
            reserved: free pages that must be left for others.

        Returns:
            The page moves, or ``None`` when the pool has too few free pages (nothing changed).
        """
        table = self.req_to_blocks[request_id]
        pages = EvictionPages.of(schedule, self.block_size)
        first = request_id not in self.sink_pages
        sources = self.sink_pages.get(request_id) or table[: pages.sinks]

        # The first sink pages of a fresh stream move from the table to the pinned list; the page
        # with the last sinks is among the dropped ones, so it must not be freed.
        dropped = table[pages.sink_full : pages.sink_full + pages.dropped]
        freed = [block for block in dropped if not (first and block in sources)]
        kept = table[pages.sink_full + pages.dropped :]
        rewritten = kept if window_delta else kept[: 1 if pages.border is not None else 0]

        new_heads = pages.sink_full if first else 0
        spare = self.block_pool.get_num_free_blocks() - reserved
        spare += self._get_num_returned(freed) - new_heads
        shared = [b for b in rewritten if b.ref_cnt > 1]
        if spare < len(shared):
            return None
        # A hashed page of ours alone is copied, to stay useful to others, as long as that leaves
        # a page for the next token; else it gives up its hash.
        copies = {b.block_id for b in shared}
        for block in rewritten:
            if block.block_hash is not None and len(copies) + 1 < spare:
                copies.add(block.block_id)

        self.block_pool.free_blocks(reversed(freed))
        self.dropped.add([*self._copied.dropped(request_id), *reversed(freed)])
        heads = self.block_pool.get_new_blocks(new_heads) if first else table[: pages.sink_full]
        if first:
            self.sink_pages[request_id] = sources
        moves: list[PageMove] = []
        retained: list[KVCacheBlock] = []
        for index, block in enumerate(rewritten):
            target = block
            if block.block_id in copies:
                target = self.block_pool.get_new_blocks(1)[0]
                kept[index] = target
                retained.append(block)
                self._copied.add(request_id, block, index // pages.dropped + 1)
            elif block.block_hash is not None:
                self.block_pool.evict_blocks({block.block_id})
            begin = pages.border_sinks if index == 0 else 0
            if target is not block or window_delta:
                moves.append(move_of(self, block, target, begin, self.block_size, window_delta))
        table[:] = [*heads, *kept]
        if request_id in self.num_cached_block:
            # Head pages count as hashed, so that they never are.
            cached = self.num_cached_block[request_id]
            if cached != ALL_PAGES:
                self.num_cached_block[request_id] = max(cached - pages.dropped, pages.sinks)
        moves += self._sink_moves(schedule, sources, table, sink_delta)
        return PageChange(moves, retained)

    def _sink_moves(
        self,
        schedule: Schedule,
        sources: Sequence[KVCacheBlock],
        table: Sequence[KVCacheBlock],
        delta: int,
    ) -> list[PageMove]:
        """Write the sinks into the head pages, rotated from their pristine keys."""
        sinks, size = schedule.sink_tokens, self.block_size
        return [
            move_of(self, source, target, 0, min(size, sinks - index * size), delta)
            for index, (source, target) in enumerate(zip(sources, table, strict=False))
        ]

    def pages_to_evict(self, request_id: str, schedule: Schedule, window_delta: int) -> int:
        """Free pages that are enough for ``evict``, whatever it gives back."""
        pages = EvictionPages.of(schedule, self.block_size)
        kept = self.req_to_blocks[request_id][pages.sink_full + pages.dropped :]
        rewritten = kept if window_delta else kept[: 1 if pages.border is not None else 0]
        new_heads = 0 if request_id in self.sink_pages else pages.sink_full
        return new_heads + sum(block.ref_cnt > 1 for block in rewritten)

    def pages_to_resume(self, schedule: Schedule, end: int) -> int:
        """Free pages that are enough for ``resume``."""
        pages = EvictionPages.of(schedule, self.block_size)
        first = self._first_window_page(schedule, end)
        return pages.sink_full + (end - first) + pages.dropped

    def held_to_resume(
        self, schedule: Schedule, hashes: Sequence[BlockHash], end: int
    ) -> list[KVCacheBlock]:
        """The cached pages that ``resume`` starts from."""
        sinks = EvictionPages.of(schedule, self.block_size).sinks
        first = self._first_window_page(schedule, end)
        return [*self._all_cached(hashes[:sinks]), *self._all_cached(hashes[first:end])]

    def _get_num_returned(self, blocks: Sequence[KVCacheBlock]) -> int:
        """Pages the pool gains when a request gives up ``blocks``."""
        return sum(block.ref_cnt == 1 for block in blocks)

    # -- resuming from the prefix cache -----------------------------------------------------

    def find_resume(
        self, schedule: Schedule, hashes: Sequence[BlockHash], num_pages: int
    ) -> int | None:
        """The longest boundary a stream with these page hashes can be resumed at.

        Args:
            schedule: of the stream.
            hashes: of the full pages of the stream, from its start.
            num_pages: consider boundaries of at most that many pages.

        Returns:
            Pages before the boundary, all of them past the capacity; ``None`` if the sink pages,
            or every window, have gaps in the cache.
        """
        sinks = EvictionPages.of(schedule, self.block_size).sinks
        if not all(map(self._is_cached, hashes[:sinks])):
            return None
        end = low = num_pages  # pages [low, end) are cached
        while end * self.block_size > schedule.capacity:
            if not self._is_resumable(schedule, end):
                end -= 1
                low = min(low, end)
                continue
            first = self._first_window_page(schedule, end)
            while low > first and self._is_cached(hashes[low - 1]):
                low -= 1
            if low <= first:
                return end
            end = low = low - 1
        return None

    def resume(
        self,
        request_id: str,
        schedule: Schedule,
        hashes: Sequence[BlockHash],
        end: int,
        reserved: int = 0,
    ) -> PageChange | None:
        """Build the block table a stream has after ``end`` pages, from cached pages.

        The result is what streaming up to there leaves behind: pages written before the last
        re-anchoring are copied and rotated now, as they were then.

        Args:
            request_id: a request without pages.
            schedule: of its stream.
            hashes: of the full pages of its stream, from the start.
            end: a boundary ``find_resume`` returned for them.
            reserved: free pages that must be left for others.

        Returns:
            The page moves, or ``None`` when the pool has too few free pages (nothing changed).
        """
        pages = EvictionPages.of(schedule, self.block_size)
        evictions = self.evictions_at(schedule, end)
        first = self._first_window_page(schedule, end)
        sources = self._all_cached(hashes[: pages.sinks])
        window = self._all_cached(hashes[first:end])
        held = [*sources, *window]
        self.block_pool.touch(held)
        deltas = [
            self.age(schedule, page, evictions) * -self.anchors.span for page in range(first, end)
        ]
        copied = [
            bool(delta) or (index == 0 and pages.border is not None)
            for index, delta in enumerate(deltas)
        ]
        # Besides the pages needed now, one stride must fit: the next chunk.
        needed = pages.sink_full + sum(copied) + pages.dropped
        if self.block_pool.get_num_free_blocks() < needed + reserved:
            self.block_pool.free_blocks(reversed(held))
            return None
        new = iter(self.block_pool.get_new_blocks(pages.sink_full + sum(copied)))
        table = [next(new) for _ in range(pages.sink_full)]
        moves: list[PageMove] = []
        retained: list[KVCacheBlock] = []
        for index, block in enumerate(window):
            target = block
            if copied[index]:
                target = next(new)
                retained.append(block)
                self._copied.add(request_id, block, index // pages.dropped + 1)
                begin = pages.border_sinks if index == 0 else 0
                moves.append(move_of(self, block, target, begin, self.block_size, deltas[index]))
            table.append(target)
        self.req_to_blocks[request_id] = table
        self.num_cached_block[request_id] = len(table)
        self.sink_pages[request_id] = sources
        moves += self._sink_moves(schedule, sources, table, self.anchors.offset(evictions))
        return PageChange(moves, retained)

    def _cached(self, block_hash: BlockHash) -> KVCacheBlock | None:
        found = self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id])
        return found[0] if found else None

    def _is_cached(self, block_hash: BlockHash) -> bool:
        return self.block_pool.get_cached_block(block_hash, self.lookup_groups) is not None

    def _all_cached(self, hashes: Sequence[BlockHash]) -> list[KVCacheBlock]:
        blocks = [block for block in map(self._cached, hashes) if block is not None]
        assert len(blocks) == len(hashes), "find_resume has just seen them"
        return blocks

    def _first_window_page(self, schedule: Schedule, end: int) -> int:
        """First page of the stream with a window token when it goes on after ``end`` pages."""
        return schedule.window_start(end * self.block_size + 1) // self.block_size

    def evictions_at(self, schedule: Schedule, end: int) -> int:
        """Evictions of a stream that is about to compute the token after ``end`` pages.

        One more than after those pages if that token finds the cache full.
        """
        return schedule.evictions(end * self.block_size + 1)

    def _is_resumable(self, schedule: Schedule, end: int) -> bool:
        """Whether no key of the window has been rotated back more than once after ``end`` pages.

        Rotating it by the sum at once would be the same rotation, but not the same rounding.
        """
        first = self._first_window_page(schedule, end)
        return self.age(schedule, first, self.evictions_at(schedule, end)) <= 1

    def age(self, schedule: Schedule, page: int, evictions: int) -> int:
        """Re-anchorings between the completion of a page of the stream and ``evictions``."""
        written = schedule.evictions((page + 1) * self.block_size)
        return self.anchors.reanchorings(evictions) - self.anchors.reanchorings(written)

    # -- what vLLM calls --------------------------------------------------------------------

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        self.num_cached_block[request_id] = ALL_PAGES

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The pages of a request that ends or is preempted: sink pages first, then the table."""
        self._copied.forget(request_id)
        return [*self.sink_pages.pop(request_id, ()), *super().pop_blocks_for_free(request_id)]
