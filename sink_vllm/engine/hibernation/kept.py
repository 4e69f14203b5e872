"""Pages of the prefix cache that are kept outside the block pool, and how they come back.

What a page contains is a function of its hash: that is what the prefix cache relies on, and so
does this. A page goes out when the turn of its stream ends, and when a stream rewrites it that may
end before it needs the page no more. It comes back as what it was, a cached page that nobody owns:
before a waiting request is looked up, pages it could start from are copied into free blocks, under
their hashes, most recently used. From there on everything is as if the pool had never lost them.

The workers copy (``StepPlan``): pages out before anything of the step writes to the KV cache, pages
back after that and before all else. So a block may be handed out in the step that copies its page
out, and a page may be read by the moves of the step that brings it back.
"""

from collections.abc import Callable, Sequence

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    get_group_id,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request

from sink_vllm.engine.boundary import Needed, longest_boundary
from sink_vllm.engine.hibernation.kept_pages import KeptPages, Manager, keys_of
from sink_vllm.engine.managers.streaming import StreamingLLMManager
from sink_vllm.engine.parked import least_pages
from sink_vllm.engine.stream import Stream
from sink_vllm.policy.plan import PageCopy

_DAMAGED = 8
"""Damaged files after which a request is computed instead."""


class Hibernation(KeptPages):
    """Keeps pages, and brings them back."""

    def bring_back(self, request: Request, stream: Stream) -> bool:
        """Let the prefix cache have what a waiting request can start from.

        Returns:
            Whether it may be looked up; else this step brings back enough already.
        """
        if request.skip_reading_prefix_cache:
            return True
        for _ in range(_DAMAGED):
            wanted = self._wanted_window(stream) or self._wanted_prefix(request, stream)
            missing = [key for key in wanted if self._cached(key) is None]
            if not missing:
                return True
            if self._loads and len(self._loads) + len(missing) > self._most_loads:
                return False
            slots, read = self._slots_with(missing)
            if len(slots) == len(missing):
                left_out = set(missing)
                if self._load([key for key in wanted if key not in left_out], missing):
                    stream.brought_from = "disk" if read else "host"
            for slot in slots:
                self.slots.release(slot)
            if len(slots) == len(missing):
                break
        return True

    def _slots_with(self, keys: Sequence[BlockHashWithGroupId]) -> tuple[list[int], int]:
        """Slots with these pages, held, up to one that is on disk no more; how many were read."""
        slots: list[int] = []
        # Those in host memory first, so that reading does not take their slots.
        for key in keys:
            if key in self.slots:
                slots.append(self.slots.slot_of[key])
                self.slots.hold(slots[-1])
        read = 0
        for key in keys:
            if key not in self.slots:
                if self.disk is None or not self.disk.read(key):
                    break
                read += 1
                self.copied["read"] += 1
                slots.append(self.slots.slot_of[key])
                self.slots.hold(slots[-1])
        return slots, read

    def has_sinks(self, hashes: Sequence[BlockHash]) -> bool:
        """Whether pages with these hashes are in the prefix cache or kept; any thread may ask."""
        return all(self._has(self._tables.full[0], block_hash) for block_hash in hashes)

    def _wanted_window(self, stream: Stream) -> list[BlockHashWithGroupId]:
        """Pages of the longest boundary that a long prompt could be resumed at."""
        if stream.prompt is None:
            return []
        tables, hashes, schedule = self._tables, stream.prompt_hashes, stream.schedule
        size = tables.block_size
        end = tables.longest_resume(
            schedule,
            hashes,
            (len(stream.prompt) + stream.missing - 1) // size,
            least_pages(schedule, stream.parked, size),
            self._may_move,
        )
        if end is None:
            return []
        sinks = tables.num_sink_pages(schedule)
        wanted: list[BlockHashWithGroupId] = []
        for full in tables.full:
            needed = [*hashes[:sinks], *hashes[full.first_page(schedule, end) : end]]
            wanted += keys_of(full, needed)
        for window in tables.windowed:
            wanted += keys_of(window, hashes[window.first_page(end) : end])
        return wanted

    def _wanted_prefix(self, request: Request, stream: Stream) -> list[BlockHashWithGroupId]:
        """Pages of the longest prefix that vLLM's own look-up could find."""
        tables, hashes = self._tables, request.block_hashes
        most = min(request.num_tokens, stream.capacity) - 1
        end = longest_boundary(
            min(most // tables.block_size, len(hashes)),
            1,
            [
                *(Needed(lambda _: 0, self._by_page(one, hashes)) for one in tables.full[:1]),
                *(Needed(one.first_page, self._by_page(one, hashes)) for one in tables.windowed),
            ],
            lambda _: True,
        )
        if end is None:
            return []
        wanted = [key for full in tables.full for key in keys_of(full, hashes[:end])]
        for window in tables.windowed:
            wanted += keys_of(window, hashes[window.first_page(end) : end])
        return wanted

    def _load(
        self, present: Sequence[BlockHashWithGroupId], missing: Sequence[BlockHashWithGroupId]
    ) -> bool:
        """Give free blocks the pages they are to have; False, and nothing changed, if too few."""
        pool = self._pool
        kept = [block for block in map(self._cached, present) if block is not None]
        pool.touch(kept)  # so that none of them is taken for another
        if pool.get_num_free_blocks() < len(missing):
            pool.free_blocks(reversed(kept))
            return False
        blocks = pool.get_new_blocks(len(missing))
        for block, key in zip(blocks, missing, strict=True):
            block.set_block_hash(key)
            pool.cached_block_hash_to_block.insert(key, block)
            slot = self.slots.slot_of[key]
            self.slots.touch(key)
            self.slots.hold(slot)
            self._unplan(block.block_id)
            self._loads[block.block_id] = PageCopy(block.block_id, slot, get_group_id(key))
        self.copied["back"] += len(blocks)
        # Cached pages that nobody owns, reused last; of one stream the last pages first.
        pool.free_blocks([*reversed(blocks), *reversed(kept)])
        return True

    def _unplan(self, block_id: int) -> None:
        """A block that was to get a page gets another one."""
        earlier = self._loads.pop(block_id, None)
        if earlier is not None:
            self.slots.release(earlier.slot)

    def _has(self, manager: Manager, block_hash: BlockHash) -> bool:
        """Whether a page of all tables that are looked up with this one is cached or kept."""
        return all(
            self._is_kept(key) or self._cached(key) is not None
            for key in _lookup_keys(manager, block_hash)
        )

    def _is_kept(self, key: BlockHashWithGroupId) -> bool:
        return key in self.slots or (self.disk is not None and key in self.disk)

    def _may_move(self, manager: Manager, block_hash: BlockHash) -> bool:
        """The same, of pages that moves of this step may read."""
        fresh = self._ledger.fresh
        return all(
            self._is_kept(key) if (one := self._cached(key)) is None else one.block_id not in fresh
            for key in _lookup_keys(manager, block_hash)
        )

    def _by_page(self, manager: Manager, hashes: Sequence[BlockHash]) -> Callable[[int], bool]:
        return lambda page: self._has(manager, hashes[page])


def _lookup_keys(manager: Manager, block_hash: BlockHash) -> list[BlockHashWithGroupId]:
    """Keys of a page in all tables that are looked up with this one."""
    if isinstance(manager, StreamingLLMManager):
        groups = manager.lookup_groups
    else:
        groups = [manager.kv_cache_group_id]
    return [make_block_hash_with_group_id(block_hash, group) for group in groups]
