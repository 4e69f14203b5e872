"""``--sink-max-stream-tokens``: no request has more tokens of prompt and output, however it comes.

Which numbers come out of which request is in tests/policy/test_request_options.py.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import pytest
from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.conftest import ModelFactory
from tests.support.serving import SCHEDULE, Client, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

MOST = 300
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SENTENCE = f"--sink-max-stream-tokens={MOST}: a prompt of "


@pytest.fixture(scope="module")
def client(tiny_llama: ModelFactory) -> Iterator[Client]:
    flags = ("--sink-max-stream-tokens", str(MOST))
    plugins = {"VLLM_PLUGINS": "sink_vllm"}
    with tiny_server(tiny_llama(TinyLlama()), *flags, environment=plugins) as server:
        server.wait(lambda _waited: None)
        yield Client(server)


def _chat(tokens: int) -> dict[str, Any]:
    around = len("<user>\n<assistant>")
    return {"messages": [{"role": "user", "content": "a" * (tokens - around)}]}


def _prompt(path: str, tokens: int) -> dict[str, Any]:
    return _chat(tokens) if path == CHAT else {"prompt": prompt_of(tokens)}


@pytest.mark.server
@pytest.mark.parametrize("tokens", [50, MOST - 1])
@pytest.mark.parametrize(
    ("path", "given"),
    [(COMPLETIONS, {"max_tokens": 10**6}), (CHAT, {"max_tokens": 251}), (CHAT, {})],
)
def test_requests_end_at_the_bound(
    client: Client, path: str, tokens: int, given: dict[str, Any]
) -> None:
    body = {**_prompt(path, tokens), "n": 2, "temperature": 1, "seed": 1, **given}

    answer = client.ask(path, **body)
    usage = {"include_usage": True}
    chunks = list(client.chunks(path, **body, stream_options=usage))

    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2 == reasons
    for told in (answer["usage"], chunks[-1]["usage"]):
        assert told["prompt_tokens"] == tokens
        assert told["completion_tokens"] == 2 * (MOST - tokens)


@pytest.mark.server
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_without_room_are_refused_before_anything_starts(
    client: Client, path: str, stream: bool
) -> None:
    answer = client.post(path, **_prompt(path, MOST), max_tokens=1, stream=stream)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{SENTENCE}{MOST} tokens leaves no room")


@pytest.mark.server
def test_one_prompt_of_several_without_room_refuses_all(client: Client) -> None:
    prompts = [prompt_of(10), prompt_of(MOST)]

    answer = client.post(COMPLETIONS, prompt=prompts, max_tokens=1, stream=True)

    assert answer.status_code == 400
    client.wait_idle()


@pytest.mark.server
def test_stored_streams_are_bounded_as_a_whole(client: Client) -> None:
    stream = client.http.post("/v1/streams", json={"tokens": prompt_of(200)}).json()["id"]
    path = f"/v1/streams/{stream}/append"
    generate = {"temperature": 0, "ignore_eos": True, "max_tokens": 60}

    first = client.http.post(path, json={"generate": generate}).json()
    last = client.http.post(path, json={"tokens": [97] * 10, "generate": generate}).json()
    refused = client.http.post(path, json={"tokens": [97], "generate": generate})

    assert first["usage"]["generated_tokens"] == 60
    assert last["usage"]["generated_tokens"] == 30
    assert last["finish_reason"] == "length"
    assert last["stream"]["position"] == MOST
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(f"{SENTENCE}{MOST + 1} tokens")
    assert client.http.get(f"/v1/streams/{stream}").json()["position"] == MOST


@pytest.mark.server
def test_models_state_the_bound(client: Client) -> None:
    assert client.http.get("/v1/models").json()["data"][0]["max_model_len"] == MOST


# -- AsyncLLM and its sessions ------------------------------------------------------------------


def _params(max_tokens: int | None, kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, output_kind=kind)


async def _session(
    engine: AsyncLLM, inputs: Sequence[tuple[int, int | None]], wait: bool
) -> list[tuple[list[int], str | None]]:
    """The answers to inputs of so many tokens, with so many ``max_tokens``."""
    answers: list[tuple[list[int], str | None]] = []
    answered = asyncio.Event()

    async def source() -> AsyncGenerator[StreamingInput, None]:
        for number, (tokens, max_tokens) in enumerate(inputs):
            if wait and number:
                await answered.wait()
                answered.clear()
            params = _params(max_tokens, RequestOutputKind.DELTA)
            yield StreamingInput(tokens_input(prompt_of(tokens)), params)

    made: list[int] = []
    params = _params(1, RequestOutputKind.DELTA)
    async for output in engine.generate(source(), params, f"s{next(_NUMBERS)}"):
        for completion in output.outputs:
            made += completion.token_ids
            if completion.finish_reason is not None:
                answers.append((made, completion.finish_reason))
                made = []
                answered.set()
    assert not made
    return answers


_NUMBERS = itertools.count()


async def _requests(engine: AsyncLLM) -> None:
    for kind in (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY):
        outputs: list[RequestOutput] = [
            output
            async for output in engine.generate(
                {"prompt_token_ids": prompt_of(200)}, _params(None, kind), f"r{kind}"
            )
        ]
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == MOST - 200
        assert outputs[-1].outputs[0].finish_reason == "length"
    with pytest.raises(VLLMValidationError, match=SENTENCE):
        engine.generate({"prompt_token_ids": prompt_of(MOST)}, _params(1, kind), "no room")


async def _sessions(engine: AsyncLLM) -> None:
    # An answer's last token is discarded for the next input: 100 + 49, + 20 + 49, + 40 + 42.
    inputs: list[tuple[int, int | None]] = [(100, 50), (20, 50), (40, None), (1, 1)]
    for wait in (False, True):
        answers = await _session(engine, inputs, wait)
        assert [len(tokens) for tokens, _ in answers] == [50, 50, MOST - 100 - 49 - 20 - 49 - 40]
        assert answers[-1][1] == "length"
    unbounded = await _session(engine, [(100, 50), (20, 50), (40, 10)], wait=True)
    assert [tokens for tokens, _ in unbounded[:2]] == [tokens for tokens, _ in answers[:2]]
    assert unbounded[2][0] == answers[2][0][:10]


async def _inputs_without_room(engine: AsyncLLM) -> None:
    fitting = [(100, 50), (MOST - 149 - 1, 5)]
    assert [len(tokens) for tokens, _ in await _session(engine, fitting, wait=True)] == [50, 1]
    with pytest.raises(VLLMValidationError, match=f"{SENTENCE}{MOST} tokens leaves no room"):
        await _session(engine, [(100, 50), (MOST - 149, 5)], wait=True)
    # It waits while the answer is made, so it is the answer that tells.
    answers = await _session(engine, [(100, 50), (MOST - 149, 5)], wait=False)
    assert [(len(tokens), reason) for tokens, reason in answers] == [(50, "length")]


@pytest.mark.engine
def test_async_llm_and_its_sessions(tiny_llama: ModelFactory) -> None:
    """In one engine, because it takes long to start."""
    args = AsyncEngineArgs(
        str(tiny_llama(TinyLlama())),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=4,
        num_gpu_blocks_override=64,
        additional_config={
            "kv_policy": "sink",
            "sink_tokens": SCHEDULE.sink_tokens,
            "sink_window": SCHEDULE.window,
            "sink_stride": SCHEDULE.stride,
            "sink_max_stream_tokens": MOST,
        },
    )

    async def talk() -> None:
        engine = AsyncLLM.from_engine_args(args)
        try:
            for check in _CHECKS:
                await asyncio.wait_for(check(engine), 120)
                assert not engine.output_processor.has_unfinished_requests()
        finally:
            engine.shutdown()

    asyncio.run(talk())


_CHECKS: tuple[Callable[[AsyncLLM], Any], ...] = (_requests, _sessions, _inputs_without_room)
