"""Who owns which KV page, in one place (engine core process).

    owner                     where                      until
    ────────────────────────  ─────────────────────────  ─────────────────────────────────────
    block table of a request  ``manager.req_to_blocks``  evicted, finished, preempted
    pinned sink pages         ``pin`` … ``unpin``        the request is finished or preempted
    source of a page move     ``retain`` … ``release``   the step that runs the move is planned
    next eviction of a stream ``ahead``                  it evicts, or somebody needs the page

The block pool counts references; the ledger knows whose they are, and :meth:`check_integrity`
compares the two. ``DroppedPages`` and ``CopiedPages`` own nothing: they are notes on free pages.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sink_vllm.engine.ahead import ComposedAhead
from sink_vllm.engine.dropped import CopiedPages, DroppedPages
from sink_vllm.policy.plan import PageMove


class IntegrityError(RuntimeError):
    """The block pool and the ledger disagree about a page."""


class PageLedger:
    """All owners of pages of one engine core, and the page moves of the step being planned."""

    def __init__(self, block_pool: BlockPool) -> None:
        self.pool = block_pool
        self.dropped = DroppedPages(block_pool)
        self.ahead = ComposedAhead(block_pool)
        self.copied: dict[int, CopiedPages] = {}
        """Per KV cache group."""
        self.spare = 0
        """Free pages nobody has been promised: how many may be spent in this step on keeping
        pages in the prefix cache that their only owner is about to change."""
        self.fresh: set[int] = set()
        """Pages that entered the prefix cache in this step: their content is computed after its
        moves have run, so no move may read them."""
        self.before_rewriting: Callable[[KVCacheBlock], None] | None = None
        """Told of pages that are about to be copied or changed by an owner."""
        self._tables: dict[int, Mapping[str, list[KVCacheBlock]]] = {}
        self._sinks: dict[int, dict[str, list[KVCacheBlock]]] = {}
        self._moves: dict[str, list[PageMove]] = {}
        self._retained: list[KVCacheBlock] = []
        self._num_retained: Counter[int] = Counter()

    def add_group(self, group: int, tables: Mapping[str, list[KVCacheBlock]]) -> None:
        """Know the block tables of a KV cache group, which vLLM's manager keeps."""
        self._tables[group] = tables
        self._sinks[group] = {}
        self.copied[group] = CopiedPages()

    @property
    def num_pages(self) -> int:
        """Pages requests can use: all but vLLM's null block."""
        return self.pool.num_gpu_blocks - 1

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def num_available(self) -> int:
        """Free pages, and those on loan that would be if somebody needed them."""
        return self.num_free + len(self.ahead)

    # -- sink pages -------------------------------------------------------------------------

    def pin(self, group: int, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """The sink pages of a stream that evicts; the references are taken over."""
        self._sinks[group][request_id] = blocks

    def pinned(self, group: int, request_id: str) -> list[KVCacheBlock] | None:
        """Its sink pages; ``None`` before the first eviction."""
        return self._sinks[group].get(request_id)

    def num_pinned(self, request_id: str) -> int:
        """Its sink pages in all groups."""
        return sum(len(sinks.get(request_id, ())) for sinks in self._sinks.values())

    def unpin(self, group: int, request_id: str) -> list[KVCacheBlock]:
        """Give the references back to the caller."""
        return self._sinks[group].pop(request_id, [])

    # -- the step that is being planned -----------------------------------------------------

    def begin(self) -> None:
        """A step begins to be planned."""
        self.fresh.clear()

    def num_owners(self, block: KVCacheBlock) -> int:
        """Requests that own a page.

        A source of moves of this step is not owned: all moves read before any of them writes.
        """
        return block.ref_cnt - self._num_retained[block.block_id]

    def is_shared(self, block: KVCacheBlock) -> bool:
        """Whether a page has other owners than the one who asks."""
        return self.num_owners(block) > 1

    def retain(self, block: KVCacheBlock) -> None:
        """A move reads ``block``, which its owner gives up: the reference is taken over."""
        self._retained.append(block)
        self._num_retained[block.block_id] += 1

    def plan(self, request_id: str, moves: list[PageMove]) -> None:
        """Page moves that the next step has to run for a request; instead of any before."""
        self._moves[request_id] = moves

    def plan_more(self, request_id: str, moves: list[PageMove]) -> None:
        """Page moves beside those that are planned for a request."""
        self._moves[request_id] = [*self._moves.get(request_id, ()), *moves]

    def cancel(self, request_id: str) -> None:
        """The request gives up its pages before the step runs."""
        self._moves.pop(request_id, None)

    def take_moves(self) -> list[PageMove]:
        """The page moves of the step that is being planned."""
        moves = [move for moves in self._moves.values() for move in moves]
        self._moves = {}
        return moves

    def release(self) -> None:
        """The step is planned: whatever takes the sources of its moves next is written after
        the moves ran, so they may go back to the pool."""
        self.spare = 0
        if self._retained:
            self.pool.free_blocks(self._retained)
            self._retained = []
            self._num_retained.clear()

    def rewritten(self, block: KVCacheBlock, reserved: int) -> KVCacheBlock:
        """The page an owner of ``block`` may change in its place: itself, or a private copy.

        A page somebody else owns, too, is copied. A hashed page of its owner alone is copied
        while pages last that nobody has been promised, to stay useful to others; else it gives up
        its hash. The caller plans the move; the source of a copy is retained until then.

        Args:
            block: a page the caller owns.
            reserved: free pages that must be left for pages that have to be copied.
        """
        if self.before_rewriting is not None:
            self.before_rewriting(block)
        if not self.is_shared(block):
            if block.block_hash is None:
                return block
            if self.spare <= 0 or self.num_free <= reserved:
                self.pool.evict_blocks({block.block_id})
                return block
            self.spare -= 1
        (target,) = self.pool.get_new_blocks(1)
        self.retain(block)
        return target

    def exchange(self, block: KVCacheBlock) -> None:
        """An owner of ``block`` goes on with a page that was composed of it before: the reference
        is taken over."""
        if self.before_rewriting is not None:
            self.before_rewriting(block)
        self.retain(block)

    # -- the prefix cache -------------------------------------------------------------------

    def note_fresh(self, manager: SingleTypeKVCacheManager, request_id: str, before: int) -> None:
        """Note the pages of a request that have entered the prefix cache since it had ``before``
        of them there; called once per token of every stream."""
        after = manager.num_cached_block.get(request_id, 0)
        if after > before:
            entered = manager.req_to_blocks[request_id][before:after]
            self.fresh.update(block.block_id for block in entered)

    def is_movable(self, block_hash: BlockHash, groups: list[int]) -> bool:
        """Whether the prefix cache has a page in all ``groups`` that moves of this step may
        read."""
        found = self.pool.get_cached_block(block_hash, groups)
        return found is not None and not any(block.block_id in self.fresh for block in found)

    def cached(self, group: int, hashes: Sequence[BlockHash]) -> list[KVCacheBlock]:
        """The pages of a KV cache group that the prefix cache has under ``hashes``.

        Raises:
            KeyError: it does not have one of them.
        """
        pages: list[KVCacheBlock] = []
        for block_hash in hashes:
            found = self.pool.get_cached_block(block_hash, [group])
            if not found:
                raise KeyError(block_hash)
            pages += found
        return pages

    # -- accounts ---------------------------------------------------------------------------

    def held(self, request_id: str) -> int:
        """Pages a request owns, those it shares included."""
        pages = 0
        for group, tables in self._tables.items():
            table = tables.get(request_id)
            if table:
                pages += len(table)
                if table[0].is_null:  # of a sliding window: null entries come first
                    pages -= _nulls(table)
            sinks = self._sinks[group].get(request_id)
            if sinks:
                pages += len(sinks)
        return pages

    def owners(self) -> Counter[int]:
        """References to every page, as the ledger knows them."""
        owned: list[Iterable[KVCacheBlock]] = [self._retained, self.ahead.pages]
        for tables in (*self._tables.values(), *self._sinks.values()):
            owned += tables.values()
        return Counter(block.block_id for blocks in owned for block in blocks if not block.is_null)

    def check_integrity(self) -> None:
        """Free and owned pages are all pages, and every reference has its owner.

        Raises:
            IntegrityError: naming pages, and both numbers of each.
        """
        owners = self.owners()
        free = Counter(block.block_id for block in self.pool.free_block_queue.get_all_free_blocks())
        wrong = [
            f"page {page}: {block.ref_cnt} references, {owners[page]} owners, "
            f"{free[page]} times in the free queue"
            for page, block in enumerate(self.pool.blocks)
            if not block.is_null
            and (block.ref_cnt != owners[page] or free[page] != (block.ref_cnt == 0))
        ]
        if sum(free.values()) != self.num_free:
            wrong.append(f"{sum(free.values())} pages in the free queue, {self.num_free} counted")
        if wrong:
            raise IntegrityError(f"KV pages are lost or owned twice: {'; '.join(wrong)}.")

    def check_idle(self) -> None:
        """Nobody is left: every page is free. Cheap unless something is wrong.

        Raises:
            IntegrityError: naming pages, and both numbers of each.
        """
        if self.num_free == self.num_pages and not any(map(len, self._sinks.values())):
            return
        self.check_integrity()
        raise IntegrityError(
            f"No request is left, and {self.num_free} of {self.num_pages} KV pages are free; "
            f"still owned: {dict(self.owners())}."
        )


def _nulls(table: Sequence[KVCacheBlock]) -> int:
    """Null entries at the start of a table; few entries follow them."""
    at = len(table)
    while not table[at - 1].is_null:
        at -= 1
    return at
