"""Block manager of streams: pins sink pages, recycles window pages (engine core process).

One eviction, sinks not page aligned (``S = 4``, blocks of 16, ``g = 32``)::

    before  [P0: s s s s 4..15][P1: 16..31][P2: 32..47][P3: 48..63] ...
    after   [H0: s s s s 36..47][P3: 48..63] ...           P0 stays pinned as the sink page

H0 is P2 itself when nobody else can see it, else a private copy: a page that is hashed or shared
never changes its content. What an eviction and a resumption mean for one page table, with every
name used below (``k = g / block``, ``e`` evictions)::

    table before  [0 .. sink_full) [sink_full .. sink_full + k) [sink_full + k ............)
                   head pages       dropped                      kept, the border page first
    table after   [0 .. sink_full)                              [sink_full .................)
    stream pages   sinks only       evicted                     [first .................. end)
    pinned        [0 .. sinks)      the pages with the sinks as first computed

    sinks = ceil(S / block), sink_full = S // block, first = (S + e * g) // block
"""

from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from sink_vllm.compat.spec import StreamingLLMSpec
from sink_vllm.engine.dropped import CopiedPages
from sink_vllm.engine.hashing import ALL_PAGES
from sink_vllm.engine.ledger import PageLedger
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import EvictionPages, RopeAnchors, Schedule


class EvictingManager(FullAttentionManager):
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
        self.lookup_groups = [self.kv_cache_group_id]
        """KV cache groups that must all have a page for the prefix cache to have it."""
        self.bind(PageLedger(self.block_pool))

    def bind(self, ledger: PageLedger) -> None:
        """Account for pages in ``ledger``, which all groups of an engine core share."""
        self.ledger = ledger
        ledger.add_group(self.kv_cache_group_id, self.req_to_blocks)

    # -- eviction ---------------------------------------------------------------------------

    def pages_to_evict(self, request_id: str, schedule: Schedule, window_delta: int) -> int:
        """Free pages that an eviction takes, before it gives any back."""
        pages = EvictionPages.of(schedule, self.block_size)
        table, begin = self.req_to_blocks[request_id], pages.sink_full + pages.dropped
        end = len(table) if window_delta else begin + pages.num_border
        new_heads = pages.sink_full if self._is_first(request_id) else 0
        if new_heads and self._is_ahead(request_id, 0):
            new_heads -= 1
        return new_heads + sum(
            self.ledger.is_shared(table[index]) and not self._is_ahead(request_id, index)
            for index in range(begin, end)
        )

    def pages_given_back(self, request_id: str, schedule: Schedule) -> int:
        """Free pages that an eviction gives back to the pool, before it takes any."""
        return sum(block.ref_cnt == 1 for block in self._dropped(request_id, schedule))

    def drop(self, request_id: str, schedule: Schedule) -> None:
        """First half of an eviction: the ``g`` tokens after the sinks leave the block table.

        Args:
            request_id: a request with exactly ``C`` cached tokens and none in flight.
            schedule: of this request; the same in every call.
        """
        table, ledger = self.req_to_blocks[request_id], self.ledger
        pages = EvictionPages.of(schedule, self.block_size)
        freed = self._dropped(request_id, schedule)
        if self._is_first(request_id):
            # The first pages move from the table to the pinned ones, the page with the last sinks
            # among them; compose() replaces those that stay in the table.
            ledger.pin(self.kv_cache_group_id, request_id, table[: pages.sinks])
            table[: pages.sink_full] = [self._null_block] * pages.sink_full
        self.block_pool.free_blocks(reversed(freed))
        ledger.dropped.add([*self._copied.dropped(request_id), *reversed(freed)])
        del table[pages.sink_full : pages.sink_full + pages.dropped]
        if request_id in self.num_cached_block:
            # Head pages count as hashed, so that they never are.
            cached = self.num_cached_block[request_id]
            if cached != ALL_PAGES:
                self.num_cached_block[request_id] = max(cached - pages.dropped, pages.sinks)

    def compose(
        self,
        request_id: str,
        schedule: Schedule,
        window_delta: int,
        sink_delta: int,
        reserved: int,
    ) -> list[PageMove]:
        """Second half of an eviction: pages that change become the stream's own.

        Args:
            request_id: a request whose tokens have just been dropped.
            schedule: of this request.
            window_delta: rope positions to rotate the window's keys by; 0 leaves them alone,
                anything else is a re-anchoring.
            sink_delta: rope positions between the sinks as first computed and as seen from now on.
            reserved: free pages that must be left for the other tables of this stream.
        """
        group, size, table = self.kv_cache_group_id, self.block_size, self.req_to_blocks[request_id]
        pages = EvictionPages.of(schedule, size)
        begin = pages.sink_full
        end = len(table) if window_delta else begin + pages.num_border
        has_head, changed = self._put_ahead(request_id, pages, range(begin, end))
        for index in range(pages.sink_full):
            if table[index].is_null:  # the first eviction
                (table[index],) = self.block_pool.get_new_blocks(1)
        moves: list[PageMove] = []
        mandatory = sum(self.ledger.is_shared(table[index]) for index in changed) + reserved
        for index in changed:
            block = table[index]
            mandatory -= self.ledger.is_shared(block)
            target = self.ledger.rewritten(block, mandatory)
            if target is not block:
                table[index] = target
                self._copied.add(request_id, block, (index - begin) // pages.dropped + 1)
            if target is not block or window_delta:
                first = pages.border_sinks if index == begin else 0
                moves.append(
                    PageMove(block.block_id, target.block_id, first, size, window_delta, group)
                )
        return moves if has_head else moves + self._sink_moves(request_id, schedule, sink_delta)

    def compose_ahead(
        self, request_id: str, schedule: Schedule, index: int, window_delta: int, sink_delta: int
    ) -> list[PageMove]:
        """Compose what the next eviction puts into the table, in a free page.

        Args:
            request_id: a request with one page of sinks.
            schedule: of this request.
            index: entry of the table as it is now, one of ``places_ahead``.
            window_delta: of the next eviction, as ``compose`` will get it,
            sink_delta: and this.
        """
        group, size, table = self.kv_cache_group_id, self.block_size, self.req_to_blocks[request_id]
        pages = EvictionPages.of(schedule, size)
        target = self.ledger.ahead.take(request_id, (group, index)).block_id
        is_head = index == (0 if pages.border is None else pages.border)
        first = min(size, schedule.sink_tokens) if is_head else 0
        moves: list[PageMove] = []
        if is_head:
            (sinks,) = self.ledger.pinned(group, request_id) or table[:1]
            moves.append(PageMove(sinks.block_id, target, 0, first, sink_delta, group))
        if first < size:
            moves.append(PageMove(table[index].block_id, target, first, size, window_delta, group))
        return moves

    def _put_ahead(
        self, request_id: str, pages: EvictionPages, window: range
    ) -> tuple[bool, list[int]]:
        """Put pages that were composed ahead into the table, from which tokens have been dropped.

        Returns:
            Whether the head page is among them, and the entries of ``window`` that are not.
        """
        group, ahead = self.kv_cache_group_id, self.ledger.ahead
        table = self.req_to_blocks[request_id]
        left: list[int] = []
        has_head = False
        if pages.border is None and (head := ahead.use(request_id, (group, 0))):
            table[0], before = head, table[0]
            has_head = True
            if not before.is_null:
                self.ledger.retain(before)
        for index in window:
            composed = ahead.use(request_id, (group, index + pages.dropped))
            if composed is None:
                left.append(index)
                continue
            block, table[index] = table[index], composed
            has_head |= index == pages.sink_full and pages.border is not None
            evictions = (index - pages.sink_full) // pages.dropped + 1
            self._copied.add(request_id, block, evictions)
            self.ledger.exchange(block)
        return has_head, left

    def _is_ahead(self, request_id: str, index: int) -> bool:
        return self.ledger.ahead.has(request_id, (self.kv_cache_group_id, index))

    def _is_first(self, request_id: str) -> bool:
        """Whether the request has not evicted yet."""
        return self.ledger.pinned(self.kv_cache_group_id, request_id) is None

    def _dropped(self, request_id: str, schedule: Schedule) -> list[KVCacheBlock]:
        """The pages the next eviction frees: on the first, the page with the last sinks stays."""
        pages = EvictionPages.of(schedule, self.block_size)
        begin = pages.sinks if self._is_first(request_id) else pages.sink_full
        return self.req_to_blocks[request_id][begin : pages.sink_full + pages.dropped]

    def _sink_moves(self, request_id: str, schedule: Schedule, delta: int) -> list[PageMove]:
        """Write the sinks into the head pages, rotated from their pristine keys."""
        sinks, size, group = schedule.sink_tokens, self.block_size, self.kv_cache_group_id
        sources = self.ledger.pinned(group, request_id) or ()
        table = self.req_to_blocks[request_id]
        return [
            PageMove(src.block_id, dst.block_id, 0, min(size, sinks - index * size), delta, group)
            for index, (src, dst) in enumerate(zip(sources, table, strict=False))
        ]

    @property
    def _copied(self) -> CopiedPages:
        return self.ledger.copied[self.kv_cache_group_id]

    # -- what vLLM calls --------------------------------------------------------------------

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        self.ledger.note_fresh(self, request.request_id, before)

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        self.num_cached_block[request_id] = ALL_PAGES

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The pages of a request that ends or is preempted: sink pages first, then the table."""
        self._copied.forget(request_id)
        self.ledger.ahead.give_back(request_id)
        sinks = self.ledger.unpin(self.kv_cache_group_id, request_id)
        return [*sinks, *super().pop_blocks_for_free(request_id)]
