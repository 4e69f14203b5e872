"""The page tables of all layers of a stream, which evict and resume together (engine core).

Most models have one group of layers, with one table per request. Models whose sliding-window
layers have tables of their own have several: of ``StreamingLLMManager`` for the layers that see
everything in the cache, of ``StreamingLLMWindowManager`` for the others.
"""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sink_vllm.schedule import Schedule
from sink_vllm.scheduler.manager import StreamingLLMManager
from sink_vllm.scheduler.page_change import PageChange
from sink_vllm.scheduler.window_manager import StreamingLLMWindowManager


class PageTables:
    """All block managers of an engine core as one."""

    def __init__(self, managers: Sequence[SingleTypeKVCacheManager]) -> None:
        self.full = [one for one in managers if isinstance(one, StreamingLLMManager)]
        self.windowed = [one for one in managers if isinstance(one, StreamingLLMWindowManager)]
        assert len(self.full) + len(self.windowed) == len(managers), "a group without the policy"
        assert self.full, "layers that see everything keep the sinks"
        first = self.full[0]
        first.lookup_groups = [one.kv_cache_group_id for one in self.full]
        self.spec, self.anchors = first.spec, first.anchors
        self.block_size, self.block_pool = first.block_size, first.block_pool
        for full in self.full:
            full.dropped = first.dropped  # they share the pool
        self._first = first

    def evict(
        self, request_id: str, schedule: Schedule, window_delta: int, sink_delta: int
    ) -> PageChange | None:
        """See ``StreamingLLMManager.evict``: in all tables, or in none."""
        needs = [one.pages_to_evict(request_id, schedule, window_delta) for one in self.full]
        windows = [one.pages_to_evict(request_id, window_delta) for one in self.windowed]
        reserved = sum(windows)
        if self._is_several and self.block_pool.get_num_free_blocks() < sum(needs) + reserved:
            return None
        changes: list[PageChange] = []
        for index, manager in enumerate(self.full):
            change = manager.evict(
                request_id,
                schedule,
                window_delta,
                sink_delta,
                reserved + sum(needs[index + 1 :]),
            )
            if change is None:
                assert not changes, "there were enough pages for all tables"
                return None
            changes.append(change)
        for index, window in enumerate(self.windowed):
            # Besides what the others need for this eviction, all need a page for the next token.
            others = sum(windows[index + 1 :]) + len(needs) + len(windows)
            changes.append(window.evict(request_id, schedule, window_delta, others))
        return _together(changes)

    def find_resume(
        self, schedule: Schedule, hashes: Sequence[BlockHash], num_pages: int
    ) -> int | None:
        """See ``StreamingLLMManager.find_resume``: a boundary that is cached in all groups."""
        end = self._first.find_resume(schedule, hashes, num_pages)
        while end is not None:
            missing = [one.first_missing(hashes, end) for one in self.windowed]
            gaps = [page for page in missing if page is not None]
            if not gaps:
                return end
            # No window between the gap and this boundary is without it.
            end = self._first.find_resume(schedule, hashes, min(gaps))
        return None

    def resume(
        self,
        request_id: str,
        schedule: Schedule,
        hashes: Sequence[BlockHash],
        end: int,
        reserved: int = 0,
    ) -> PageChange | None:
        """See ``StreamingLLMManager.resume``: in all tables, or in none."""
        if not self._is_several:
            return self._first.resume(request_id, schedule, hashes, end, reserved)
        # Held before any table takes a free page, which might be one that another starts from.
        held = [one.held_to_resume(schedule, hashes, end) for one in self.full]
        windows = [one.held_to_resume(hashes, end) for one in self.windowed]
        pinned = [block for blocks in (*held, *windows) for block in blocks]
        self.block_pool.touch(pinned)
        needed = sum(one.pages_to_resume(schedule, end) for one in self.full)
        needed += sum(map(len, windows)) + reserved
        change = None
        if self.block_pool.get_num_free_blocks() >= needed:
            change = self._resume(request_id, schedule, hashes, end, windows)
        self.block_pool.free_blocks(reversed(pinned))
        return change

    def _resume(
        self,
        request_id: str,
        schedule: Schedule,
        hashes: Sequence[BlockHash],
        end: int,
        windows: Sequence[Sequence[KVCacheBlock]],
    ) -> PageChange:
        evictions = self.evictions_at(schedule, end)
        evicted = evictions * schedule.stride // self.block_size

        def delta_of(page: int) -> int:
            return self._first.age(schedule, page, evictions) * -self.anchors.span

        changes = []
        for manager in self.full:
            change = manager.resume(request_id, schedule, hashes, end)
            assert change is not None, "there were enough pages for all tables"
            changes.append(change)
        for window, held in zip(self.windowed, windows, strict=True):
            changes.append(window.resume(request_id, held, end, evicted, delta_of))
        return _together(changes)

    @property
    def _is_several(self) -> bool:
        return len(self.full) + len(self.windowed) > 1

    def evictions_at(self, schedule: Schedule, end: int) -> int:
        """See ``StreamingLLMManager.evictions_at``."""
        return self._first.evictions_at(schedule, end)

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        for full in self.full:
            full.stop_hashing(request_id)
        for window in self.windowed:
            window.stop_hashing(request_id)

    @property
    def pages_per_stream(self) -> int:
        """Pages a stream holds at most while it generates, of all groups.

        A long chunk of a prompt takes more pages of windowed layers, until the next step.
        """
        windowed = [one.pages_per_stream for one in self.windowed]
        return sum(one.spec.pages_per_stream for one in self.full) + sum(windowed)


def _together(changes: Sequence[PageChange]) -> PageChange:
    return PageChange(
        [move for change in changes for move in change.moves],
        [block for change in changes for block in change.retained],
    )
