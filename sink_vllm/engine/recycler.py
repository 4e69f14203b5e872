"""Evicts and resumes streams: ties requests to their pages (engine core process)."""

from __future__ import annotations

from vllm.v1.request import Request

from sink_vllm.engine.comeback import come_back, dropped_next, find, wait_on
from sink_vllm.engine.open_streams import OpenStreams, cached_tokens
from sink_vllm.engine.parked import anchor_position, anchors_of, least_pages
from sink_vllm.engine.stream import Stream, compact, show
from sink_vllm.engine.tables import FoundPages
from sink_vllm.policy.schedule import EvictionPages, Schedule, cdiv

_CHECKPOINT = 65_536
"""Tokens of one request after which its window goes to disk ..."""
_CHECKPOINT_CAPACITIES = 16
"""... but at most one page in so many is written for it."""


def evictions_between_checkpoints(schedule: Schedule) -> int:
    """Evictions of one request after which it is kept on disk what it could be resumed from."""
    tokens = max(_CHECKPOINT, _CHECKPOINT_CAPACITIES * schedule.capacity)
    return cdiv(tokens, schedule.stride)


class Recycler(OpenStreams):
    """Gives streams pages and takes them."""

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
        self._keep(request, stream)
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

    def _keep(self, request: Request, stream: Stream) -> None:
        """Keep pages outside the pool that will be there no more when the request ends, or that it
        could be resumed from if the server ends first."""
        if self.hibernation is None:
            return
        schedule = stream.schedule
        if not stream.chain_evictions:
            pages = EvictionPages.of(schedule, self.tables.block_size)
            self.hibernation.keep_first(
                request, request.block_hashes[: pages.sink_full + pages.dropped]
            )
        elif stream.chain_evictions % evictions_between_checkpoints(schedule) == 0:
            self.hibernation.keep_checkpoint(request)

    def _next_deltas(self, stream: Stream) -> tuple[int, int]:
        """Rope positions by which the next eviction rotates the window and the pristine sinks."""
        evictions, anchors = stream.chain_evictions + 1, self.tables.anchors
        return -anchors.span if anchors.reanchors(evictions) else 0, anchors.offset(evictions)

    def reanchors_next(self, request: Request) -> bool:
        """Whether the next eviction of a stream rotates all of its window."""
        evictions = self.streams[request.request_id].chain_evictions + 1
        return self.tables.anchors.reanchors(evictions)

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
        cached = cached_tokens(stream, tokens, computed + 1, computed)
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
