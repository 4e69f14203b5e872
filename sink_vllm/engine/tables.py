"""How a stream is resumed from cached pages, in the page tables of all layers (engine core)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from sink_vllm.engine.boundary import Needed, longest_boundary
from sink_vllm.engine.evicting_tables import EvictingTables
from sink_vllm.engine.managers.streaming import Resumption, StreamingLLMManager
from sink_vllm.engine.managers.windowed import StreamingLLMWindowManager
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import EvictionPages, Schedule


@dataclass(frozen=True, slots=True)
class FoundPages:
    """Cached pages of all tables that a stream can be resumed from; nobody holds them yet."""

    end: int
    """Pages of the stream before the boundary."""
    full: list[Resumption]
    windows: list[list[KVCacheBlock]]
    states: list[KVCacheBlock]

    @property
    def blocks(self) -> list[KVCacheBlock]:
        full = (block for one in self.full for block in one.blocks)
        return [*full, *(block for one in self.windows for block in one), *self.states]


class PageTables(EvictingTables):
    """The page tables of an engine core, and what the prefix cache has for them."""

    def has_sinks(self, schedule: Schedule, hashes: Sequence[BlockHash]) -> bool:
        """Whether the prefix cache has the pages with the sinks; yes if there are none.

        It may just have got them, in which case they are of no use before the next step.

        Args:
            schedule: of a stream.
            hashes: of at least these pages.
        """
        return all(map(self._first.is_known, hashes[: self.num_sink_pages(schedule)]))

    def num_sink_pages(self, schedule: Schedule) -> int:
        """Pages from the start of a stream without which it cannot be resumed."""
        return EvictionPages.of(schedule, self.block_size).sinks

    def find_resume(
        self, schedule: Schedule, hashes: Sequence[BlockHash], num_pages: int, least: int
    ) -> FoundPages | None:
        """The longest boundary a stream with these page hashes can be resumed at.

        Args:
            schedule: of the stream.
            hashes: of the full pages of the stream, from its start.
            num_pages: consider boundaries of at most that many pages,
            least: and of at least that many, which have ``C`` tokens or more.

        Returns:
            The cached pages; ``None`` if the sink pages, or every window, have
            gaps in the cache.
        """
        end = self.longest_resume(schedule, hashes, num_pages, least, _is_cached)
        if end is None:
            return None
        return FoundPages(
            end,
            [one.found(schedule, hashes, end) for one in self.full],
            [one.found(hashes, end) for one in self.windowed],
            [one.found(hashes, end) for one in self.recurrent],
        )

    def longest_resume(
        self,
        schedule: Schedule,
        hashes: Sequence[BlockHash],
        num_pages: int,
        least: int,
        has: Callable[[StreamingLLMManager | StreamingLLMWindowManager, BlockHash], bool],
    ) -> int | None:
        """The boundary of ``find_resume``, if ``has`` says which pages of which table there are."""
        first = self._first
        if not all(has(first, one) for one in hashes[: self.num_sink_pages(schedule)]):
            return None

        def needed(
            table: StreamingLLMManager | StreamingLLMWindowManager, first_page: Callable[[int], int]
        ) -> Needed:
            return Needed(first_page, lambda page: has(table, hashes[page]))

        return longest_boundary(
            min(num_pages, len(hashes)),
            least,
            [
                needed(first, partial(first.first_page, schedule)),
                *(needed(one, one.first_page) for one in self.windowed),
                *self._needed_states(hashes),
            ],
            partial(first.is_resumable, schedule),
        )

    def _needed_states(self, hashes: Sequence[BlockHash]) -> list[Needed]:
        """The states after the last page before a boundary; they are nowhere but in the pool."""
        if not self.recurrent:
            return []

        def has(page: int) -> bool:
            return self.ledger.is_movable(hashes[page], self.state_groups)

        return [Needed(lambda end: end - 1, has)]

    def pages_to_resume(self, schedule: Schedule, found: FoundPages) -> int:
        """Free pages that ``resume`` takes at least, those it starts from included."""
        free = sum(block.ref_cnt == 0 for block in found.blocks)
        return free + sum(self._taken(schedule, found))

    def resume(self, request_id: str, schedule: Schedule, found: FoundPages) -> list[PageMove]:
        """Build the tables a stream has after ``found.end`` pages.

        Args:
            request_id: a request without pages.
            schedule: of its stream.
            found: just found; there are ``pages_to_resume`` free pages.
        """
        taken = self._taken(schedule, found)
        # Held before any table takes a free page, which might be one that another starts from.
        self.ledger.pool.touch(found.blocks)
        moves: list[PageMove] = []
        for index, (full, pages) in enumerate(zip(self.full, found.full, strict=True)):
            reserved = sum(taken[index + 1 :])
            moves += full.resume(request_id, schedule, pages, found.end, reserved)
        evicted = self.evictions_at(schedule, found.end) * schedule.stride // self.block_size
        for index, (window, blocks) in enumerate(zip(self.windowed, found.windows, strict=True)):
            deltas = self._deltas(schedule, window, found.end)
            reserved = sum(taken[len(self.full) + index + 1 :])
            moves += window.resume(request_id, blocks, found.end, evicted, deltas, reserved)
        for state, block in zip(self.recurrent, found.states, strict=True):
            moves += state.resume(request_id, block)
        return moves

    def _taken(self, schedule: Schedule, found: FoundPages) -> list[int]:
        """Free pages each table takes beside those it is resumed from."""
        full = zip(self.full, found.full, strict=True)
        windows = zip(self.windowed, found.windows, strict=True)
        return [
            *(one.pages_to_resume(schedule, pages) for one, pages in full),
            *(
                one.pages_to_resume(blocks, self._deltas(schedule, one, found.end))
                for one, blocks in windows
            ),
        ]

    def _deltas(self, schedule: Schedule, window: StreamingLLMWindowManager, end: int) -> list[int]:
        """Rope positions by which the pages of a native window have been rotated since."""
        evictions = self.evictions_at(schedule, end)
        return [
            self._first.age(schedule, page, evictions) * -self.anchors.span
            for page in range(window.first_page(end), end)
        ]

    def evictions_at(self, schedule: Schedule, end: int) -> int:
        """See ``StreamingLLMManager.evictions_at``."""
        return self._first.evictions_at(schedule, end)


def _is_cached(
    manager: StreamingLLMManager | StreamingLLMWindowManager, block_hash: BlockHash
) -> bool:
    """Whether the prefix cache has a page of a table."""
    return manager.is_cached(block_hash)
