"""Which cached page is reused first, when streams drop as many pages as they take."""

from collections import OrderedDict, deque
from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

_SHARE = 2
"""One in so many pages of the pool may be a dropped one."""


class DroppedPages:
    """Pages streams have dropped that the prefix cache still has: at most half of the pool.

    vLLM reuses cached pages in the order in which they were freed. An endless stream drops a page
    for every page it takes, so in time it would push everything else out of the cache: idle
    conversations, system prompts. Yet nobody asks for its dropped pages except who resends the
    stream cut off there. So there may be a number of them; beyond that, those dropped first are
    reused before anything else, and the stream lives on its own pages.

    Windowed layers with tables of their own are not part of this: a page that has just left their
    native window is one the stream is resumed from.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool
        self._limit = block_pool.num_gpu_blocks // _SHARE
        self._pages: OrderedDict[int, BlockHashWithGroupId] = OrderedDict()

    def add(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Note pages that were just freed; those that are not cached, or not free, are left out."""
        for block in blocks:
            if block.ref_cnt == 0 and block.block_hash is not None:
                self._pages[block.block_id] = block.block_hash
                self._pages.move_to_end(block.block_id)
        while len(self._pages) > self._limit:
            self._reuse_first(*self._pages.popitem(last=False))

    def _reuse_first(self, block_id: int, block_hash: BlockHashWithGroupId) -> None:
        """Take a page out of the cache, unless it has been found there or reused meanwhile."""
        block = self._pool.blocks[block_id]
        if block.ref_cnt == 0 and block.block_hash == block_hash:
            self._pool.touch([block])
            self._pool.evict_blocks({block_id})
            self._pool.free_blocks([block])  # pages without hash go to the front


class CopiedPages:
    """Cached pages that a stream goes on with a copy of: dropped when the copy is.

    Until then they are what the stream can be resumed from.
    """

    def __init__(self) -> None:
        self._due: dict[str, deque[list[tuple[KVCacheBlock, BlockHashWithGroupId]]]] = {}

    def add(self, request_id: str, block: KVCacheBlock, evictions: int) -> None:
        """Note that the copy of ``block`` will be dropped so many evictions from now."""
        if block.block_hash is not None:
            due = self._due.setdefault(request_id, deque())
            while len(due) < evictions:
                due.append([])
            due[evictions - 1].append((block, block.block_hash))

    def dropped(self, request_id: str) -> list[KVCacheBlock]:
        """The stream evicts: pages whose copies are dropped now, and that were not reused."""
        due = self._due.get(request_id)
        pages = due.popleft() if due else ()
        return [block for block, block_hash in pages if block.block_hash == block_hash]

    def forget(self, request_id: str) -> None:
        """The stream has ended: its pages may be asked for."""
        self._due.pop(request_id, None)
