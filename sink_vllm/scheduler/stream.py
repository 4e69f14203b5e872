"""Per-request state of the policy in the scheduler, and the surgery on vLLM's ``Request``."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import Request

from sink_vllm.config import PromptMode
from sink_vllm.schedule import Schedule


@dataclass(slots=True)
class Stream:
    """What the scheduler knows of a request beyond its cache; all counts in tokens."""

    pending: array[int] = field(default_factory=lambda: array("i"))
    """Prompt tokens the engine has not seen yet, last one first."""
    evicted: int = 0
    """Stream position minus cache position of every window token."""
    evictions: int = 0
    reanchorings: int = 0
    rope_offset: int = 0
    dirty: bool = False
    """The workers' copy of the token list is out of date: send it again with the next tokens."""
    block_hasher: Callable[[Request], list[Any]] | None = None
    """The request's own hasher, taken away while its pages are no prefix of anything."""

    def report(self, request: Request) -> dict[str, int]:
        """The machine-readable account that goes into the response."""
        return {
            "evicted_tokens": self.evicted,
            "stream_position": self.evicted + request.num_tokens + len(self.pending),
            "evictions": self.evictions,
            "rope_reanchorings": self.reanchorings,
        }


def open_stream(request: Request, schedule: Schedule, mode: PromptMode) -> Stream:
    """Cut the prompt of a new request down to what the engine may see at once.

    The engine sees at most ``C + 1`` prompt tokens: enough to know that a chunk ending at ``C``
    is not the last one (so nothing is sampled), and no more than its buffers hold. The rest waits
    in the stream, or, in ``truncate`` mode, is never computed: the survivors of the schedule are
    then an ordinary dense prompt.
    """
    stream = Stream()
    length = request.num_prompt_tokens
    if length <= schedule.capacity:
        return stream
    assert request.prompt_token_ids is not None  # prompt embeddings are refused in the front end
    tokens = request.prompt_token_ids
    if mode == "truncate":
        stream.evicted = schedule.evicted(length)
        stream.evictions = schedule.evictions(length)
        head = schedule.sink_tokens
        visible = tokens[:head] + tokens[head + stream.evicted :]
    else:
        visible = tokens[: schedule.capacity + 1]
        stream.pending = array("i", tokens[schedule.capacity + 1 :])
        stream.pending.reverse()
    request.prompt_token_ids = visible
    request.num_prompt_tokens = len(visible)
    request._all_token_ids[:] = visible
    rehash(request)
    return stream


def rehash(request: Request) -> None:
    """Hash the pages of the request's present token list from scratch."""
    request.block_hashes.clear()
    request.update_block_hashes()


def compact(request: Request, stream: Stream, schedule: Schedule) -> None:
    """Drop the ``g`` tokens after the sinks from ``request``, and let pending prompt tokens in.

    Counters that vLLM compares with the lengths of the token lists shrink with them, so that the
    client's own limits (``max_tokens``, ``min_tokens``) keep their meaning. The token lists that
    vLLM shares as read-only views change in place; ``prompt_token_ids``, which the workers of an
    in-process engine alias, is replaced.
    """
    assert request.prompt_token_ids is not None
    begin, end = schedule.sink_tokens, schedule.sink_tokens + schedule.stride
    num_prompt = request.num_prompt_tokens
    prompt_end = min(end, num_prompt)
    dropped_outputs = end - max(begin, prompt_end)

    prompt = request.prompt_token_ids[:begin] + request.prompt_token_ids[prompt_end:]
    del request._all_token_ids[begin:end]
    first_output = max(begin - num_prompt, 0)
    del request._output_token_ids[first_output : first_output + dropped_outputs]
    if stream.pending:
        arrivals = stream.pending[-schedule.stride :]
        del stream.pending[-schedule.stride :]
        arrivals.reverse()
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
    stream.dirty = True
