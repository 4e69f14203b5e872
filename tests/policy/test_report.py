"""The account of evictions reaches every kind of response, and only responses that evicted."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import CompletionOutput, RequestOutput
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.v1.engine import FinishReason

from sink_vllm.policy.report import KEY, Account, account_of_batch, onto_chunk, report_of
from sink_vllm.server.events import Unkept, _chat_keeps_text, _wrap_events
from sink_vllm.server.lengths import front_view
from tests.conftest import ModelFactory
from tests.support.outputs import Processor, byte_level, params
from tests.support.tiny_models import TinyLlama

POLICY = {"kv_policy": "sink", "sink_tokens": 4, "sink_window": 92, "sink_stride": 32}


def report(evicted: int, position: int = 1000) -> dict[str, int]:
    return {
        "evicted_tokens": evicted,
        "evictions": evicted // 32,
        "rope_reanchorings": 0,
        "stream_position": position,
    }


def test_account_of_one_stream_is_its_last_report() -> None:
    account = Account(single=True)
    assert account.onto(None) is None

    account.update(0, {KEY: report(32)})
    account.update(0, None)
    account.update(0, {KEY: report(64), "somebody_elses": 1})
    account.close(0, stream_position=1234)

    assert account.onto({"x": 1}) == {"x": 1, KEY: report(64, 1234)}


def test_account_of_several_streams_adds_up_and_lists_them() -> None:
    account = Account(single=False)
    account.update(2, {KEY: report(64)})
    account.update(0, {KEY: report(32)})

    params = account.onto(None)

    assert params == {
        KEY: {
            "evicted_tokens": 96,
            "evictions": 3,
            "rope_reanchorings": 0,
            "choices": [{"index": 0, **report(32)}, {"index": 2, **report(64)}],
        }
    }
    assert report_of(params, 2) == report(64)
    assert report_of(params, 1) is None


def test_params_of_others_pass_unchanged() -> None:
    account = Account(single=True)
    account.close(0, 10)

    assert account.onto({"x": 1}) == {"x": 1}


@pytest.mark.parametrize("finish", ["engine", "stop string", "abort"])
def test_last_output_has_the_report_however_the_request_ends(finish: str) -> None:
    request = Processor(byte_level(), params(stop=["END"]), ours=True)
    request.step([97], kv_transfer_params={KEY: report(32, 55)})
    assert request.step([98])[0].outputs[0].finish_reason is None
    if finish == "engine":
        last = request.step(
            [99], finish_reason=FinishReason.LENGTH, kv_transfer_params={KEY: report(64)}
        )
    elif finish == "stop string":
        last = request.step(b"END")
    else:
        output = request.state.make_request_output([], None, FinishReason.ABORT, None)
        assert isinstance(output, RequestOutput)
        last = [output]

    told = (last[-1].kv_transfer_params or {})[KEY]
    assert told["evicted_tokens"] == (64 if finish == "engine" else 32)
    assert told["stream_position"] == 2 + {"engine": 3, "stop string": 5, "abort": 2}[finish]


def test_request_that_did_not_evict_says_nothing() -> None:
    request = Processor(byte_level(), params(), ours=True)

    seen = request.run([[97], [98]])

    assert [output["params"] for output in seen] == [None, None]


def _output(
    *choices: tuple[int, str, str | None], params: dict[str, Any] | None = None
) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt="p",
        prompt_token_ids=[1, 2],
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=index,
                text=text,
                token_ids=[7],
                cumulative_logprob=None,
                logprobs=None,
                finish_reason=finish,
            )
            for index, text, finish in choices
        ],
        finished=False,
        kv_transfer_params=params,
    )


def test_batch_of_prompts_counts_choices_as_vllm_does() -> None:
    """vLLM numbers the choices of a response prompt by prompt."""
    both = {KEY: {**report(96), "choices": [{"index": i, **report(32 * i)} for i in (1, 2)]}}
    outputs = [
        _output((0, "", "stop"), (1, "", "stop"), (2, "", "stop")),
        _output((0, "", "stop"), (1, "", "stop"), (2, "", "stop"), params=both),
    ]

    account = account_of_batch(outputs, 3)

    assert account is not None
    assert account["evicted_tokens"] == 96
    assert [choice["index"] for choice in account["choices"]] == [4, 5]
    assert account_of_batch(outputs[:1], 3) is None


def _chunk(index: int, finish: str | None, text: str = "é\n") -> str:
    choice = {"index": index, "text": text, "finish_reason": finish}
    return "data: " + json.dumps({"id": "x", "choices": [choice]}, ensure_ascii=False) + "\n\n"


def test_only_the_last_chunk_of_a_choice_is_changed() -> None:
    reports = {0: report(32), 1: report(64)}
    for chunk in (_chunk(0, None), _chunk(2, "stop"), "data: [DONE]\n\n", 'data: {"usage":{}}\n\n'):
        assert onto_chunk(chunk, reports) == chunk

    changed = onto_chunk(_chunk(1, "length"), reports)

    assert changed.endswith("}\n\n")
    body = json.loads(changed.removeprefix("data: "))
    assert body["kv_transfer_params"] == {KEY: report(64)}
    assert body["choices"][0]["text"] == "é\n"
    assert reports == {0: report(32)}


@pytest.fixture(scope="module")
def configs(tiny_llama: ModelFactory) -> dict[bool, VllmConfig]:
    def config(additional_config: dict[str, Any]) -> VllmConfig:
        model = str(tiny_llama(TinyLlama()))
        args = EngineArgs(model=model, block_size=32, additional_config=additional_config)
        return front_view(args.create_engine_config())

    return {True: config(POLICY), False: config({})}


async def _stream(
    self: Any, request: Any, engine_inputs: Any, result_generator: AsyncIterator[Any]
) -> AsyncIterator[str]:
    """What vLLM's generators do with the outputs, in short."""
    collected = ""
    async for item in result_generator:
        prompt_index, output = item if isinstance(item, tuple) else (0, item)
        for completion in output.outputs:
            collected += completion.text
            index = prompt_index * request.n + completion.index
            yield _chunk(index, completion.finish_reason, completion.text)
    self.collected = collected
    yield "data: [DONE]\n\n"


def _run(
    config: VllmConfig, outputs: list[Any], keeps_text: Callable[[Any], bool]
) -> tuple[list[str], str]:
    async def source() -> AsyncIterator[Any]:
        for output in outputs:
            yield output

    async def collect() -> list[str]:
        events = _wrap_events(keeps_text)(_stream)  # type: ignore[arg-type]
        request = CompletionRequest(model="m", seed=None, prompt="p", n=2)
        inputs = [{"type": "token", "prompt_token_ids": [1, 2]}] * 2
        return [chunk async for chunk in events(handler, request, inputs, source())]

    handler = SimpleNamespace(model_config=config.model_config)
    return asyncio.run(collect()), handler.collected


@pytest.mark.parametrize("several_prompts", [False, True])
def test_stream_tells_each_choice_in_its_last_chunk(
    configs: dict[bool, VllmConfig], several_prompts: bool
) -> None:
    told = {KEY: {**report(64), "choices": [{"index": 1, **report(64)}]}}
    outputs: list[Any] = [
        _output((0, "a", None), (1, "b", None)),
        _output((1, "c", "length"), params=told),
        _output((0, "d", "stop"), params=told),
    ]
    if several_prompts:
        outputs = [(1, output) for output in outputs]

    chunks, text = _run(configs[True], outputs, lambda _handler: True)

    bodies = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks[:-1]]
    assert [body.get("kv_transfer_params") for body in bodies] == [
        None,
        None,
        {KEY: report(64)},
        None,
    ]
    assert text == "abcd"


def test_chat_stream_passes_all_text_and_keeps_none(configs: dict[bool, VllmConfig]) -> None:
    outputs = [_output((0, "thé ", None)), _output((0, "cat", "stop"))]

    chunks, text = _run(configs[True], outputs, lambda _handler: False)

    told = [json.loads(c.removeprefix("data: "))["choices"][0]["text"] for c in chunks[:-1]]
    assert told == ["thé ", "cat"]
    assert text == ""


def test_stream_without_the_policy_is_vllms(configs: dict[bool, VllmConfig]) -> None:
    outputs = [_output((0, "a", "stop"), params={KEY: report(32)})]

    chunks, text = _run(configs[False], outputs, lambda _handler: False)

    assert chunks == [_chunk(0, "stop", "a"), "data: [DONE]\n\n"]
    assert text == "a"


def test_chat_text_is_kept_for_parsers_and_for_the_log() -> None:
    quiet = {"parser_cls": None, "enable_log_outputs": False, "request_logger": None}

    assert not _chat_keeps_text(SimpleNamespace(**quiet))
    assert _chat_keeps_text(SimpleNamespace(**{**quiet, "parser_cls": object}))
    logged = {"enable_log_outputs": True, "request_logger": object()}
    assert _chat_keeps_text(SimpleNamespace(**{**quiet, **logged}))


def test_unkept_text_is_text() -> None:
    collected = ["so far"]
    collected[0] += Unkept("abc")

    assert collected == ["so far"]
    assert Unkept("abc") == "abc"
    assert json.dumps(Unkept("é")) == '"\\u00e9"'


def test_guard_responses_have_the_field() -> None:
    for response in (CompletionResponse, ChatCompletionResponse, ResponsesResponse):
        assert "kv_transfer_params" in response.model_fields


def test_guard_stream_generators_take_what_the_wrapper_binds() -> None:
    for stream, start in (
        (OpenAIServingCompletion.completion_stream_generator, "_create_completion"),
        (OpenAIServingChat.chat_completion_stream_generator, "_create_chat_completion"),
    ):
        raw = getattr(OpenAIServingChat, f"{stream.__name__}_raw", None)
        body = stream if raw is None else raw
        parameters = inspect.signature(body).parameters
        assert {"self", "request", "result_generator"} <= parameters.keys()
        source = inspect.getsource(inspect.unwrap(body))
        if "kv_transfer_params" in source:
            # 0.33 passes it on, with the last chunk of a choice: the account of all choices.
            assert source.count("res.kv_transfer_params") == 1
        if raw is not None:
            assert f"self.{raw.__name__}(" in inspect.getsource(inspect.unwrap(stream))
        owner = OpenAIServingChat if "chat" in start else OpenAIServingCompletion
        assert f"self.{stream.__name__}(" in inspect.getsource(getattr(owner, start))
    source = inspect.getsource(OpenAIServingCompletion.request_output_to_completion_response)
    assert "final_res_batch[0].kv_transfer_params" in source


def test_guard_chat_stream_only_collects_the_text() -> None:
    """The one place that adds the text up does so with ``+=`` and reads it for the log only."""
    name = "chat_completion_stream_generator"
    body = getattr(OpenAIServingChat, f"{name}_raw", None) or getattr(OpenAIServingChat, name)
    source = inspect.getsource(inspect.unwrap(body))

    assert "delta_text = output.text" in source
    assert source.count("+= delta_text") == 1
    assert "previous_texts[i] += delta_text" in source
    log = source.index("# Log complete streaming response")
    assert "previous_texts" not in source[source.index("+= delta_text") + 20 : log]
