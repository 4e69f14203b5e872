"""How block tables change their pages: shared by the block managers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sink_vllm.engine.ledger import PageLedger
from sink_vllm.policy.plan import PageMove

ALL_PAGES = 2**31 - 1
"""As the number of pages already hashed: hash no more."""


def move_of(
    manager: SingleTypeKVCacheManager,
    source: KVCacheBlock,
    target: KVCacheBlock,
    begin: int,
    end: int,
    delta: int,
) -> PageMove:
    """The move of slots ``[begin, end)`` between two pages of a manager's group."""
    group = manager.kv_cache_group_id
    return PageMove(source.block_id, target.block_id, begin, end, delta, group)


def rewritten(ledger: PageLedger, block: KVCacheBlock, reserved: int) -> KVCacheBlock:
    """The page an owner of ``block`` may change in its place: itself, or a private copy.

    A page somebody else owns, too, is copied. A hashed page of its owner alone is copied while
    pages last that nobody has been promised, to stay useful to others; else it gives up its hash.
    The caller adds the move; the source of a copy is retained until the step is planned.

    Args:
        ledger: of the pages.
        block: a page the caller owns.
        reserved: free pages that must be left for pages that have to be copied.
    """
    pool = ledger.pool
    if not ledger.is_shared(block):
        if block.block_hash is None:
            return block
        if ledger.spare <= 0 or ledger.num_free <= reserved:
            pool.evict_blocks({block.block_id})
            return block
        ledger.spare -= 1
    (target,) = pool.get_new_blocks(1)
    ledger.retain(block)
    return target


@contextmanager
def noting_fresh(
    manager: SingleTypeKVCacheManager, ledger: PageLedger, request_id: str
) -> Iterator[None]:
    """Note the pages of a request that enter the prefix cache inside."""
    before = manager.num_cached_block.get(request_id, 0)
    yield
    after = manager.num_cached_block.get(request_id, 0)
    if after > before:
        entered = manager.req_to_blocks[request_id][before:after]
        ledger.fresh.update(block.block_id for block in entered)


def is_movable(
    manager: SingleTypeKVCacheManager, ledger: PageLedger, block_hash: BlockHash, groups: list[int]
) -> bool:
    """Whether the prefix cache has a page in all ``groups`` that moves of this step may read."""
    found = manager.block_pool.get_cached_block(block_hash, groups)
    return found is not None and not any(block.block_id in ledger.fresh for block in found)


def cached_pages(
    manager: SingleTypeKVCacheManager, hashes: Sequence[BlockHash]
) -> list[KVCacheBlock]:
    """The pages of a manager's group that the prefix cache has under ``hashes``.

    Raises:
        KeyError: it does not have one of them.
    """
    group = [manager.kv_cache_group_id]
    pages: list[KVCacheBlock] = []
    for block_hash in hashes:
        found = manager.block_pool.get_cached_block(block_hash, group)
        if not found:
            raise KeyError(block_hash)
        pages += found
    return pages
