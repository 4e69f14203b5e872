"""Whatever a streamed response accumulates in the front end stays bounded."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest
import torch
from vllm import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason, detokenizer
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

from sink_vllm.server import response_state
from sink_vllm.server.memory import adopt
from sink_vllm.server.prompts import ToldPrompt
from sink_vllm.server.response_state import EndlessRequestState
from sink_vllm.server.withheld import GIVE_UP_AFTER
from tests.support.outputs import POLICY, Processor, byte_fallback, byte_level, params

LENGTH = 200_000


_SHARED = ("tokenizer", "added_token_ids")  # by all requests


def state_size(state: RequestState) -> int:
    """Items in all containers and characters in all texts that belong to one request."""
    seen: set[int] = set()
    total, stack = 0, [cast(Any, state)]
    while stack:
        item = stack.pop()
        nothing = (type, torch.Tensor, ToldPrompt)
        if id(item) in seen or isinstance(item, nothing) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            total += len(item)
            stack += item.values()
        elif isinstance(item, Iterable) and hasattr(item, "__len__"):
            total += len(item)  # type: ignore[arg-type]
            stack += item
        elif hasattr(item, "__dict__"):
            stack += (value for name, value in vars(item).items() if name not in _SHARED)
    return total


def text() -> Iterator[int]:
    """Words, and now and then a character in pieces."""
    rng = random.Random(0)
    while True:
        yield from (rng.randrange(97, 123) for _ in range(rng.randrange(2, 9)))
        yield from (0xE2, 0x82, 0xAC) if rng.random() < 0.1 else (0x20,)


def repeated(*tokens: int) -> Iterator[int]:
    while True:
        yield from tokens


CASES: dict[str, tuple[Callable[[], Iterator[int]], dict[str, Any]]] = {
    "text": (text, {}),
    "stop strings": (text, {"stop": ["never seen in this text", "nor this"]}),
    "logprobs": (text, {"logprobs": 1}),
    "flat logprobs": (text, {"logprobs": 1, "flat_logprobs": True}),
    "no text wanted": (text, {"detokenize": False}),
    "stray bytes": (lambda: repeated(0x80), {}),
    "unfinished characters": (lambda: repeated(0xE2, 0x82), {}),
    "skipped special tokens": (lambda: repeated(byte_level().eos_token_id), {}),
}


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_state_of_an_endless_response_is_bounded(case: str, interval: int) -> None:
    tokens, given = CASES[case]
    request = Processor(byte_level(), params(**given), ours=True, stream_interval=interval)
    length = LENGTH if case == "text" and interval == 1 else LENGTH // 10

    largest = 0
    for index, token in zip(range(length), tokens(), strict=False):
        request.step([token])
        if index % 997 == 0:
            largest = max(largest, state_size(request.state))

    assert request.state.detokenizer is not None
    assert request.state.detokenizer.num_output_tokens() == length
    assert largest < 4000, "items and characters"


def test_size_sees_what_vllm_accumulates() -> None:
    """The measure of the tests above does grow with vLLM's own classes."""
    request = Processor(byte_level(), params(logprobs=1), ours=False)

    for _, token in zip(range(5000), text(), strict=False):
        request.step([token])

    assert state_size(request.state) > 20_000


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("case", ["text", "logprobs", "stray bytes"])
def test_time_per_token_is_flat(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "slow":
        monkeypatch.setattr(detokenizer, "uses_fast_detokenizer", lambda _tokenizer: False)
    tokens, given = CASES[case]
    request = Processor(byte_level(), params(**given), ours=True)
    chunks = []
    source = tokens()
    for _ in range(40):
        begin = time.process_time()
        for _, token in zip(range(500), source, strict=False):
            request.step([token])
        chunks.append(time.process_time() - begin)

    assert statistics.median(chunks[-10:]) < 2 * statistics.median(chunks[5:15])


def test_slow_detokenizer_state_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenizer, "uses_fast_detokenizer", lambda _tokenizer: False)
    for tokens in (text(), repeated(0x80), repeated(byte_level().eos_token_id), repeated(10**6)):
        request = Processor(byte_level(), params(), ours=True, prompt=[65] * 3000)
        for _, token in zip(range(20_000), tokens, strict=False):
            request.step([token])

        assert state_size(request.state) < 4000


def test_held_back_text_leaves_for_good_at_the_latest_after_the_limit() -> None:
    """A broken run of byte-fallback bytes whose end could be text: nothing in it is final."""
    request = Processor(byte_fallback(), params(), ours=True)
    request.step([byte_fallback().get_vocab()["a"]])

    told = ""
    for token in [0xFF, *[0xC3, 0xA9] * GIVE_UP_AFTER]:
        told += "".join(output.outputs[0].text for output in request.step([token]))

    assert told.count("\ufffd") >= GIVE_UP_AFTER


def test_prompt_is_named_until_every_choice_has_told_its_first_token() -> None:
    """Outputs of choices that a client has not read are merged: none may lack what echo needs."""
    prompt = [97] * (POLICY.capacity + 1)
    request = Processor(byte_level(), params(n=2), ours=True, prompt=prompt)

    first = [request.step([98], choice=0)[0] for _ in range(3)]
    second = request.step([98], choice=1)[0]
    later = [request.step([98], choice=choice)[0] for choice in (0, 1)]

    for output in (*first, second):
        assert output.prompt_token_ids == prompt
        assert output.prompt == "a prompt"
    for output in later:
        assert output.prompt is None
        assert len(output.prompt_token_ids or ()) == len(prompt)
        with pytest.raises(LookupError, match="first output"):
            list(output.prompt_token_ids or ())


def test_prompt_that_fits_the_cache_is_named_as_ever() -> None:
    prompt = [97] * POLICY.capacity
    request = Processor(byte_level(), params(), ours=True, prompt=prompt)

    for _ in range(3):
        (output,) = request.step([98])
        assert (output.prompt, output.prompt_token_ids) == ("a prompt", prompt)


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_nothing_of_a_long_prompt_is_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "slow":
        monkeypatch.setattr(detokenizer, "uses_fast_detokenizer", lambda _tokenizer: False)
    request = Processor(byte_level(), params(), ours=True, prompt=[97] * LENGTH)

    request.step([98])
    request.step([98])

    assert state_size(request.state) < 1000
    assert request.state.prompt_len == LENGTH


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE])
def test_responses_in_one_piece_keep_everything(kind: RequestOutputKind) -> None:
    steps = [[token] for _, token in zip(range(3000), text(), strict=False)]

    stock, ours = (
        Processor(byte_level(), params(output_kind=kind, logprobs=1), ours=is_ours).run(steps)
        for is_ours in (False, True)
    )

    assert ours[-1] == stock[-1]
    assert len(ours[-1]["tokens"]) == 3000


def test_client_that_stops_reading_is_aborted_with_what_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response_state, "STALLED_AFTER", 100)
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    request = Processor(byte_level(), params(), ours=True, queue=queue)
    aborted: list[str] = []
    made = 0
    while not aborted and made < 200:
        step = EngineCoreOutput(request_id="r", new_token_ids=[97])
        aborted += request.processor.process_outputs([step]).reqs_to_abort
        made += 1

    assert aborted == ["r"]
    assert made == 102
    output = asyncio.run(queue.get())
    assert isinstance(output, RequestOutput)
    (completion,) = output.outputs
    assert len(completion.token_ids) == made
    assert completion.text == "a" * made
    assert completion.finish_reason == "abort"
    assert output.finished
    assert not request.processor.has_unfinished_requests()


def test_client_that_reads_slowly_is_not_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_state, "STALLED_AFTER", 100)
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    request = Processor(byte_level(), params(), ours=True, queue=queue)
    for _ in range(20):
        for _ in range(90):
            assert request.step([97]) == []
        output = queue.get_nowait()
        assert isinstance(output, RequestOutput)
        assert len(output.outputs[0].token_ids) == 90

    assert not request.finished


def test_only_vllms_own_output_processor_is_adopted() -> None:
    class Other(OutputProcessor):
        pass

    with pytest.raises(TypeError, match="Other"):
        adopt(Other(None, log_stats=False), POLICY)


def test_guard_state_has_what_the_subclass_reads() -> None:
    state = Processor(byte_level(), params(), ours=True).state

    assert isinstance(state, EndlessRequestState)
    assert {"queue", "detokenizer", "logprobs_processor", "request_index", "output_kind"} <= vars(
        state
    ).keys()
    assert not hasattr(RequestState, "begin")
    assert not hasattr(OutputProcessor, "begin")
    assert FinishReason.ABORT is not None
