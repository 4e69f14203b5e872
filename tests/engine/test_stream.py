"""Surgery on vLLM's ``Request``: what a compacted request looks like, token by token."""

import random
from array import array

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from sink_vllm.engine.stream import PendingTokens, Stream, compact, show
from sink_vllm.policy.schedule import Schedule

GRID = [
    (sinks, window, stride, prompt)
    for sinks in (0, 1, 4, 9)
    for window in (1, 5)
    for stride in (2, 6)
    for prompt in (1, 3, 8, 11, 12, 13, 14, 40)
]


def open_stream(request: Request, schedule: Schedule, mode: str) -> Stream:
    """What the recycler does with a prompt longer than the capacity."""
    stream = Stream(schedule)
    tokens = array("i", request.prompt_token_ids or [])
    if len(tokens) > schedule.capacity and mode == "stream":
        show(request, stream, (), tokens, 0)
    elif len(tokens) > schedule.capacity:
        stream.evicted = schedule.evicted(len(tokens))
        stream.evictions = schedule.evictions(len(tokens))
        cached = [tokens[p] for p in schedule.cached_positions(len(tokens))]
        show(request, stream, cached, tokens, len(tokens))
    return stream


@pytest.mark.parametrize("mode", ["stream", "truncate"])
@pytest.mark.parametrize(("sinks", "window", "stride", "prompt_len"), GRID)
def test_token_lists_are_the_cached_tokens(
    sinks: int, window: int, stride: int, prompt_len: int, mode: str
) -> None:
    """After every token, prompt and output lists are the cached tokens of the schedule, split
    where the client's prompt ended, and the counters say what the client asked for."""
    schedule = Schedule(sink_tokens=sinks, window=window, stride=stride)
    rng = random.Random(sinks * 1000 + window * 100 + stride * 10 + prompt_len)
    tokens = [rng.randrange(1000) for _ in range(prompt_len + 30)]
    max_tokens = 1000
    params = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens)
    request = Request("r", tokens[:prompt_len], params, None)
    stream = open_stream(request, schedule, mode)
    aliased = request.prompt_token_ids
    snapshot = list(aliased or ())
    computed = stream.evicted if mode == "truncate" else 0
    while computed < len(tokens):
        if request.num_computed_tokens == schedule.capacity:
            compact(request, stream)
        request.num_computed_tokens += 1
        computed += 1
        if computed >= prompt_len and request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(tokens[computed] if computed < len(tokens) else 0)
        if computed < prompt_len:
            assert request.num_tokens > request.num_computed_tokens  # nothing may be sampled
            continue
        cached = schedule.cached_positions(computed)
        assert len(cached) == request.num_computed_tokens <= schedule.capacity
        wanted_prompt = [tokens[p] for p in cached if p < prompt_len]
        wanted_output = [tokens[p] for p in cached if p >= prompt_len]
        assert request.prompt_token_ids == wanted_prompt
        assert request.num_prompt_tokens == len(wanted_prompt)
        assert list(request.output_token_ids[:-1]) == wanted_output
        assert list(request.all_token_ids) == [*wanted_prompt, *request.output_token_ids]
        generated = computed + 1 - prompt_len
        assert request.max_tokens - request.num_output_tokens == max_tokens - generated
        assert request.sampling_params is not None
        assert request.sampling_params.min_tokens == request.max_tokens
        assert stream.report(request)["stream_position"] == computed + 1
        assert stream.evicted == schedule.evicted(computed)
    assert not stream.pending
    assert params.min_tokens == max_tokens  # the client's own object is left alone
    assert aliased == snapshot  # so is the list the workers may hold
    assert stream.evictions > 0


@pytest.mark.parametrize("prompt_len", [13, 14, 100])
def test_a_long_prompt_is_never_visible_at_once(prompt_len: int) -> None:
    """The engine's buffers hold ``C + 1`` tokens; what is not visible yet is kept, in order."""
    schedule = Schedule(sink_tokens=2, window=6, stride=4)
    tokens = list(range(prompt_len))
    request = Request("r", tokens, SamplingParams(max_tokens=3), None)
    stream = open_stream(request, schedule, "stream")
    assert request.num_tokens == schedule.capacity + 1 == 13
    assert [*request.all_token_ids, *stream.pending] == tokens


def test_pending_tokens_are_taken_in_order_and_given_up() -> None:
    """Pieces of any size; what was taken is let go of before it is most of a long prompt."""
    tokens = array("i", range(300_000))
    pending, other = PendingTokens(tokens, 5), PendingTokens(tokens, 299_999)
    rng, taken = random.Random(1), [0, 1, 2, 3, 4]
    while pending:
        taken += pending.take(rng.randint(1, 5_000))
        assert len(pending) == len(tokens) - len(taken)
        assert len(pending._tokens) <= max(2 * len(pending), 70_000 + len(pending))
    assert taken == list(tokens)
    assert other.take(7) == [299_999]
    assert pending.take(3) == []
    assert len(pending._tokens) == 0
