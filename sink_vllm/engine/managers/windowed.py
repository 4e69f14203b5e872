"""Block manager of layers with a sliding window and page tables of their own (engine core).

Entry ``i`` of such a table is the page of the same tokens as entry ``i`` of the other tables of
the request; entries before the native window are vLLM's null block. The native window never
reaches the sinks (``w <= W + 1``), so an eviction drops null entries, and no key has to move.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.request import Request

from sink_vllm.engine.hashing import ALL_PAGES
from sink_vllm.engine.ledger import PageLedger
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import Schedule, cdiv


class StreamingLLMWindowManager(SlidingWindowManager):
    """``SlidingWindowManager`` whose requests may drop ``g`` tokens before their window."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.bind(PageLedger(self.block_pool))

    def bind(self, ledger: PageLedger) -> None:
        """Account for pages in ``ledger``, which all groups of an engine core share."""
        self.ledger = ledger
        ledger.add_group(self.kv_cache_group_id, self.req_to_blocks)

    # -- eviction ---------------------------------------------------------------------------

    def drop(self, request_id: str, schedule: Schedule) -> None:
        """First half of an eviction: ``g`` tokens before the window leave the block table.

        Args:
            request_id: a request with exactly ``C`` cached tokens, none in flight, and no pages
                before its window.
            schedule: of this request; the same in every call.
        """
        table = self.req_to_blocks[request_id]
        dropped = schedule.stride // self.block_size
        assert all(block.is_null for block in table[:dropped]), "the window reaches the sinks"
        del table[:dropped]
        cached = self.num_cached_block.get(request_id)
        if cached is not None and cached != ALL_PAGES:
            self.num_cached_block[request_id] = max(cached - dropped, 0)

    def compose(self, request_id: str, window_delta: int, reserved: int) -> list[PageMove]:
        """Second half of an eviction: a re-anchoring rotates the keys of the window.

        Args:
            request_id: a request whose tokens have just been dropped.
            window_delta: rope positions to rotate keys by; 0 leaves them alone.
            reserved: free pages that must be left for the other tables of this stream.
        """
        if not window_delta:
            return []
        table = self.req_to_blocks[request_id]
        mandatory = reserved + self.pages_to_evict(request_id, window_delta)
        moves: list[PageMove] = []
        for index, block in enumerate(table):
            if not block.is_null:
                mandatory -= self.ledger.is_shared(block)
                table[index] = self._rotated(block, window_delta, mandatory, moves)
        return moves

    def pages_to_evict(self, request_id: str, window_delta: int) -> int:
        """Free pages that an eviction takes."""
        if not window_delta:
            return 0
        table = self.req_to_blocks[request_id]
        return sum(not block.is_null and self.ledger.is_shared(block) for block in table)

    def _rotated(
        self, block: KVCacheBlock, delta: int, reserved: int, moves: list[PageMove]
    ) -> KVCacheBlock:
        """The page with the keys of ``block`` rotated by ``delta``: itself, or a copy."""
        target = self.ledger.rewritten(block, reserved)
        group, size = self.kv_cache_group_id, self.block_size
        moves.append(PageMove(block.block_id, target.block_id, 0, size, delta, group))
        return target

    @property
    def pages_per_stream(self) -> int:
        """Pages a stream holds at most while it generates: its window can begin anywhere."""
        return cdiv(self.sliding_window - 1, self.block_size) + 1

    def pages_after(self, processed: int, tokens: int) -> int:
        """Pages of a table that holds ``tokens`` cached tokens, ``processed`` before this step."""
        skipped = self.get_num_skipped_tokens(processed) // self.block_size
        return cdiv(tokens, self.block_size) - skipped

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash every page, and not only those before a prompt's end, as vLLM does by default.

        A stream is resumed at the longest boundary that is cached, wherever that is.
        """
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, None, replay_boundaries=replay_boundaries)
        self.ledger.note_fresh(self, request.request_id, before)

    # -- resuming from the prefix cache -----------------------------------------------------

    def is_cached(self, block_hash: BlockHash) -> bool:
        """Whether the prefix cache has a page of this table."""
        return self.ledger.is_movable(block_hash, [self.kv_cache_group_id])

    def found(self, hashes: Sequence[BlockHash], end: int) -> list[KVCacheBlock]:
        """The cached pages that a stream is resumed from at a boundary ``find_resume`` gave."""
        return self.ledger.cached(self.kv_cache_group_id, hashes[self.first_page(end) : end])

    def pages_to_resume(self, found: Sequence[KVCacheBlock], deltas: Sequence[int]) -> int:
        """Free pages a resumption takes beside the cached ones: copies of pages that are rotated
        and that somebody else owns."""
        return sum(
            bool(delta) and self.ledger.num_owners(block) > 0
            for block, delta in zip(found, deltas, strict=True)
        )

    def resume(
        self,
        request_id: str,
        found: Sequence[KVCacheBlock],
        end: int,
        evicted: int,
        deltas: Sequence[int],
        reserved: int,
    ) -> list[PageMove]:
        """Build the table a stream has after ``end`` pages, from cached pages.

        Args:
            request_id: a request without pages.
            found: its cached pages; the references held for the caller are taken over.
            end: pages before the boundary.
            evicted: pages of the stream that have been evicted.
            deltas: rope positions by which each page has been rotated since it was written.
            reserved: free pages that must be left for others.
        """
        first = self.first_page(end)
        table = [self._null_block] * (first - evicted)
        mandatory = reserved + sum(
            bool(delta) and self.ledger.is_shared(block)
            for block, delta in zip(found, deltas, strict=True)
        )
        moves: list[PageMove] = []
        for block, delta in zip(found, deltas, strict=True):
            if delta:
                mandatory -= self.ledger.is_shared(block)
                table.append(self._rotated(block, delta, mandatory, moves))
            else:
                table.append(block)
        self.req_to_blocks[request_id] = table
        self.num_cached_block[request_id] = len(table)
        return moves

    def first_page(self, end: int) -> int:
        """First page of the stream that the token after ``end`` pages sees."""
        return self.get_num_skipped_tokens(end * self.block_size) // self.block_size

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        self.num_cached_block[request_id] = ALL_PAGES
