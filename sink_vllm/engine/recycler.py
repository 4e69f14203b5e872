"""Evicts, resumes and recomputes streams: ties requests to their pages (engine core process)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from sink_vllm.engine.ahead import composable_at
from sink_vllm.engine.comeback import come_back, dropped_next, find, lose, wait_on
from sink_vllm.engine.hashing import PageHasher
from sink_vllm.engine.hibernation.kept import Hibernation
from sink_vllm.engine.parked import anchor_position, anchors_of, least_pages, take_parked
from sink_vllm.engine.stream import (
    Account,
    PendingTokens,
    Stream,
    as_array,
    compact,
    settle,
    show,
)
from sink_vllm.engine.tables import FoundPages, PageTables
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.request_options import RequestPolicy
from sink_vllm.policy.schedule import EvictionPages, Schedule


class Recycler:
    """All streams of one engine core.

    Who may hold pages, and when, is decided elsewhere (``admission``); who owns which page stands
    in the ledger of ``tables``.
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
        self.account = Account()
        self.hibernation: Hibernation | None = None
        """Pages outside the block pool, if any are kept."""
        self.streams: dict[str, Stream] = {}
        self.to_refresh: set[str] = set()
        """Requests the workers have an outdated copy of: sent again with their next tokens."""

    # -- requests come and go ---------------------------------------------------------------

    def prepare(self, request: Request) -> Stream:
        """The stream of a new request; of a long prompt, the engine gets to see the start only.

        In ``truncate`` mode it sees the survivors of the schedule instead, an ordinary dense
        prompt, and what the schedule would have evicted is never computed. Runs on vLLM's input
        thread: it changes ``request`` and nothing that the engine's loop changes.
        """
        schedule = self._schedule_of(request)
        stream = Stream(schedule, take_parked(request))
        stream.composable_at = composable_at(schedule, self.tables.block_size)
        length = request.num_prompt_tokens
        tokens: array[int] | None = None
        if length > schedule.capacity or stream.missing:
            assert request.prompt_token_ids is not None  # embeddings are refused in the front end
            tokens = as_array(request.prompt_token_ids)
            may_find = stream.parked is None or not stream.missing or stream.parked.parent
            if self.hasher is not None and not request.skip_reading_prefix_cache and may_find:
                stream.prompt = tokens
            self._show_prompt(request, stream, tokens)
        if self.hasher is not None:
            if stream.prompt is not None and stream.parked is not None and stream.missing:
                known = self.hasher.hashes_with_gap(request, schedule, stream.prompt, stream.parked)
                self._install(request, stream, known)
            elif stream.prompt is not None:
                hashes = self.hasher.hashes_of_prompt(
                    request,
                    schedule,
                    stream.prompt,
                    self.tables.num_sink_pages(schedule),
                    lambda first: self._has_sinks(schedule, first),
                )
                self._install(request, stream, hashes)
            else:
                self.hasher.install(request, stream)
        return stream

    def _has_sinks(self, schedule: Schedule, hashes: Sequence[BlockHash]) -> bool:
        if self.tables.has_sinks(schedule, hashes):
            return True
        sinks = hashes[: self.tables.num_sink_pages(schedule)]
        return self.hibernation is not None and self.hibernation.has_sinks(sinks)

    def _show_prompt(self, request: Request, stream: Stream, tokens: array[int]) -> None:
        length = len(tokens)
        if stream.parked is not None and stream.missing:
            length = stream.parked.known
            self._show_survivors(request, stream, tokens, length)
            stream.resumed_from = "survivors"
        elif self.config.sink_prompt == "truncate":
            self._show_survivors(request, stream, tokens, length)
        else:
            show(request, stream, (), tokens, 0)

    def _show_survivors(
        self, request: Request, stream: Stream, tokens: array[int], length: int
    ) -> None:
        """What the schedule leaves of the first tokens as one dense prompt, and what follows."""
        schedule, computed = stream.schedule, length + stream.missing
        stream.evicted += schedule.evicted(computed)
        stream.evictions += schedule.evictions(computed)
        show(request, stream, _cached(stream, tokens, computed, computed), tokens, length)

    def _install(self, request: Request, stream: Stream, hashes: Sequence[BlockHash]) -> None:
        """Hash what the engine sees of a prompt, whose hashes by stream position are known."""
        assert self.hasher is not None
        # The chain of survivors is not that of the stream.
        stream.prompt_hashes = [] if stream.skips else hashes
        self.hasher.install(request, stream)
        stream.prompt_hashes = hashes

    def _schedule_of(self, request: Request) -> Schedule:
        """The server's schedule, or what the request asks for (checked by the front end)."""
        params = request.sampling_params
        extra_args = params.extra_args if params is not None else None
        return RequestPolicy.parse(extra_args, self.config) or self.config.schedule

    def open(self, request: Request, stream: Stream) -> None:
        """Take in a request that was prepared."""
        self.streams[request.request_id] = stream
        if stream.parked is not None:
            self.account.due.add(request.request_id)  # whoever keeps the stream waits for it
        if stream.prompt is None:  # nothing that a look-up could change any more
            self._count(request, stream, stream.evictions - stream.evictions_before)

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
        assert not stream.pending, "a session is between two inputs"
        stream.pending = PendingTokens.of(tokens[room:])
        if stream.evictions:
            # The workers take a session's next input for a request at rope offset 0.
            self.to_refresh.add(request.request_id)
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

    def close(self, request: Request) -> dict[str, Any] | None:
        """Forget a request that ended; returns its account if it evicted anything, or is told."""
        stream = self.streams.pop(request.request_id)
        self.account.due.discard(request.request_id)
        self.to_refresh.discard(request.request_id)
        is_told = stream.evictions or stream.parked is not None
        return stream.report(request) if is_told else None

    def preempted(self, request: Request) -> None:
        """A request lost its pages: its survivors become the prompt of a stream of their own.

        They are recomputed as a dense prompt, at rope offset 0, and hashed as one; unless the
        pages are found when it is admitted again (``comeback``).
        """
        stream = self.streams[request.request_id]
        self.tables.ledger.cancel(request.request_id)
        if stream.parked is not None:
            self.account.due.add(request.request_id)
        if stream.evictions:
            if stream.chain_evictions:
                stream.is_lost = True
                stream.lost = lose(request, stream, self.tables.block_size)
            stream.rebuilt()
            # The workers must hear of it even if they never heard of the last eviction.
            self.to_refresh.add(request.request_id)
            if self.hasher is not None:
                self.hasher.install(request, stream)

    def parked(self, request: Request) -> None:
        """A session gave up its pages between two inputs: as if it were preempted, with nothing
        but its computed tokens."""
        settle(request, request.num_computed_tokens)
        if self.hasher is not None:
            self._drop_hashes(request, self.streams[request.request_id])
        request.num_computed_tokens = 0
        self.preempted(request)

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
        window_delta, sink_delta = self._next_deltas(stream)
        is_ahead = request.request_id in self.tables.ledger.ahead
        if self.hibernation is not None and not stream.chain_evictions:
            pages = EvictionPages.of(stream.schedule, self.tables.block_size)
            self.hibernation.keep_first(
                request, request.block_hashes[: pages.sink_full + pages.dropped]
            )
        moves = self.tables.evict(request.request_id, stream.schedule, window_delta, sink_delta)
        if moves is None:
            return False
        stream.dropped = dropped_next(request, stream, self.tables.block_size)
        reanchor = bool(window_delta)
        self.tables.ledger.plan(request.request_id, moves)
        compact(request, stream)
        self.to_refresh.add(request.request_id)
        if self.hasher is not None:
            self._evict_hashes(request, stream)
        stream.reanchorings += reanchor
        self.account.stats.reanchorings += reanchor
        self.account.stats.composed_ahead += is_ahead
        self._count(request, stream, not stream.repeats)
        stream.repeats = False
        return True

    def _next_deltas(self, stream: Stream) -> tuple[int, int]:
        """Rope positions by which the next eviction rotates the window and the pristine sinks."""
        evictions, anchors = stream.chain_evictions + 1, self.tables.anchors
        reanchor = anchors.reanchorings(evictions) > anchors.reanchorings(evictions - 1)
        return -anchors.span if reanchor else 0, anchors.offset(evictions)

    def reanchors_next(self, request: Request) -> bool:
        """Whether the next eviction of a stream rotates all of its window."""
        window_delta, _ = self._next_deltas(self.streams[request.request_id])
        return bool(window_delta)

    def compose_ahead(self, request: Request, most: int) -> int:
        """Compose pages for the next eviction of a stream with ``composable_at`` cached tokens.

        Returns:
            The free pages it took, at most ``most``.
        """
        stream, ledger = self.streams[request.request_id], self.tables.ledger
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        before = len(ledger.ahead)
        moves = self.tables.compose_ahead(
            request.request_id, stream.schedule, computed, most, *self._next_deltas(stream)
        )
        if moves:
            ledger.plan(request.request_id, moves)
        return len(ledger.ahead) - before

    def give_back_ahead(self) -> None:
        """Somebody needs pages: all that were composed ahead go back to the pool."""
        ledger = self.tables.ledger
        for request_id in ledger.ahead.streams:
            ledger.cancel(request_id)  # planned in this step, it would write into somebody's page
            ledger.ahead.give_back(request_id)

    def _evict_hashes(self, request: Request, stream: Stream) -> None:
        assert self.hasher is not None
        schedule, size = stream.schedule, self.tables.block_size
        if request._block_hasher is not None and self.hasher.survives_eviction(schedule):
            pages = EvictionPages.of(schedule, size)
            begin, end = pages.sink_full, pages.sink_full + pages.dropped
            stream.sinks = stream.sinks or request.block_hashes[: pages.sinks]
            if stream.parked is not None:
                position = anchor_position(schedule, stream.chain_evictions, size)
                stream.anchors.append((position, request.block_hashes[end - 1]))
            if self.hibernation is not None:
                self.hibernation.pass_by(request.block_hashes[begin:end])
            del request.block_hashes[begin:end]
            request.update_block_hashes()
        else:
            self._stop_hashing(request)

    def _stop_hashing(self, request: Request) -> None:
        request._block_hasher = None
        request.block_hashes.clear()
        self.streams[request.request_id].forget_anchors()
        self.tables.stop_hashing(request.request_id)

    # -- resuming from the prefix cache -----------------------------------------------------

    def look_up(self, request: Request) -> FoundPages | None:
        """Cached sink pages and the cached window before the longest cached boundary of a waiting
        long prompt, or of a stream that lost its pages: it can start from them, no page in between
        is needed. Changes nothing."""
        stream = self.streams[request.request_id]
        if stream.lost is not None:
            return find(request, stream, stream.lost, self.tables)
        if stream.prompt is None:
            return None
        size = self.tables.block_size
        return self.tables.find_resume(
            stream.schedule,
            stream.prompt_hashes,
            (len(stream.prompt) + stream.missing - 1) // size,
            least_pages(stream.schedule, stream.parked, size),
        )

    def show_resumed(self, request: Request, found: FoundPages) -> int:
        """Let the engine see a waiting request as it will be when it is resumed.

        Returns:
            Its cached tokens.
        """
        stream = self.streams[request.request_id]
        assert self.hasher is not None
        if stream.lost is not None:
            return come_back(request, stream, stream.lost, self.hasher, found, self.tables)
        assert stream.prompt is not None
        schedule, tokens = stream.schedule, stream.prompt
        size = self.tables.block_size
        computed = found.end * size
        evictions = self.tables.evictions_at(schedule, found.end)
        stream.restart()
        stream.chain_evictions = evictions
        stream.evicted_from_chain = evictions * schedule.stride
        stream.evictions += evictions
        stream.evicted += stream.evicted_from_chain
        stream.reanchorings = self.tables.anchors.reanchorings(evictions)
        cached = _cached(stream, tokens, computed + 1, computed)
        show(request, stream, cached, tokens, computed - stream.missing)
        hashes = stream.prompt_hashes
        stream.sinks = hashes[: self.tables.num_sink_pages(schedule)]
        if stream.parked is not None:
            stream.anchors.extend(anchors_of(schedule, stream.parked, hashes, evictions, size))
            stream.resumed_from = stream.brought_from or "cache"
        self.hasher.resume(request, stream, found.end)
        return len(cached)

    def show_whole(self, request: Request) -> None:
        """Take :meth:`show_resumed` back: the request waits on, as if it had not been found."""
        stream = self.streams[request.request_id]
        if stream.lost is not None:
            assert self.hasher is not None
            wait_on(request, stream, stream.lost, self.tables)
            self.hasher.install(request, stream)
            return
        self.to_refresh.discard(request.request_id)
        assert stream.prompt is not None
        stream.restart()
        stream.resumed_from = None
        hashes = stream.prompt_hashes
        stream.rebuilt()
        self._show_prompt(request, stream, stream.prompt)
        self._install(request, stream, hashes)

    def resume(self, request: Request, found: FoundPages) -> None:
        """Give an admitted request the pages it starts from."""
        stream = self.streams[request.request_id]
        moves = self.tables.resume(request.request_id, stream.schedule, found)
        self.tables.ledger.plan(request.request_id, moves)
        self.to_refresh.add(request.request_id)

    def started(self, request: Request, *, resumed: bool) -> None:
        """A request runs: its prompt, or what it lost, is not looked up any more."""
        stream = self.streams[request.request_id]
        if stream.is_lost:
            stream.is_lost, stream.lost = False, None
            stream.rebuilds += not resumed
            self.account.due.add(request.request_id)
        if stream.prompt is None:
            return
        if resumed:
            self.account.resumed(request.request_id)
        else:
            self._count(request, stream, stream.evictions - stream.evictions_before)
            if stream.skips:
                stream.prompt_hashes = []
        stream.prompt = None

    def _count(self, request: Request, stream: Stream, evictions: int) -> None:
        self.account.evicted(request.request_id, stream, evictions, len(self.streams))


def _cached(stream: Stream, tokens: array[int], seen: int, computed: int) -> list[int]:
    """The first ``computed`` tokens of a chain that are cached when ``seen`` are asked for.

    Args:
        stream: of the chain.
        tokens: its prompt, without those that are missing.
        seen: ``computed``, or one more if the next one finds the cache full.
        computed: tokens of the chain.
    """
    sinks = stream.schedule.sink_tokens
    positions = stream.schedule.cached_positions(seen)
    return [tokens[p if p < sinks else p - stream.missing] for p in positions if p < computed]
