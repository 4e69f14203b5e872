"""A stream in the engine core: its state beyond vLLM's ``Request``, and the surgery on that.

What one eviction does to a request, with ``S = 2``, ``g = 3``; tokens ``p`` of the prompt, ``o`` of
the output, and ``q`` of the prompt that the engine has not seen yet (*pending*)::

    before   p0 p1 | p2 p3 o0 | o1 o2 o3            num_computed_tokens = C
             sinks   evicted    window
    after    p0 p1 | o1 o2 o3                        num_computed_tokens = C - g

    num_prompt  4 -> 2      prompt tokens that are still there, sinks first
    first_output  0 -> 0    output tokens among the sinks, which stay
    dropped_outputs = 1     max_tokens and min_tokens shrink by as many

A prompt longer than ``C`` comes in by ``g`` tokens with each eviction, instead of the output.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from sink_vllm.engine.output_tail import keep_evicted
from sink_vllm.engine.parked import ANCHORS, Dropped, Lost, told
from sink_vllm.policy.parked import CHAIN, Parked, ResumedFrom
from sink_vllm.policy.schedule import Schedule
from sink_vllm.policy.stats import StreamingLLMStats

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_TRIM = 1 << 16  # tokens that were taken and are still held, at most (or half of all)
_PIECE = 1 << 14  # tokens; a third of a millisecond
BREATH = 1e-4
"""Seconds to sleep between pieces of long work beside the engine's loop: it wants the interpreter,
too, and would wait for a time slice of the thread that works, which is longer than a piece."""
_EVICTIONS_PER_LOG_LINE = 1000


def as_array(tokens: Sequence[int]) -> array[int]:
    """``tokens`` at 4 bytes each; in pieces, because one call would keep other threads waiting."""
    made = array("i")
    for begin in range(0, len(tokens), _PIECE):
        made.extend(tokens[begin : begin + _PIECE])
        if begin:
            time.sleep(BREATH)
    return made


class PendingTokens:
    """The rest of a prompt, taken from its start; 4 bytes a token.

    Several may share one array, which none of them changes: a prompt that is looked at again from
    another position costs nothing.
    """

    __slots__ = ("_at", "_tokens")

    def __init__(self, tokens: array[int] | None = None, at: int = 0) -> None:
        """``tokens[at:]``; nothing by default."""
        self._tokens = array("i") if tokens is None else tokens
        self._at = min(at, len(self._tokens))

    @classmethod
    def of(cls, tokens: Sequence[int]) -> PendingTokens:
        return cls(array("i", tokens))

    def __len__(self) -> int:
        return len(self._tokens) - self._at

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens[self._at :])

    def take(self, count: int) -> list[int]:
        """The next ``count`` tokens, or what is left."""
        taken = self._tokens[self._at : self._at + count].tolist()
        self._at += len(taken)
        if self._at > _TRIM and 2 * self._at > len(self._tokens):
            self._tokens, self._at = self._tokens[self._at :], 0
        elif self._at == len(self._tokens):
            self._tokens, self._at = array("i"), 0
        return taken


@dataclass(slots=True)
class Stream:
    """What the scheduler knows of a request beyond its cache; all counts in tokens."""

    schedule: Schedule
    parked: Parked | None = None
    """What a stored stream says of the part of it that is not in the prompt."""
    pending: PendingTokens = field(default_factory=PendingTokens)
    """Prompt tokens the engine has not seen yet."""
    prompt: array[int] | None = None
    """The whole prompt, until the request is admitted (long prompts that are looked up only)."""
    prompt_hashes: Sequence[BlockHash] = field(default_factory=list)
    """Of the first pages of the prompt, by stream position; of all its full pages if its sink
    pages were in the prefix cache when it arrived. Counted from ``base`` on, as all of a chain."""
    evicted: int = 0
    """Stream position minus cache position of every window token."""
    evictions: int = 0
    reanchorings: int = 0
    is_lost: bool = False
    """Whether it waits without the pages it had after evictions."""
    lost: Lost | None = None
    """What those can be found by, if that is known."""
    dropped: Dropped | None = None
    """By the last eviction of the chain, of a session."""
    repeats: bool = False
    """Whether its next eviction has been made and counted before (``comeback``)."""
    rebuilds: int = 0
    """How often it was computed again from the tokens left in its cache: keys, and the states of
    recurrent layers, have lost what they knew of evicted ones."""
    chain_evictions: int = 0
    """Evictions since the cache was last built from its first token: all, unless preempted."""
    evicted_from_chain: int = 0
    last_hash: BlockHash | None = None
    """Hash of the last full page; goes on being the parent when its page is evicted."""
    sinks: Sequence[BlockHash] = ()
    """Hashes of the sink pages, of a stored stream that has evicted."""
    anchors: deque[tuple[int, BlockHash]] = field(default_factory=lambda: deque(maxlen=ANCHORS))
    """Where the last windows of a stored stream began, as ``policy.parked`` tells it."""
    resumed_from: ResumedFrom | None = None
    brought_from: Literal["host", "disk"] | None = None
    """Where pages were that it can start from, if not all of them were in the prefix cache."""
    capacity: int = field(init=False)
    """Of the schedule; read several times per step and stream."""
    composable_at: int = field(init=False)
    """Cached tokens from which on its next head page may be composed; at most the capacity."""

    def __post_init__(self) -> None:
        self.capacity = self.composable_at = self.schedule.capacity
        self.restart()

    def restart(self) -> None:
        """Nothing is evicted but what was when this request came."""
        self.evicted = 0 if self.parked is None else self.parked.base
        self.evictions = self.evicted // self.schedule.stride
        self.reanchorings = 0

    @property
    def missing(self) -> int:
        """Tokens between the sinks and the rest of the prompt that are not in it."""
        return 0 if self.parked is None else self.parked.missing

    @property
    def skips(self) -> bool:
        """Whether the cache is built of survivors, not from the start of the chain."""
        return self.evicted > (0 if self.parked is None else self.parked.base)

    @property
    def evictions_before(self) -> int:
        """Of the stream, when this request came."""
        if self.parked is None:
            return 0
        before = self.parked.base // self.schedule.stride
        if self.missing:
            before += self.schedule.evictions(self.parked.known + self.missing)
        return before

    def report(self, request: Request) -> dict[str, Any]:
        """The machine-readable account that goes into the response."""
        report: dict[str, Any] = {
            "evicted_tokens": self.evicted,
            "stream_position": self.evicted + request.num_tokens + len(self.pending),
            "evictions": self.evictions,
            "rope_reanchorings": self.reanchorings,
        }
        if self.rebuilds:
            report["rebuilds"] = self.rebuilds
        if self.parked is not None:
            base = self.evicted - self.evicted_from_chain
            resumed_from = self.resumed_from or self.brought_from
            report[CHAIN] = told(base, self.anchors, self.sinks, resumed_from)
        return report

    def rebuilt(self) -> None:
        """The cache is built anew, from the tokens in it as a prompt of its own."""
        self.chain_evictions = self.evicted_from_chain = 0
        self.last_hash = self.dropped = None
        self.prompt_hashes = []
        self.forget_anchors()

    def forget_anchors(self) -> None:
        """The pages of this chain cannot be found again."""
        self.anchors.clear()
        self.sinks = ()


def show(
    request: Request, stream: Stream, cached: Sequence[int], tokens: array[int], seen: int
) -> None:
    """Give the engine a prompt of at most ``C + 1`` tokens: ``cached`` and then ``tokens[seen:]``.

    The engine sees at most ``C + 1`` prompt tokens at once: enough to know that a chunk ending at
    ``C`` is not the last one (so nothing is sampled), and no more than its buffers hold. What it
    cannot see yet waits in the stream. ``prompt_token_ids``, which the workers of an in-process
    engine alias, is replaced; the list behind vLLM's read-only view changes in place.
    """
    end = seen + stream.capacity + 1 - len(cached)
    visible = [*cached, *tokens[seen:end]]
    stream.pending = PendingTokens(tokens, end)
    request.prompt_token_ids = visible
    request.num_prompt_tokens = len(visible)
    request._all_token_ids[:] = visible


def settle(request: Request, tokens: int) -> None:
    """Make the first ``tokens`` of ``request`` its prompt and forget what comes behind them.

    What a streaming-input session does with its computed tokens when its next input arrives.
    """
    del request._all_token_ids[tokens:]
    request._output_token_ids.clear()
    request.prompt_token_ids = list(request._all_token_ids)
    request.num_prompt_tokens = tokens


def compact(request: Request, stream: Stream) -> None:
    """Drop the ``g`` tokens after the sinks from ``request``, and let pending prompt tokens in.

    Counters that vLLM compares with the lengths of the token lists shrink with them, so that the
    client's own limits (``max_tokens``, ``min_tokens``) keep their meaning.
    """
    schedule = stream.schedule
    assert request.prompt_token_ids is not None
    begin, end = schedule.sink_tokens, schedule.sink_tokens + schedule.stride
    num_prompt = request.num_prompt_tokens
    prompt_end = min(end, num_prompt)
    dropped_outputs = end - max(begin, prompt_end)

    prompt = request.prompt_token_ids[:begin] + request.prompt_token_ids[prompt_end:]
    del request._all_token_ids[begin:end]
    first_output = max(begin - num_prompt, 0)
    params = request.sampling_params
    if dropped_outputs and params is not None and params.repetition_detection is not None:
        keep_evicted(request, params.repetition_detection, first_output, dropped_outputs)
    del request._output_token_ids[first_output : first_output + dropped_outputs]
    if stream.pending:
        arrivals = stream.pending.take(schedule.stride)
        prompt.extend(arrivals)
        request._all_token_ids.extend(arrivals)
    request.prompt_token_ids = prompt
    request.num_prompt_tokens = len(prompt)
    request.num_computed_tokens -= schedule.stride
    request.max_tokens -= dropped_outputs
    if params is not None and params.min_tokens and dropped_outputs:
        params = copy(params)
        params.min_tokens = max(params.min_tokens - dropped_outputs, 0)
        request.sampling_params = params
    stream.evicted += schedule.stride
    stream.evictions += 1
    stream.evicted_from_chain += schedule.stride
    stream.chain_evictions += 1


class Account:
    """Evictions of all streams of an engine core."""

    def __init__(self) -> None:
        self.stats = StreamingLLMStats()
        self.due: set[str] = set()
        """Requests whose next output should tell the client what was evicted."""
        self._evictions = 0

    def evicted(self, request_id: str, stream: Stream, evictions: int, open_streams: int) -> None:
        """``stream`` has just made ``evictions``, or skipped them with their tokens."""
        if not evictions:
            return
        self.stats.streams += stream.evictions == evictions
        self.stats.evictions += evictions
        self.stats.tokens += evictions * stream.schedule.stride
        self.due.add(request_id)
        logged = self._evictions // _EVICTIONS_PER_LOG_LINE
        self._evictions += evictions
        if self._evictions // _EVICTIONS_PER_LOG_LINE > logged:
            logger.info(
                "StreamingLLM: %d evictions so far; %d streams are open.",
                self._evictions,
                open_streams,
            )

    def resumed(self, request_id: str) -> None:
        """A stream goes on from cached pages; its client should know where it stands."""
        self.stats.resumed += 1
        self.due.add(request_id)

    def take_stats(self) -> StreamingLLMStats:
        """What happened since the last call."""
        stats, self.stats = self.stats, StreamingLLMStats()
        return stats
