"""Prefix-cache hashes of the pages of a stream.

vLLM chains the hash of a page over all tokens before it. That stays valid under the policy,
because what a page contains is a function of the tokens before it; from the first eviction on it
is a function of ``S``, ``W`` and ``g`` as well, so those pages get them as an extra key. Pages
before are ordinary and shared with everybody.

A conversation that is resent brings mostly pages that were hashed with its last turn. Hashes of
long runs of pages are remembered, so that a turn costs what is new.

The list ``Request.block_hashes`` is kept aligned with the block table: an eviction drops the same
entries from both, and the chain goes on from the last hash that was ever computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)
from vllm.v1.request import Request

from sink_vllm.schedule import Schedule

if TYPE_CHECKING:
    from sink_vllm.scheduler.stream import Stream

_RUN = 64  # pages; a run is remembered as a whole
_REMEMBERED = 1 << 16  # pages, 100 bytes each and 4 per token


class PageHasher:
    """Hashes full pages of streams."""

    def __init__(self, block_size: int, hash_function: Callable[[Any], bytes]) -> None:
        self._block_size = block_size
        self._hash = hash_function
        self._runs: LRUCache[tuple[object, ...], list[BlockHash]] = LRUCache(_REMEMBERED // _RUN)

    def survives_eviction(self, schedule: Schedule) -> bool:
        """Whether the chain of hashes can go on after an eviction.

        A head page shares its stream page with evicted tokens. If the window is too short for
        that page to be full at the eviction, its hash is never known and the chain ends.
        """
        border = schedule.sink_tokens % self._block_size
        return not border or border + schedule.window >= self._block_size

    def install(self, request: Request, stream: Stream) -> None:
        """Make ``request`` hash its pages as those of ``stream``, from scratch."""
        request._block_hasher = partial(self._hash_new_pages, stream)
        request.block_hashes.clear()
        stream.last_hash = None
        request.update_block_hashes()

    def hashes(
        self,
        request: Request,
        schedule: Schedule,
        tokens: Sequence[int],
        position: int = 0,
        parent: BlockHash | None = None,
    ) -> list[BlockHash]:
        """Hashes of the full pages in ``tokens``.

        Args:
            request: whose LoRA name and cache salt enter the hashes.
            schedule: of the stream; enters those of pages past the capacity.
            tokens: from the start of a page on.
            position: stream position of ``tokens[0]``.
            parent: hash of the page before; ``None`` at the start of the stream.
        """
        length = self._block_size * _RUN
        found: list[BlockHash] = []
        for begin in range(0, len(tokens) - length + 1, length):
            run = array("i", tokens[begin : begin + length])
            start, end = position + begin, position + begin + length
            keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            key = (parent, start, schedule, keys, run.tobytes())
            known = self._runs.get(key)
            if known is None:
                known = self._runs[key] = self._hash_pages(request, schedule, run, start, parent)
            found += known
            parent = known[-1]
        rest = len(found) * self._block_size
        return found + self._hash_pages(request, schedule, tokens[rest:], position + rest, parent)

    def _hash_pages(
        self,
        request: Request,
        schedule: Schedule,
        tokens: Sequence[int],
        position: int,
        parent: BlockHash | None,
    ) -> list[BlockHash]:
        size = self._block_size
        policy = ("streaming_llm", schedule.sink_tokens, schedule.window, schedule.stride)
        found: list[BlockHash] = []
        for begin in range(0, len(tokens) - size + 1, size):
            start, end = position + begin, position + begin + size
            keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            if end > schedule.capacity:
                keys = (*(keys or ()), policy)
            parent = hash_block_tokens(self._hash, parent, tokens[begin : begin + size], keys)
            found.append(parent)
        return found

    def _hash_new_pages(self, stream: Stream, request: Request) -> list[BlockHash]:
        """What vLLM calls whenever tokens were appended to ``request``."""
        start = len(request.block_hashes) * self._block_size
        if start + self._block_size > request.num_tokens:
            return []
        tokens = request._all_token_ids[start:]
        position = start + stream.evicted_from_chain
        new = self.hashes(request, stream.schedule, tokens, position, stream.last_hash)
        stream.last_hash = new[-1]
        return new
