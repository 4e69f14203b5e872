"""The page tables of all layers of a stream, which evict and resume together (engine core).

Most models have one group of layers, with one table per request. Others have several: of
``StreamingLLMManager`` for the layers that see everything in the cache, of
``StreamingLLMWindowManager`` for sliding-window layers, and of ``StreamingLLMStateManager`` for
recurrent layers. The table of those is one page, with the state after all tokens of the stream: it
is taken with the first token, and neither grows nor moves, whatever is evicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sink_vllm.engine.ahead import places_ahead
from sink_vllm.engine.boundary import Needed, longest_boundary
from sink_vllm.engine.ledger import PageLedger
from sink_vllm.engine.managers.recurrent import StreamingLLMStateManager
from sink_vllm.engine.managers.streaming import Resumption, StreamingLLMManager
from sink_vllm.engine.managers.windowed import StreamingLLMWindowManager
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import EvictionPages, Schedule, cdiv, pages_per_stream


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


class PageTables:
    """All block managers of an engine core as one."""

    def __init__(self, managers: Sequence[SingleTypeKVCacheManager]) -> None:
        self.full = [one for one in managers if isinstance(one, StreamingLLMManager)]
        self.windowed = [one for one in managers if isinstance(one, StreamingLLMWindowManager)]
        self.recurrent = [one for one in managers if isinstance(one, StreamingLLMStateManager)]
        self.state_groups = [one.kv_cache_group_id for one in self.recurrent]
        assert self.num_groups == len(managers), "a group without the policy"
        assert self.full, "layers that see everything keep the sinks"
        first = self.full[0]
        first.lookup_groups = [one.kv_cache_group_id for one in self.full]
        self.spec, self.anchors = first.spec, first.anchors
        self.block_size = first.block_size
        self.ledger = PageLedger(first.block_pool)
        for full in self.full:
            full.bind(self.ledger)
        for window in self.windowed:
            window.bind(self.ledger)
        for state in self.recurrent:
            state.bind(self.ledger)
        self._first = first

    # -- how many pages ---------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        return len(self.full) + len(self.windowed) + len(self.recurrent)

    @property
    def pages_per_stream(self) -> int:
        """Pages a stream of the server's policy holds at most; see ``pages_of``."""
        return self.pages_of(self.spec.schedule)

    def pages_of(self, schedule: Schedule, tokens: int | None = None) -> int:
        """Pages a stream holds at most while it generates, of all groups.

        A long chunk of a prompt takes more pages of windowed layers, until the next step.

        Args:
            schedule: of the stream.
            tokens: it will never have computed more than so many; ``None``: it has no end.
        """
        if tokens is None or tokens > schedule.capacity:
            full = pages_per_stream(schedule, self.block_size)
            windowed = sum(one.pages_per_stream for one in self.windowed)
            return len(self.full) * full + windowed + len(self.recurrent)
        pages = cdiv(tokens, self.block_size)
        windowed = sum(min(pages, one.pages_per_stream) for one in self.windowed)
        return len(self.full) * pages + windowed + len(self.recurrent)

    def pages_after(self, processed: int, tokens: int) -> int:
        """Pages in the tables of a request with ``tokens`` cached tokens after this step.

        Args:
            processed: cached tokens whose step has been processed; the windows of those in flight
                stay.
            tokens: cached tokens after it.
        """
        windowed = sum(one.pages_after(processed, tokens) for one in self.windowed)
        return len(self.full) * cdiv(tokens, self.block_size) + windowed + len(self.recurrent)

    def longest_chunk(self, computed: int, in_flight: int, tokens: int, allowed: int) -> int:
        """Tokens of a chunk that leaves a request with ``allowed`` pages in its tables.

        Windowed layers need more pages for a long chunk than they hold afterwards. Windows of
        chunks in flight are kept until those are done; then one token always fits.

        Args:
            computed: cached tokens before the chunk, those in flight included.
            in_flight: of steps that have not been processed.
            tokens: of the chunk, at most.
            allowed: pages, pinned ones not counted.
        """
        processed = max(computed - in_flight, 0)
        least = 0 if in_flight else 1
        while tokens > least:
            after = computed + tokens
            if self.pages_after(processed, after) <= allowed:
                break
            # Back to the last boundary of pages before it.
            tokens = max((after - 1) // self.block_size * self.block_size - computed, least)
        return tokens

    # -- eviction ---------------------------------------------------------------------------

    def evict(
        self, request_id: str, schedule: Schedule, window_delta: int, sink_delta: int
    ) -> list[PageMove] | None:
        """Drop the ``g`` tokens after the sinks of a request whose cache is full, in all tables.

        Args:
            request_id: a request with exactly ``C`` cached tokens and none in flight.
            schedule: of this request; the same in every call.
            window_delta: rope positions to rotate the window's keys by; 0 leaves them alone,
                anything else is a re-anchoring.
            sink_delta: rope positions between the sinks as first computed and as seen from now on.

        Returns:
            The page moves, or ``None`` when the pool has too few free pages; then nothing changed
            but that windowed layers have given up what no query sees any more.
        """
        for window in self.windowed:
            window.remove_skipped_blocks(request_id, schedule.capacity)
        needs = [one.pages_to_evict(request_id, schedule, window_delta) for one in self.full]
        windows = [one.pages_to_evict(request_id, window_delta) for one in self.windowed]
        given_back = sum(one.pages_given_back(request_id, schedule) for one in self.full)
        if self.ledger.num_free + given_back < sum(needs) + sum(windows):
            return None
        for full in self.full:
            full.drop(request_id, schedule)
        for window in self.windowed:
            window.drop(request_id, schedule)
        moves: list[PageMove] = []
        for index, full in enumerate(self.full):
            reserved = sum(needs[index + 1 :]) + sum(windows)
            moves += full.compose(request_id, schedule, window_delta, sink_delta, reserved)
        for index, window in enumerate(self.windowed):
            moves += window.compose(request_id, window_delta, sum(windows[index + 1 :]))
        return moves

    def compose_ahead(
        self,
        request_id: str,
        schedule: Schedule,
        computed: int,
        most: int,
        window_delta: int,
        sink_delta: int,
    ) -> list[PageMove]:
        """Compose pages that the next eviction puts into the tables, in free pages.

        Args:
            request_id: a request that has ``composable_at`` cached tokens.
            schedule: of this request.
            computed: its cached tokens; all of them have been computed.
            most: pages to take from the pool.
            window_delta: of the next eviction, as ``evict`` will get it,
            sink_delta: and this.

        Returns:
            The page moves.
        """
        ahead = self.ledger.ahead
        before = len(ahead)
        moves: list[PageMove] = []
        for index in places_ahead(
            schedule, self.block_size, computed, reanchors=bool(window_delta)
        ):
            for full in self.full:
                if ahead.has(request_id, (full.kv_cache_group_id, index)):
                    continue
                if len(ahead) - before >= most:
                    return moves
                moves += full.compose_ahead(request_id, schedule, index, window_delta, sink_delta)
        if not window_delta:  # else more pages become complete
            ahead.done.add(request_id)
        return moves

    # -- resuming from the prefix cache -----------------------------------------------------

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

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        for full in self.full:
            full.stop_hashing(request_id)
        for window in self.windowed:
            window.stop_hashing(request_id)


def _is_cached(
    manager: StreamingLLMManager | StreamingLLMWindowManager, block_hash: BlockHash
) -> bool:
    """Whether the prefix cache has a page of a table."""
    return manager.is_cached(block_hash)
