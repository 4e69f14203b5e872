"""Endless streams live on the pages they drop, and leave the rest of the prefix cache alone."""

from typing import cast

import pytest
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    get_block_hash,
    init_none_hash,
    make_block_hash_with_group_id,
)

from sink_vllm.engine.dropped import DroppedPages
from tests.conftest import ModelFactory
from tests.support.engine import Policy, check_all_free, running_engine
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

PAGES = 9  # one of them is vLLM's null block
LIMIT = 4


@pytest.fixture
def pool() -> BlockPool:
    init_none_hash(sha256)
    return BlockPool(PAGES, True, 16)


def name(block: KVCacheBlock, text: str) -> BlockHash:
    """Give a page a place in the prefix cache, as ``BlockPool.cache_full_blocks`` does."""
    block_hash = BlockHash(text.encode())
    pool = cast(BlockPool, block.pool)
    pool._insert_block_hash(make_block_hash_with_group_id(block_hash, 0), block, None)
    return block_hash


def cached(pool: BlockPool) -> set[str]:
    """Names of all pages in the prefix cache."""
    hashes = [block.block_hash for block in pool.blocks if block.block_hash is not None]
    found = {get_block_hash(one) for one in hashes}
    assert all(pool.get_cached_block(one, [0]) for one in found)
    return {one.decode() for one in found}


def stream(pool: BlockPool, dropped: DroppedPages, steps: int) -> None:
    """A stream that takes a page, names it and drops it, again and again."""
    for step in range(steps):
        blocks = pool.get_new_blocks(1)
        name(blocks[0], f"stream {step}")
        pool.free_blocks(blocks)
        dropped.add(blocks)


def test_a_stream_reuses_its_own_pages_first(pool: BlockPool) -> None:
    idle = pool.get_new_blocks(3)
    names = {name(block, f"idle {i}").decode() for i, block in enumerate(idle)}
    pool.free_blocks(idle)

    stream(pool, DroppedPages(pool), 100)

    assert cached(pool) == names | {f"stream {step}" for step in range(100 - LIMIT, 100)}
    assert pool.get_num_free_blocks() == PAGES - 1


def test_pages_that_are_found_are_not_given_away(pool: BlockPool) -> None:
    dropped = DroppedPages(pool)
    stream(pool, dropped, LIMIT)
    found = pool.get_cached_block(BlockHash(b"stream 0"), [0])
    assert found is not None

    pool.touch(found)
    stream(pool, dropped, 100)

    assert "stream 0" in cached(pool)
    assert found[0].ref_cnt == 1


def test_a_page_that_was_reused_meanwhile_keeps_its_new_name(pool: BlockPool) -> None:
    dropped = DroppedPages(pool)
    stream(pool, dropped, LIMIT)
    others = pool.get_new_blocks(PAGES - 1)  # all there are
    names = {name(block, f"other {i}").decode() for i, block in enumerate(others)}
    pool.free_blocks(others)

    dropped.add(others[:1])  # one more than may be: the oldest is looked at

    assert cached(pool) == names


def test_pages_without_a_place_in_the_cache_are_not_kept(pool: BlockPool) -> None:
    dropped = DroppedPages(pool)
    held, nameless = pool.get_new_blocks(1), pool.get_new_blocks(1)
    name(held[0], "held")
    pool.free_blocks(nameless)

    dropped.add([*held, *nameless])
    stream(pool, dropped, LIMIT)

    assert cached(pool) == {"held", *(f"stream {step}" for step in range(LIMIT))}


@pytest.mark.engine
def test_an_idle_conversation_outlives_an_endless_stream(tiny_llama: ModelFactory) -> None:
    """The stream writes several times what the pool holds; the conversation goes on from pages."""
    folder = tiny_llama(TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256))
    policy = Policy(4, 60, 64)  # C = 128, 4 pages
    pages = 25
    conversation = random_tokens(300, 1)
    with running_engine(
        folder, policy, enable_prefix_caching=True, num_gpu_blocks_override=pages
    ) as engine:
        (first,) = engine.greedy([conversation], 20)
        (endless,) = engine.greedy([random_tokens(5, 2)], 1750)
        conversation += first.tokens + random_tokens(10, 3)
        (second,) = engine.greedy([conversation], 100)
        check_all_free(engine)

    assert endless.evicted_tokens > 2 * pages * 32
    assert second.cached_tokens >= 288
    verdict = judge(Oracle(folder), policy, [conversation], [second])
    assert verdict.least_evictions >= 4
