"""Copies of recurrent states in the prefix cache: where streams can be resumed (engine core).

A state is written by every step, and what it was is lost. So whenever a stream is about to go on
from the end of a page of attention, its state is copied first, into a free page that the prefix
cache has under the hash of that page from then on. The copy is run by the workers before the step,
so it is of the state after the step before, which is that after the last token of the page.

The copy is nobody's: it takes a page that was free, goes to the end of the queue of free pages, and
is overwritten when its turn comes.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
from vllm.v1.request import Request

from sink_vllm.engine.tables import PageTables
from sink_vllm.policy.plan import PageMove

_KEPT = 2
"""Boundaries of a stream, the latest, whose states are as good as any page of the prefix cache;
those of others count as dropped by the stream (``DroppedPages``)."""

_Copies = list[tuple[KVCacheBlock, BlockHashWithGroupId | None]]


class StateCopies:
    """Copies the states of all streams of an engine core at the ends of pages."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self.ledger = tables.ledger
        self._latest: dict[str, deque[_Copies]] = {}

    def plan(
        self, scheduled: Iterable[tuple[Request, int]], moves: Sequence[PageMove]
    ) -> list[PageMove]:
        """Copy the states of streams that go on from the end of a page in this step.

        To be called when nobody takes pages in this step any more, and before sources of its moves
        go back to the pool.

        Args:
            scheduled: requests of this step, and their cached tokens before it.
            moves: of this step; a page that they write has no state before it.

        Returns:
            More moves of this step.
        """
        written = {(move.group, move.dst) for move in moves}
        taken: list[KVCacheBlock] = []
        more: list[PageMove] = []
        for request, computed in scheduled:
            pages, rest = divmod(computed, self._tables.block_size)
            if rest or not 0 < pages <= len(request.block_hashes):
                continue
            copies = self._copy(request, pages, written, more)
            taken += copies
            if copies:
                self._note(request.request_id, copies)
        self.ledger.pool.free_blocks(taken)
        return more

    def _copy(
        self, request: Request, pages: int, written: set[tuple[int, int]], more: list[PageMove]
    ) -> list[KVCacheBlock]:
        """Copy the states of one request after ``pages`` pages, where there are no copies yet."""
        pool, size = self.ledger.pool, self._tables.block_size
        block_hash = request.block_hashes[pages - 1]
        copies: list[KVCacheBlock] = []
        for state in self._tables.recurrent:
            group, source = state.kv_cache_group_id, state.page_of(request.request_id)
            is_known = pool.get_cached_block(block_hash, [group]) is not None
            if is_known or (group, source.block_id) in written or not self.ledger.num_free:
                continue
            (copy,) = pool.get_new_blocks(1)
            pool.cache_full_blocks(
                request=request,
                blocks=[*[pool.null_block] * (pages - 1), copy],
                num_cached_blocks=pages - 1,
                num_full_blocks=pages,
                block_size=size,
                kv_cache_group_id=group,
            )
            more.append(PageMove(source.block_id, copy.block_id, 0, size, 0, group))
            copies.append(copy)
        return copies

    def _note(self, request_id: str, copies: Sequence[KVCacheBlock]) -> None:
        latest = self._latest.setdefault(request_id, deque())
        latest.append([(block, block.block_hash) for block in copies])
        if len(latest) > _KEPT:
            old = latest.popleft()
            self.ledger.dropped.add(block for block, known in old if block.block_hash == known)

    def forget(self, request_id: str) -> None:
        """The stream has ended: it may be resumed wherever there is a copy."""
        self._latest.pop(request_id, None)
