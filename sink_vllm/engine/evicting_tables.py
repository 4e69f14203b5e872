"""The page tables of all layers of a stream, which evict together (engine core).

Most models have one group of layers, with one table per request. Others have several: of
``StreamingLLMManager`` for the layers that see everything in the cache, of
``StreamingLLMWindowManager`` for sliding-window layers, and of ``StreamingLLMStateManager`` for
recurrent layers. The table of those is one page, with the state after all tokens of the stream: it
is taken with the first token, and neither grows nor moves, whatever is evicted.
"""

from collections.abc import Sequence

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from sink_vllm.engine.ahead import places_ahead
from sink_vllm.engine.ledger import PageLedger
from sink_vllm.engine.managers.recurrent import StreamingLLMStateManager
from sink_vllm.engine.managers.streaming import StreamingLLMManager
from sink_vllm.engine.managers.windowed import StreamingLLMWindowManager
from sink_vllm.policy.plan import PageMove
from sink_vllm.policy.schedule import Schedule, cdiv, pages_per_stream


class EvictingTables:
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

    def stop_hashing(self, request_id: str) -> None:
        """Let no further page of a request into the prefix cache."""
        for full in self.full:
            full.stop_hashing(request_id)
        for window in self.windowed:
            window.stop_hashing(request_id)
