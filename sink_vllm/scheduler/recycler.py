"""Evicts, resumes and recomputes streams: ties requests, their pages and the plan of a step."""

from array import array
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from sink_vllm.config import SinkConfig
from sink_vllm.plan import PageMove
from sink_vllm.request_options import RequestPolicy
from sink_vllm.schedule import EvictionPages, Schedule
from sink_vllm.scheduler.hashing import PageHasher
from sink_vllm.scheduler.page_change import PageChange
from sink_vllm.scheduler.stream import Stream, compact, show
from sink_vllm.scheduler.tables import PageTables
from sink_vllm.stats import StreamingLLMStats

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_EVICTIONS_PER_LOG_LINE = 1000


class Recycler:
    """All streams of one engine core.

    Page changes are collected until the step they belong to is planned (``take_moves``); the
    sources of their moves stay pinned until ``release``.
    """

    def __init__(
        self,
        config: SinkConfig,
        tables: PageTables,
        hash_function: Callable[[Any], bytes] | None,
    ) -> None:
        """``hash_function`` hashes pages for the prefix cache; ``None`` when caching is off."""
        self.config = config
        self.tables = tables
        self.hasher = (
            PageHasher(tables.block_size, hash_function) if hash_function is not None else None
        )
        self.streams: dict[str, Stream] = {}
        self.dirty: set[str] = set()
        """Requests the workers have an outdated copy of: sent again with their next tokens."""
        self.stats = StreamingLLMStats()
        self._evictions = 0
        self.report_due: set[str] = set()
        """Requests whose next output should tell the client what was evicted."""
        self.unresolved: set[str] = set()
        """Long prompts that have not been looked up in the prefix cache yet."""
        self._moves: dict[str, list[PageMove]] = {}
        self._retained: list[KVCacheBlock] = []

    # -- requests come and go ---------------------------------------------------------------

    def open(self, request: Request) -> None:
        """Take in a new request; of a long prompt, the engine gets to see the start only.

        In ``truncate`` mode it sees the survivors of the schedule instead, an ordinary dense
        prompt, and what the schedule would have evicted is never computed.
        """
        schedule = self._schedule_of(request)
        stream = Stream(schedule)
        self.streams[request.request_id] = stream
        length, limit = request.num_prompt_tokens, schedule.capacity + 1
        if length > schedule.capacity:
            assert request.prompt_token_ids is not None  # embeddings are refused in the front end
            tokens = request.prompt_token_ids
            if self.config.sink_prompt == "truncate":
                stream.evicted = schedule.evicted(length)
                stream.evictions = schedule.evictions(length)
                cached = [tokens[p] for p in schedule.cached_positions(length)]
                show(request, stream, cached, (), limit)
            else:
                show(request, stream, (), tokens, limit)
            if self.hasher is not None and not request.skip_reading_prefix_cache:
                stream.prompt = array("i", tokens)
                self.unresolved.add(request.request_id)
            else:
                self._account(request.request_id, stream, stream.evictions)
        if self.hasher is not None:
            self.hasher.install(request, stream)

    def _schedule_of(self, request: Request) -> Schedule:
        """The server's schedule, or what the request asks for (checked by the front end)."""
        params = request.sampling_params
        extra_args = params.extra_args if params is not None else None
        return RequestPolicy.parse(extra_args, self.config) or self.config.schedule

    def extend(self, request: Request, tokens: list[int]) -> list[int]:
        """Take in the next input of a session, which goes on behind its computed tokens.

        Args:
            request: a session between two inputs; the token it sampled last is discarded by vLLM.
            tokens: what the client sends next, of any length.

        Returns:
            The start of ``tokens``, as much as the engine gets to see now.
        """
        stream = self.streams[request.request_id]
        if self.hasher is not None:
            self._drop_hashes(request, stream)
        room = stream.capacity + 1 - request.num_computed_tokens
        stream.pending = array("i", tokens[room:])
        stream.pending.reverse()
        if stream.chain_evictions:
            # The workers take a session's next input for a request at rope offset 0.
            self.dirty.add(request.request_id)
        return tokens[:room]

    def _drop_hashes(self, request: Request, stream: Stream) -> None:
        """Forget hashes of pages with tokens that are not computed, before vLLM drops them."""
        full = request.num_computed_tokens // self.tables.block_size
        if full >= len(request.block_hashes):
            return
        if full == 0 and stream.evicted_from_chain:
            self._stop_hashing(request)  # the parent of the dropped hash is not known any more
        else:
            del request.block_hashes[full:]
            stream.last_hash = request.block_hashes[-1] if full else None

    def close(self, request: Request) -> dict[str, int] | None:
        """Forget a request that ended; returns its account if it evicted anything."""
        stream = self.streams.pop(request.request_id)
        self.report_due.discard(request.request_id)
        self.dirty.discard(request.request_id)
        self.unresolved.discard(request.request_id)
        return stream.report(request) if stream.evictions else None

    def preempted(self, request: Request) -> None:
        """A request lost its pages: its survivors become the prompt of a stream of their own.

        They are recomputed as a dense prompt, at rope offset 0, and hashed as one.
        """
        stream = self.streams[request.request_id]
        self._moves.pop(request.request_id, None)
        stream.chain_evictions = stream.evicted_from_chain = 0
        if stream.evictions:
            # The workers must hear of it even if they never heard of the last eviction.
            self.dirty.add(request.request_id)
            if self.hasher is not None:
                self.hasher.install(request, stream)

    # -- eviction ---------------------------------------------------------------------------

    def is_full(self, request: Request) -> bool:
        """Whether the cache is full, one more token must be computed, and none is in flight."""
        capacity = self.streams[request.request_id].capacity
        return (
            request.num_computed_tokens == capacity
            and request.num_in_flight_tokens == 0
            and request.num_tokens > capacity
        )

    def evict(self, request: Request) -> bool:
        """Drop ``g`` tokens of a full stream; False, and nothing changed, when pages are short."""
        stream = self.streams[request.request_id]
        evictions = stream.chain_evictions + 1
        anchors = self.tables.anchors
        reanchor = anchors.reanchorings(evictions) > anchors.reanchorings(evictions - 1)
        change = self.tables.evict(
            request.request_id,
            stream.schedule,
            window_delta=-anchors.span if reanchor else 0,
            sink_delta=anchors.offset(evictions),
        )
        if change is None:
            return False
        self._apply(request, change)
        compact(request, stream)
        self.dirty.add(request.request_id)
        if self.hasher is not None:
            self._evict_hashes(request, stream.schedule)
        stream.reanchorings += reanchor
        self.stats.reanchorings += reanchor
        self._account(request.request_id, stream, 1)
        return True

    def _evict_hashes(self, request: Request, schedule: Schedule) -> None:
        assert self.hasher is not None
        if self.hasher.survives_eviction(schedule):
            pages = EvictionPages.of(schedule, self.tables.block_size)
            del request.block_hashes[pages.sink_full : pages.sink_full + pages.dropped]
            request.update_block_hashes()
        else:
            self._stop_hashing(request)

    def _stop_hashing(self, request: Request) -> None:
        request._block_hasher = None
        request.block_hashes.clear()
        self.tables.stop_hashing(request.request_id)

    # -- resuming from the prefix cache -----------------------------------------------------

    def resume(self, request: Request, reserved_pages: int) -> bool:
        """Start a waiting long prompt from cached sink pages and the cached window before the
        longest cached boundary; no page in between is needed.

        Args:
            request: a waiting request in ``unresolved``; a prompt is looked up once.
            reserved_pages: free pages that must be left for others.

        Returns:
            True if the request now holds pages and ``num_computed_tokens > 0``; False if it
            starts like any other request.
        """
        stream = self.streams[request.request_id]
        self.unresolved.discard(request.request_id)
        tokens, stream.prompt = stream.prompt, None
        assert tokens is not None
        assert self.hasher is not None
        schedule, block_size = stream.schedule, self.tables.block_size
        hashes = self.hasher.hashes(request, schedule, tokens)
        boundary = self.tables.find_resume(schedule, hashes, (len(tokens) - 1) // block_size)
        change = None
        if boundary is not None:
            change = self.tables.resume(
                request.request_id, schedule, hashes, boundary, reserved_pages
            )
        if boundary is None or change is None:
            self._account(request.request_id, stream, stream.evictions)
            return False
        computed = boundary * block_size
        evictions = self.tables.evictions_at(schedule, boundary)
        stream.evictions = stream.chain_evictions = evictions
        stream.evicted = stream.evicted_from_chain = evictions * schedule.stride
        stream.reanchorings = self.tables.anchors.reanchorings(evictions)
        stream.last_hash = hashes[boundary - 1]
        self.dirty.add(request.request_id)
        cached = [tokens[p] for p in schedule.cached_positions(computed + 1) if p < computed]
        show(request, stream, cached, tokens[computed:], schedule.capacity + 1)
        request.num_computed_tokens = len(cached)
        first = EvictionPages.of(schedule, block_size).sink_full
        kept = first + stream.evicted // block_size
        request.block_hashes[:] = [*hashes[:first], *hashes[kept:boundary]]
        request.update_block_hashes()
        if request.prefill_stats is not None:
            request.prefill_stats.set(
                num_prompt_tokens=len(tokens),
                num_local_cached_tokens=computed,
                num_external_cached_tokens=0,
            )
        self._apply(request, change)
        self.report_due.add(request.request_id)
        return True

    # -- the plan of a step -----------------------------------------------------------------

    def take_moves(self) -> list[PageMove]:
        """The page moves of the step that is being planned."""
        moves = [move for moves in self._moves.values() for move in moves]
        self._moves = {}
        return moves

    def release(self) -> None:
        """The step is planned: whatever takes the sources of its moves next is written after
        the moves ran, so they may go back to the pool."""
        if self._retained:
            self.tables.block_pool.free_blocks(self._retained)
            self._retained = []

    def take_stats(self) -> StreamingLLMStats:
        """What happened since the last call."""
        stats, self.stats = self.stats, StreamingLLMStats()
        return stats

    def _apply(self, request: Request, change: PageChange) -> None:
        self._moves[request.request_id] = change.moves
        self._retained += change.retained

    def _account(self, request_id: str, stream: Stream, evictions: int) -> None:
        """Count ``evictions`` that ``stream`` has just made, or skipped with their tokens."""
        if not evictions:
            return
        self.stats.streams += stream.evictions == evictions
        self.stats.evictions += evictions
        self.stats.tokens += evictions * stream.schedule.stride
        self.report_due.add(request_id)
        logged = self._evictions // _EVICTIONS_PER_LOG_LINE
        self._evictions += evictions
        if self._evictions // _EVICTIONS_PER_LOG_LINE > logged:
            logger.info(
                "StreamingLLM: %d evictions so far; %d streams are open.",
                self._evictions,
                len(self.streams),
            )
