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

import hashlib
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cachetools import LRUCache
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)
from vllm.v1.request import Request

from sink_vllm.engine.parked import GappedHashes
from sink_vllm.engine.stream import BREATH, Stream
from sink_vllm.policy.parked import Parked
from sink_vllm.policy.schedule import EvictionPages, Schedule

_RUN = 64  # pages; a run is remembered as a whole
_REMEMBERED = 1 << 18  # pages, some 75 bytes each

ALL_PAGES = 2**31 - 1
"""As the number of pages of a request that are hashed already: hash no more."""

Run = tuple[object, ...]


class RememberedRuns:
    """Hashes of runs of pages; one prompt cannot push out what others come back to.

    Runs that were asked for again are kept apart from those that were seen once: a prompt of any
    length that nobody resends takes the place of other such prompts only.
    """

    def __init__(self, pages: int = _REMEMBERED) -> None:
        """``pages`` to remember, half of them seen once."""
        runs = max(pages // _RUN // 2, 1)
        self._lock = threading.Lock()
        self._once: LRUCache[Run, list[BlockHash]] = LRUCache(runs)
        self._again: LRUCache[Run, list[BlockHash]] = LRUCache(runs)

    def get(self, key: Run) -> list[BlockHash] | None:
        with self._lock:
            known: list[BlockHash] | None = self._again.get(key)
            if known is None and (known := self._once.pop(key, None)) is not None:
                self._again[key] = known
            return known

    def add(self, key: Run, hashes: list[BlockHash]) -> None:
        with self._lock:
            self._once[key] = hashes


class PageHasher:
    """Hashes full pages of streams.

    Used by two threads: prompts are hashed on vLLM's input thread, streams that generate in the
    engine's loop. All they share is the memory of runs.
    """

    def __init__(self, block_size: int, hash_function: Callable[[Any], bytes]) -> None:
        self._block_size = block_size
        self._hash = hash_function
        self._runs = RememberedRuns()

    def survives_eviction(self, schedule: Schedule) -> bool:
        """Whether the chain of hashes can go on after an eviction.

        A head page shares its stream page with evicted tokens. If the window is too short for
        that page to be full at the eviction, its hash is never known and the chain ends.
        """
        border = schedule.sink_tokens % self._block_size
        return not border or border + schedule.window >= self._block_size

    def install(self, request: Request, stream: Stream) -> None:
        """Make ``request`` hash its pages as those of ``stream``, from the first one on."""
        request._block_hasher = partial(self._hash_new_pages, stream)
        request.block_hashes.clear()
        stream.last_hash = None
        request.update_block_hashes()

    def resume(self, request: Request, stream: Stream, end: int) -> None:
        """Make ``request`` go on hashing behind the first ``end`` pages of its prompt."""
        size = self._block_size
        heads = EvictionPages.of(stream.schedule, size).sink_full
        kept = heads + stream.evicted_from_chain // size
        hashes = stream.prompt_hashes
        request.block_hashes[:] = [*hashes[:heads], *hashes[kept:end]]
        stream.last_hash = hashes[end - 1]
        request.update_block_hashes()

    def hashes_of_prompt(
        self,
        request: Request,
        schedule: Schedule,
        tokens: array[int],
        first_pages: int,
        are_cached: Callable[[Sequence[BlockHash]], bool],
    ) -> list[BlockHash]:
        """Hashes of the full pages of a prompt that might be found in the prefix cache.

        Args:
            request: whose LoRA name and cache salt enter the hashes.
            schedule: of the stream.
            tokens: of the whole prompt.
            first_pages: pages without which nothing behind them can be found.
            are_cached: whether the prefix cache has pages with these hashes.

        Returns:
            Of all full pages; of the first ones only if they are not cached.
        """
        first = self._hash_pages(
            request, schedule, tokens[: first_pages * self._block_size], 0, None
        )
        if not are_cached(first):
            return first
        return self.hashes(request, schedule, tokens)

    def hashes_with_gap(
        self, request: Request, schedule: Schedule, tokens: array[int], parked: Parked
    ) -> GappedHashes:
        """Hashes of a chain whose ``tokens`` are its sinks and its rest, at the start of a page."""
        sinks, size = schedule.sink_tokens, self._block_size
        begin = sinks + parked.missing
        rest = self.hashes(
            request, schedule, tokens[sinks:], begin, BlockHash(parked.parent or b"")
        )
        gap = begin // size - len(parked.sinks)
        return GappedHashes([BlockHash(one) for one in parked.sinks], gap, rest)

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
            digest = hashlib.sha256(run.tobytes()).digest()
            key = (parent, start, schedule, keys, digest)
            known = self._runs.get(key)
            if known is None:
                known = self._hash_pages(request, schedule, run, start, parent)
                self._runs.add(key, known)
                time.sleep(BREATH)
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
        size = self._block_size
        start = len(request.block_hashes) * size
        if start + size > request.num_tokens:
            return []
        position = start + stream.evicted_from_chain
        # Pages of the prompt may have been hashed when it arrived.
        end = request.num_tokens + stream.evicted_from_chain
        new = list(stream.prompt_hashes[position // size : end // size])
        if not new:
            stream.prompt_hashes = []
        begin = start + len(new) * size
        if begin + size <= request.num_tokens:
            new += self.hashes(
                request,
                stream.schedule,
                request._all_token_ids[begin:],
                begin + stream.evicted_from_chain,
                new[-1] if new else stream.last_hash,
            )
        stream.last_hash = new[-1]
        return new
