"""Per-request state of the policy in the scheduler, and the surgery on vLLM's ``Request``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from sink_vllm.engine.output_tail import keep_evicted
from sink_vllm.engine.pending import PendingTokens
from sink_vllm.policy.schedule import Schedule


@dataclass(slots=True)
class Stream:
    """What the scheduler knows of a request beyond its cache; all counts in tokens."""

    schedule: Schedule
    pending: PendingTokens = field(default_factory=PendingTokens)
    """Prompt tokens the engine has not seen yet."""
    prompt: array[int] | None = None
    """The whole prompt, until the request is admitted (long prompts that are looked up only)."""
    prompt_hashes: list[BlockHash] = field(default_factory=list)
    """Of the first pages of the prompt, by stream position; of all its full pages if its sink
    pages were in the prefix cache when it arrived."""
    evicted: int = 0
    """Stream position minus cache position of every window token."""
    evictions: int = 0
    reanchorings: int = 0
    chain_evictions: int = 0
    """Evictions since the cache was last built from its first token: all, unless preempted."""
    evicted_from_chain: int = 0
    last_hash: BlockHash | None = None
    """Hash of the last full page; goes on being the parent when its page is evicted."""
    capacity: int = field(init=False)
    """Of the schedule; read several times per step and stream."""

    def __post_init__(self) -> None:
        self.capacity = self.schedule.capacity

    def report(self, request: Request) -> dict[str, int]:
        """The machine-readable account that goes into the response."""
        return {
            "evicted_tokens": self.evicted,
            "stream_position": self.evicted + request.num_tokens + len(self.pending),
            "evictions": self.evictions,
            "rope_reanchorings": self.reanchorings,
        }

    def rebuilt(self) -> None:
        """The cache is built anew, from the tokens in it as a prompt of its own."""
        self.chain_evictions = self.evicted_from_chain = 0
        self.last_hash = None
        self.prompt_hashes = []


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
    if dropped_outputs:
        keep_evicted(request, first_output, dropped_outputs)
    del request._output_token_ids[first_output : first_output + dropped_outputs]
    if stream.pending:
        arrivals = stream.pending.take(schedule.stride)
        prompt.extend(arrivals)
        request._all_token_ids.extend(arrivals)
    request.prompt_token_ids = prompt
    request.num_prompt_tokens = len(prompt)
    request.num_computed_tokens -= schedule.stride
    request.max_tokens -= dropped_outputs
    params = request.sampling_params
    if params is not None and params.min_tokens and dropped_outputs:
        params = copy(params)
        params.min_tokens = max(params.min_tokens - dropped_outputs, 0)
        request.sampling_params = params
    stream.evicted += schedule.stride
    stream.evictions += 1
    stream.evicted_from_chain += schedule.stride
    stream.chain_evictions += 1
