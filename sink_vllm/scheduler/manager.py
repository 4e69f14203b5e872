"""Block manager of streams: pins sink pages, recycles window pages (engine core process).

One eviction, sinks not page aligned (``S = 4``, blocks of 16, ``g = 32``)::

    before  [P0: s s s s 4..15][P1: 16..31][P2: 32..47][P3: 48..63] ...
    after   [H0: s s s s 36..47][P3: 48..63] ...           P0 stays pinned as the sink page

H0 is P2 itself when nobody else can see it, else a private copy: a page that is hashed or shared
never changes its content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from sink_vllm.plan import PageMove
from sink_vllm.schedule import EvictionPages, cdiv
from sink_vllm.scheduler.spec import StreamingLLMSpec


@dataclass(frozen=True, slots=True)
class Eviction:
    """What one eviction asks of the workers, and what must outlive the step."""

    moves: list[PageMove]
    retained: list[KVCacheBlock]
    """Sources of moves that left the block table; free them once the step is scheduled."""


class StreamingLLMManager(FullAttentionManager):
    """``FullAttentionManager`` whose requests may drop ``g`` tokens after their sinks.

    Before its first eviction a request is an ordinary one. Afterwards its block table starts with
    private head pages, its original sink pages stay pinned (and findable by other requests), and
    nothing of it is hashed any more: later pages depend on more than the tokens before them.
    """

    def __init__(self, kv_cache_spec: StreamingLLMSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.pages = EvictionPages.of(kv_cache_spec.schedule, self.block_size)
        self.num_sink_pages = cdiv(kv_cache_spec.sink_tokens, self.block_size)
        # Admission must see the cost of a whole stream, sink pages included.
        self.max_admission_blocks_per_request = kv_cache_spec.pages_per_stream
        self.sink_pages: dict[str, list[KVCacheBlock]] = {}
        """Pinned pages with the sinks' keys as first computed, per request that has evicted."""

    # -- eviction ---------------------------------------------------------------------------

    def evict(self, request_id: str, window_delta: int, sink_delta: int) -> Eviction | None:
        """Drop the ``g`` tokens after the sinks of a request whose cache is full.

        Args:
            request_id: a request with exactly ``C`` cached tokens and none in flight.
            window_delta: rope positions to rotate the window's keys by; 0 leaves them alone,
                anything else is a re-anchoring.
            sink_delta: rope positions between the sinks as first computed and as seen from now on.

        Returns:
            The page moves, or ``None`` when the pool has too few free pages (nothing changed).
        """
        table = self.req_to_blocks[request_id]
        pages = self.pages
        first = request_id not in self.sink_pages
        sources = self.sink_pages.get(request_id) or table[: self.num_sink_pages]

        # The first sink pages of a fresh stream move from the table to the pinned list; the page
        # with the last sinks is among the dropped ones, so it must not be freed.
        dropped = table[pages.sink_full : pages.sink_full + pages.dropped]
        freed = [block for block in dropped if not (first and block in sources)]
        kept = table[pages.sink_full + pages.dropped :]
        rewritten = kept if window_delta else kept[: 1 if pages.border is not None else 0]

        new_heads = pages.sink_full if first else 0
        spare = self.block_pool.get_num_free_blocks() + self._get_num_returned(freed) - new_heads
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
            elif block.block_hash is not None:
                self.block_pool.evict_blocks({block.block_id})
            begin = pages.border_sinks if index == 0 else 0
            if target is not block or window_delta:
                moves.append(
                    PageMove(block.block_id, target.block_id, begin, self.block_size, window_delta)
                )
        table[:] = [*heads, *kept]
        moves += self._sink_moves(sources, table, sink_delta)
        return Eviction(moves, retained)

    def _sink_moves(
        self, sources: Sequence[KVCacheBlock], table: Sequence[KVCacheBlock], delta: int
    ) -> list[PageMove]:
        """Write the sinks into the head pages, rotated from their pristine keys."""
        return [
            PageMove(
                source.block_id,
                target.block_id,
                0,
                min(self.block_size, self.spec.sink_tokens - index * self.block_size),
                delta,
            )
            for index, (source, target) in enumerate(zip(sources, table, strict=False))
        ]

    def _get_num_returned(self, blocks: Sequence[KVCacheBlock]) -> int:
        """Pages the pool gains when a request gives up ``blocks``."""
        return sum(block.ref_cnt == 1 for block in blocks)

    # -- what vLLM calls --------------------------------------------------------------------

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Hash full pages, as long as their content is a function of the tokens before them."""
        if request.request_id not in self.sink_pages:
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The pages of a request that ends or is preempted: sink pages first, then the table."""
        return [*self.sink_pages.pop(request_id, ()), *super().pop_blocks_for_free(request_id)]
