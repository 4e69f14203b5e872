"""Block manager of layers with a sliding window and page tables of their own (engine core).

Entry ``i`` of such a table is the page of the same tokens as entry ``i`` of the other tables of
the request; entries before the native window are vLLM's null block. The native window never
reaches the sinks (``w <= W + 1``), so an eviction drops null entries, and no key has to move.
"""

from collections.abc import Callable, Sequence

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.request import Request

from sink_vllm.schedule import Schedule, cdiv
from sink_vllm.scheduler.page_change import ALL_PAGES, PageChange, move_of


class StreamingLLMWindowManager(SlidingWindowManager):
    """``SlidingWindowManager`` whose requests may drop ``g`` tokens before their window."""

    def evict(
        self, request_id: str, schedule: Schedule, window_delta: int, reserved: int
    ) -> PageChange:
        """Drop ``g`` tokens of a request whose cache is full.

        Args:
            request_id: a request with exactly ``C`` cached tokens and none in flight.
            schedule: of this request; the same in every call.
            window_delta: rope positions to rotate keys by; 0 leaves them alone, anything else is
                a re-anchoring, which needs ``pages_to_evict`` free pages.
            reserved: free pages that must be left for others.

        Returns:
            The page moves.
        """
        self.remove_skipped_blocks(request_id, schedule.capacity)
        table = self.req_to_blocks[request_id]
        dropped = schedule.stride // self.block_size
        assert all(block.is_null for block in table[:dropped]), "the window reaches the sinks"
        del table[:dropped]
        cached = self.num_cached_block.get(request_id)
        if cached is not None and cached != ALL_PAGES:
            self.num_cached_block[request_id] = max(cached - dropped, 0)
        change = PageChange([], [])
        if window_delta:
            # A hashed page of ours alone is copied while pages last, to stay useful to others.
            spare = self.block_pool.get_num_free_blocks() - reserved
            spare -= self.pages_to_evict(request_id, window_delta)
            for index, block in enumerate(table):
                if block.is_null:
                    continue
                hashed = block.block_hash is not None and block.ref_cnt == 1
                if hashed and spare <= 0:
                    self.block_pool.evict_blocks({block.block_id})
                copied = block.ref_cnt > 1 or (hashed and spare > 0)
                spare -= hashed
                table[index] = self._rotated(block, window_delta, copied, change)
        return change

    def pages_to_evict(self, request_id: str, window_delta: int) -> int:
        """Free pages that are enough for ``evict``."""
        if not window_delta:
            return 0
        return sum(block.ref_cnt > 1 for block in self.req_to_blocks[request_id])

    def _rotated(
        self, block: KVCacheBlock, delta: int, copied: bool, change: PageChange
    ) -> KVCacheBlock:
        """The page with the keys of ``block`` rotated by ``delta``: itself, or a copy."""
        target = block
        if copied:
            target = self.block_pool.get_new_blocks(1)[0]
            change.retained.append(block)
        change.moves.append(move_of(self, block, target, 0, self.block_size, delta))
        return target

    @property
    def pages_per_stream(self) -> int:
        """Pages a stream holds at most while it generates: its window can begin anywhere."""
        return cdiv(self.sliding_window - 1, self.block_size) + 1

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
        super().cache_blocks(request, num_tokens, None, replay_boundaries=replay_boundaries)

    # -- resuming from the prefix cache -----------------------------------------------------

    def first_missing(self, hashes: Sequence[BlockHash], end: int) -> int | None:
        """Last page of the native window before boundary ``end`` that is not cached, if any."""
        for page in reversed(range(self._first_page(end), end)):
            if self._cached(hashes[page]) is None:
                return page
        return None

    def held_to_resume(self, hashes: Sequence[BlockHash], end: int) -> list[KVCacheBlock]:
        """The cached pages that ``resume`` starts from."""
        blocks = [self._cached(block_hash) for block_hash in hashes[self._first_page(end) : end]]
        assert None not in blocks, "first_missing has just seen them"
        return [block for block in blocks if block is not None]

    def resume(
        self,
        request_id: str,
        held: Sequence[KVCacheBlock],
        end: int,
        evicted: int,
        delta_of: Callable[[int], int],
    ) -> PageChange:
        """Build the table a stream has after ``end`` pages, from cached pages.

        Args:
            request_id: a request without pages.
            held: what ``held_to_resume`` returned; this takes references of its own.
            end: pages before the boundary.
            evicted: pages of the stream that have been evicted.
            delta_of: rope positions by which a page of the stream has been rotated since.

        Returns:
            The page moves; as many free pages as ``held`` has are enough.
        """
        first = self._first_page(end)
        self.block_pool.touch(held)
        table = [self._null_block] * (first - evicted)
        change = PageChange([], [])
        for page, block in enumerate(held, start=first):
            delta = delta_of(page)
            table.append(self._rotated(block, delta, True, change) if delta else block)
        self.req_to_blocks[request_id] = table
        self.num_cached_block[request_id] = len(table)
        return change

    def _first_page(self, end: int) -> int:
        """First page of the stream that the token after ``end`` pages sees."""
        return self.get_num_skipped_tokens(end * self.block_size) // self.block_size

    def _cached(self, block_hash: BlockHash) -> KVCacheBlock | None:
        found = self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id])
        return found[0] if found else None

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        self.num_cached_block[request_id] = ALL_PAGES
