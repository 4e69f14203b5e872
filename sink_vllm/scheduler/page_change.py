"""What a change of a block table asks for: shared by the block managers."""

from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sink_vllm.plan import PageMove

ALL_PAGES = 2**31 - 1
"""As the number of pages already hashed: hash no more."""


@dataclass(frozen=True, slots=True)
class PageChange:
    """What a change of a block table asks of the workers, and what must outlive the step."""

    moves: list[PageMove]
    retained: list[KVCacheBlock]
    """Sources of moves that left the block table; free them once the step is scheduled."""


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
