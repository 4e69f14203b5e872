"""Requests the policy cannot serve are refused, with the status of a bad request."""

import inspect
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, RepetitionDetectionParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from sink_vllm.policy.look_back import MOST_LOOK_BACK
from sink_vllm.server.lengths import FRONT_MAX, front_view
from sink_vllm.server.requests import (
    REFUSALS,
    _wrap_beam_search_offline,
    _wrap_beam_search_online,
    _wrap_process_inputs,
)
from tests.support.tiny_models import VOCAB_SIZE, TinyLlama

POLICY = {"kv_policy": "sink", "sink_tokens": 4, "sink_window": 92, "sink_stride": 32}
CAPACITY = 4 + 92 + 32
Process = Callable[..., EngineCoreRequest]


def _processor(model: Path, additional_config: dict[str, Any]) -> Process:
    """``process_inputs`` of a real input processor, for token ids."""
    config = EngineArgs(
        model=str(model),
        block_size=32,
        additional_config=additional_config,
    ).create_engine_config()
    processor = InputProcessor(front_view(config))
    process_inputs = _wrap_process_inputs(InputProcessor.process_inputs)

    def process(tokens: int | list[int], params: SamplingParams, **fields: Any) -> Any:
        if isinstance(tokens, int):
            tokens = [index % 256 for index in range(tokens)]
        prompt = {"prompt_token_ids": tokens}
        return process_inputs(processor, "r", prompt, params, ("generate",), **fields)

    return process


@pytest.fixture(scope="module")
def process(tiny_llama: Callable[[TinyLlama], Path]) -> Process:
    return _processor(tiny_llama(TinyLlama()), POLICY)


@pytest.fixture(scope="module")
def stock_process(tiny_llama: Callable[[TinyLlama], Path]) -> Process:
    return _processor(tiny_llama(TinyLlama()), {})


@pytest.mark.parametrize("num_tokens", [1, CAPACITY, CAPACITY + 1, 10**5, 10**6])
def test_any_prompt_length(process: Process, num_tokens: int) -> None:
    request = process(num_tokens, SamplingParams(max_tokens=5))

    assert request.prompt_token_ids is not None
    assert len(request.prompt_token_ids) == num_tokens


@pytest.mark.parametrize(
    ("given", "expected"),
    [(5, 5), (10**6, 10**6), (FRONT_MAX, FRONT_MAX - 100), (None, FRONT_MAX - 100)],
)
def test_max_tokens(process: Process, given: int | None, expected: int) -> None:
    """The sum of prompt and output fits into the engine's int32."""
    given_params = SamplingParams(max_tokens=given)

    request = process(100, given_params)

    assert request.sampling_params is not None
    assert request.sampling_params.max_tokens == expected
    assert given_params.max_tokens == given  # the caller's object is left alone


@pytest.mark.parametrize("max_tokens", [FRONT_MAX + 1, 2**64])
def test_max_tokens_the_engine_cannot_count(process: Process, max_tokens: int) -> None:
    with pytest.raises(VLLMValidationError, match=f"max_tokens={max_tokens}"):
        process(100, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("num_tokens", [CAPACITY, CAPACITY + 1])
def test_prompt_logprobs_only_within_the_capacity(process: Process, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=5, prompt_logprobs=1)
    if num_tokens <= CAPACITY:
        assert process(num_tokens, params).sampling_params is not None
        return

    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs.*capacity 128 tokens"):
        process(num_tokens, params)


@pytest.mark.parametrize(
    ("pattern", "count", "max_tokens", "fits"),
    [
        (32_768, 2, None, True),
        (32_768, 3, None, False),
        (10**6, 5, None, False),
        (10**6, 5, MOST_LOOK_BACK, True),
        (10**6, 5, MOST_LOOK_BACK + 1, False),
        (10**6, 0, None, True),  # off
        (10**6, 5, CAPACITY - 10, True),  # evicts nothing
    ],
)
def test_repetitions_are_searched_as_far_back_as_tokens_are_kept(
    process: Process, pattern: int, count: int, max_tokens: int | None, fits: bool
) -> None:
    """Not further back than the answer is long; the bound is named."""
    detection = RepetitionDetectionParams(max_pattern_size=pattern if count else 0, min_count=count)
    params = SamplingParams(max_tokens=max_tokens, repetition_detection=detection)
    if fits:
        assert process(10, params).sampling_params is not None
        return

    with pytest.raises(VLLMValidationError, match=rf"repetition_detection: .* {MOST_LOOK_BACK} "):
        process(10, params)


@pytest.mark.parametrize("kv_policy", ["sink", "full"])
@pytest.mark.parametrize("length", [92, 93])
def test_bad_words_fit_into_the_window(process: Process, length: int, kv_policy: str) -> None:
    """Behind an eviction the last tokens of an answer are those of the window."""
    params = SamplingParams(
        max_tokens=40,
        _bad_words_token_ids=[[1], list(range(length))],
        extra_args={"kv_policy": kv_policy},
    )
    for prompt in (CAPACITY - 40, CAPACITY - 39):
        refused = prompt + 40 > CAPACITY and length > 92
        if kv_policy == "full" and prompt + 40 > CAPACITY:
            continue  # refused for its length
        if not refused:
            assert process(prompt, params).sampling_params is not None
            continue
        with pytest.raises(VLLMValidationError, match=r"bad_words: a word of 93 .* window of 92"):
            process(prompt, params)


def test_streaming_input_sessions(process: Process) -> None:
    """They run without end; one that must not be evicted from has no length to check."""
    assert process(10, SamplingParams(), resumable=True).resumable
    full = SamplingParams(extra_args={"kv_policy": "full"}, max_tokens=5)
    assert process(10, full.clone()).sampling_params is not None
    with pytest.raises(VLLMValidationError, match=r"kv_policy: a streaming input session .*leave"):
        process(10, full, resumable=True)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"prompt_embeds": [1]}, {}),
        ({"mm_features": [1]}, {}),
        ({}, {"trace_decode_token_ids": [1, 2]}),
        ({}, {"thinking_token_budget": 5}),
    ],
    ids=["prompt embeddings", "multimodal", "trace replay", "thinking budget"],
)
def test_what_only_servers_with_an_option_accept(
    fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """The options are refused at start-up; a second line of defence."""
    nothing = {"prompt_embeds": None, "mm_features": None, "resumable": False}
    request: Any = SimpleNamespace(**{**nothing, **fields}, prompt_token_ids=[1])
    policy: Any = SimpleNamespace(capacity=CAPACITY)

    params = SamplingParams(**sampling)

    assert len([rule for rule, _, _ in REFUSALS if rule(request, params, policy)]) == 1


def test_stock_refusals_stay(process: Process) -> None:
    with pytest.raises(VLLMValidationError, match="cannot be empty"):
        process(0, SamplingParams())
    with pytest.raises(VLLMValidationError, match="out of vocabulary"):
        process([VOCAB_SIZE + 5], SamplingParams())


def test_policy_off_leaves_requests_alone(stock_process: Process) -> None:
    params = SamplingParams(max_tokens=2**40, prompt_logprobs=1)

    request = stock_process(300, params)

    assert request.sampling_params is not None
    assert request.sampling_params.max_tokens == 2**40


def test_refusals_are_bad_requests() -> None:
    error = create_error_response(VLLMValidationError("text", parameter="max_tokens"))

    assert error.error.code == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    ("wrap", "owner"),
    [(_wrap_beam_search_online, "engine_client"), (_wrap_beam_search_offline, "llm_engine")],
)
def test_beam_search(
    wrap: Callable[[Any], Any],
    owner: str,
    tiny_llama: Callable[[TinyLlama], Path],
) -> None:
    def config_with(additional_config: dict[str, Any]) -> VllmConfig:
        model = str(tiny_llama(TinyLlama()))
        args = EngineArgs(model=model, block_size=32, additional_config=additional_config)
        return front_view(args.create_engine_config())

    def handler(config: VllmConfig) -> Any:
        return SimpleNamespace(**{owner: SimpleNamespace(vllm_config=config)})

    beam_search = wrap(lambda _self, *_args, **_kwargs: "searched")
    params = BeamSearchParams(beam_width=2, max_tokens=5)

    with pytest.raises(VLLMValidationError, match="beam search"):
        beam_search(handler(config_with(POLICY)), "prompt", params)
    assert beam_search(handler(config_with({})), "prompt", params) == "searched"


def test_guard_every_request_passes_process_inputs() -> None:
    assert "self.input_processor.process_inputs(" in inspect.getsource(LLMEngine.add_request)
    assert "self.input_processor.process_inputs" in inspect.getsource(AsyncLLM.add_request)
    source = inspect.getsource(InputProcessor.__init__)
    assert "self.process_inputs, executor" in source  # bound when made: after the patch
    fields = EngineCoreRequest.__struct_fields__
    assert {"prompt_embeds", "mm_features", "resumable", "sampling_params"} <= set(fields)
    assert "sampling_params = params.clone()" in inspect.getsource(InputProcessor.process_inputs)


def test_guard_handlers_start_beam_search_by_calling_the_method() -> None:
    for handler in (OpenAIServingCompletion, OpenAIServingChat):
        assert issubclass(handler, BeamSearchOnlineMixin)
        assert "generator = self.beam_search(" in "".join(
            inspect.getsource(method)
            for name, method in vars(handler).items()
            if name.startswith("_create_")
        )
    assert "self.engine_client" in inspect.getsource(BeamSearchOnlineMixin.beam_search)
    assert "self.llm_engine" in inspect.getsource(BeamSearchOfflineMixin.beam_search)
