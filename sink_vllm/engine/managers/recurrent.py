"""Block manager of recurrent layers: one page per stream, with the state after all of its tokens.

Evictions leave it alone. The prefix cache has copies of states (``engine/states.py``), each under
the hash of the page of attention that ends at the same token; a stream that is resumed there goes
on from a copy of its own, since a state is written by every step.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager

from sink_vllm.engine.ledger import PageLedger
from sink_vllm.policy.plan import PageMove


class StreamingLLMStateManager(MambaManager):
    """``MambaManager`` whose tables are one page, however many tokens there are."""

    def __init__(self, kv_cache_spec: Any, *, enable_caching: bool, **kwargs: Any) -> None:
        # From 0.33 on vLLM's manager insists on its own way of keeping states in the prefix cache.
        super().__init__(kv_cache_spec, enable_caching=False, **kwargs)
        self.enable_caching = enable_caching
        self._hits: set[str] = set()
        """Requests whose table is a page of the prefix cache, until they get their own."""
        self.bind(PageLedger(self.block_pool))

    def bind(self, ledger: PageLedger) -> None:
        """Account for pages in ``ledger``, which all groups of an engine core share."""
        self.ledger = ledger
        ledger.add_group(self.kv_cache_group_id, self.req_to_blocks)

    def page_of(self, request_id: str) -> KVCacheBlock:
        """The page with the state of a request that has one."""
        return self.req_to_blocks[request_id][0]

    # -- resuming from the prefix cache -----------------------------------------------------

    def found(self, hashes: Sequence[BlockHash], end: int) -> KVCacheBlock:
        """The cached state after ``end`` pages of a stream."""
        (block,) = self.ledger.cached(self.kv_cache_group_id, [hashes[end - 1]])
        return block

    def resume(self, request_id: str, found: KVCacheBlock) -> list[PageMove]:
        """Give a request a state of its own that goes on from a cached one.

        The cached page itself if pages are short, which the prefix cache then has no more.

        Args:
            request_id: a request without pages in this table.
            found: a cached state; the reference held for the caller is taken over.

        Returns:
            How its page is filled.
        """
        target = self.ledger.rewritten(found, 0)
        self.req_to_blocks[request_id] = [target]
        if target is found:
            return []
        size, group = self.block_size, self.kv_cache_group_id
        return [PageMove(found.block_id, target.block_id, 0, size, 0, group)]

    # -- what vLLM calls --------------------------------------------------------------------

    def get_num_blocks_to_allocate(self, request_id: str, *_args: Any, **_kwargs: Any) -> int:
        """One for a request without a state, also if it starts from a cached one."""
        return int(not self.req_to_blocks.get(request_id))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *_args: Any,
    ) -> None:
        """Hold the cached state. Its copy takes a free page, so it waits until all groups hold
        what they found (:meth:`allocate_new_blocks`)."""
        if new_computed_blocks:
            found = new_computed_blocks[-1]
            self.block_pool.touch([found])
            self.req_to_blocks[request_id] = [found]
            self._hits.add(request_id)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if request_id not in self._hits:
            return super().allocate_new_blocks(request_id, 1, 1)
        self._hits.discard(request_id)
        found = self.page_of(request_id)
        self.ledger.plan_more(request_id, self.resume(request_id, found))
        return list(self.req_to_blocks[request_id])

    def remove_skipped_blocks(self, *_args: Any, **_kwargs: Any) -> None:
        """The state is that of all tokens."""

    def cache_blocks(self, *_args: Any, **_kwargs: Any) -> None:
        """The page of a stream changes with every step; what is cached are copies of it."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._hits.discard(request_id)
        return super().pop_blocks_for_free(request_id)
