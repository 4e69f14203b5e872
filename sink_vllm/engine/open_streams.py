"""The streams of an engine core as their requests come, go and lose their pages."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from sink_vllm.engine.ahead import composable_at
from sink_vllm.engine.comeback import lose
from sink_vllm.engine.hashing import PageHasher
from sink_vllm.engine.hibernation.kept import Hibernation
from sink_vllm.engine.parked import take_parked
from sink_vllm.engine.stream import (
    Account,
    PendingTokens,
    Stream,
    as_array,
    settle,
    show,
)
from sink_vllm.engine.tables import PageTables
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.request_options import RequestPolicy
from sink_vllm.policy.schedule import Schedule


class OpenStreams:
    """All streams of one engine core.

    What becomes of their pages is the business of ``Recycler``. Who may hold pages, and when, is
    decided elsewhere (``admission``); who owns which page stands in the ledger of ``tables``.
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
        show(request, stream, cached_tokens(stream, tokens, computed, computed), tokens, length)

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

    def _stop_hashing(self, request: Request) -> None:
        request._block_hasher = None
        request.block_hashes.clear()
        self.streams[request.request_id].forget_anchors()
        self.tables.stop_hashing(request.request_id)

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

    def _count(self, request: Request, stream: Stream, evictions: int) -> None:
        self.account.evicted(request.request_id, stream, evictions, len(self.streams))


def cached_tokens(stream: Stream, tokens: array[int], seen: int, computed: int) -> list[int]:
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
