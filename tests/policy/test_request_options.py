"""Options of one request: the arithmetic exhaustively, then through vLLM's input processor."""

import inspect
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.request_options import (
    SCHEDULE_KEYS,
    RequestPolicy,
    check_full,
    check_pages,
    minimum_window,
    most_sink_tokens,
    pinned_sink_tokens,
)
from sink_vllm.policy.schedule import Schedule, pages_per_stream
from sink_vllm.server.lengths import FRONT_MAX, front_view
from sink_vllm.server.options import PINNED_KEY, _wrap_generate
from sink_vllm.server.requests import _wrap_process_inputs
from tests.support.tiny_models import TinyLlama

BLOCK = 4
SERVERS = [
    SinkConfig(schedule=Schedule(sink_tokens=s, window=w, stride=g), block_size=BLOCK)
    for s, w, g in itertools.product((0, 1, 4, 6), (1, 3, 8, 11), (4, 8))
]


def _parse(config: SinkConfig, **options: Any) -> Schedule | None:
    return RequestPolicy.parse(options, config)


# -- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SERVERS, ids=lambda c: str(c.schedule))
def test_every_choice_is_refused_or_fits(config: SinkConfig) -> None:
    """The schedule of a request never exceeds the server's capacity, stride and window."""
    server = config.schedule
    for sinks, window in itertools.product([None, *range(30)], [None, *range(1, 14)]):
        try:
            schedule = _parse(config, sink_tokens=sinks, sink_window=window)
        except ValueError as error:
            sentence = str(error)
            allowed = server.sink_tokens if sinks is None else sinks
            too_many = allowed > max(most_sink_tokens(config), server.sink_tokens)
            too_wide = window is not None and (
                window > server.window or allowed + window + server.stride > config.capacity
            )
            assert too_many or too_wide, (sinks, window)
            assert sentence.endswith(".")
            assert "; use" in sentence
            continue
        assert schedule is not None
        assert schedule.stride == server.stride
        assert schedule.sink_tokens == (server.sink_tokens if sinks is None else sinks)
        assert schedule.capacity <= config.capacity
        room = config.capacity - schedule.sink_tokens - schedule.stride
        assert schedule.window == (min(server.window, room) if window is None else window)
        assert schedule.window >= (1 if window else minimum_window(config))


@pytest.mark.parametrize("config", SERVERS, ids=lambda c: str(c.schedule))
def test_normalised_options_mean_the_same(config: SinkConfig) -> None:
    """The scheduler reads what the front end wrote; what equals the default is left out."""
    choices: list[dict[str, Any]] = [{}, {"kv_policy": "full"}, {"kv_policy": "sink"}]
    choices += [
        {"sink_tokens": s, "sink_window": w}
        for s, w in itertools.product(
            (None, 0, config.schedule.sink_tokens, most_sink_tokens(config)),
            (None, 1, config.schedule.window),
        )
    ]
    for options in choices:
        try:
            schedule = RequestPolicy.parse(options, config)
        except ValueError:
            continue
        normalised = RequestPolicy.read(options).normalised(config)

        assert set(normalised) <= set(SCHEDULE_KEYS)
        assert RequestPolicy.parse(normalised, config) == schedule
        if schedule == config.schedule:
            assert normalised == {}


def test_nothing_given_is_the_server_default() -> None:
    for config in SERVERS:
        assert RequestPolicy.parse(None, config) == config.schedule
        assert RequestPolicy.parse({"temperature_schedule": [1]}, config) == config.schedule


@pytest.mark.parametrize("config", SERVERS, ids=lambda c: str(c.schedule))
def test_most_sink_tokens_is_the_limit(config: SinkConfig) -> None:
    most = most_sink_tokens(config)

    assert _parse(config, sink_tokens=most) is not None
    if most >= config.schedule.sink_tokens:
        with pytest.raises(ValueError, match=f"use {most} or fewer"):
            _parse(config, sink_tokens=most + 1)


def test_windows_of_layers_bound_the_window_of_a_request() -> None:
    """Layers with page tables of their own have no sinks to show."""
    schedule = Schedule(sink_tokens=4, window=92, stride=32)
    config = SinkConfig(schedule=schedule, block_size=32, native_window=65)

    assert minimum_window(config) == 64
    assert most_sink_tokens(config) == 128 - 32 - 64
    assert _parse(config, sink_window=64) == Schedule(sink_tokens=4, window=64, stride=32)
    with pytest.raises(ValueError, match=r"^sink_window=63 is smaller .* use 64 or more, or a"):
        _parse(config, sink_window=63)


CONFIG = SinkConfig(schedule=Schedule(sink_tokens=4, window=92, stride=32), block_size=32)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_policy": "none"}, "kv_policy='none' is not a policy; use one of full, sink."),
        (
            {"sink_tokens": "8"},
            "sink_tokens='8' is a str; use a whole number of tokens, 0 or more.",
        ),
        (
            {"sink_tokens": 8.0},
            "sink_tokens=8.0 is a float; use a whole number of tokens, 0 or more.",
        ),
        (
            {"sink_tokens": True},
            "sink_tokens=True is a bool; use a whole number of tokens, 0 or more.",
        ),
        ({"sink_tokens": -1}, "sink_tokens=-1 is too small; use 0 or more (tokens)."),
        ({"sink_window": 0}, "sink_window=0 is too small; use 1 or more (tokens)."),
        (
            {"sink_tokens": 65},
            "sink_tokens=65 leaves no window: the server's capacity of 128 tokens holds sink "
            "tokens, a window of at least 32 and a stride of 32; use 64 or fewer, or a server "
            "with a larger capacity (--max-model-len).",
        ),
        (
            {"sink_window": 93},
            "sink_window=93 is larger than the server's window of 92 tokens; use 92 or less, or "
            "a server with a larger --sink-window.",
        ),
        (
            {"sink_tokens": 40, "sink_window": 60},
            "sink_window=60 does not fit beside sink_tokens=40 and a stride of 32 in the "
            "server's capacity of 128 tokens; use a window of 56 or less, or 36 or fewer sink "
            "tokens.",
        ),
        (
            {"kv_policy": "full", "sink_tokens": 4},
            "sink_tokens=4 contradicts kv_policy='full', which evicts nothing; drop one of them.",
        ),
        (
            {"sink_token": 4},
            "sink_token=4 is not an option of a request; did you mean 'sink_tokens'? the options "
            "are kv_policy, sink_tokens, sink_window, sink_pin.",
        ),
        (
            {"sink_stride": 32},
            "sink_stride=32 is not an option of a request; did you mean 'sink_tokens'? the "
            "options are kv_policy, sink_tokens, sink_window, sink_pin.",
        ),
        ({"sink_pin": "user"}, "sink_pin='user' is not a pin; use one of none, system."),
        (
            {"sink_pin": "system", "kv_policy": "full"},
            "sink_pin='system' contradicts kv_policy='full', which evicts nothing; drop one of "
            "them.",
        ),
        (
            {"sink_pin": "system", "sink_tokens": 9},
            "sink_pin='system' and sink_tokens=9 both choose the sink tokens; drop one of them.",
        ),
        (
            {"sink_pin": "system"},
            "sink_pin='system' needs chat messages to find the end of the system message; send "
            "the request to /v1/chat/completions, or count its tokens and set sink_tokens.",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole sentence is compared)
        RequestPolicy.parse(options, CONFIG)

    assert str(error.value).replace("did you mean 'sink_window'", "did you mean 'sink_tokens'") == (
        sentence
    )


@pytest.mark.parametrize("value", [[4], {"a": 1}, "", 2**70, -(2**70), 1e308, [[]]])
@pytest.mark.parametrize("key", ["kv_policy", "sink_tokens", "sink_window", "sink_pin", "sink_"])
def test_any_json_is_refused_with_a_sentence(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}"):
        RequestPolicy.parse({key: value}, CONFIG)


@pytest.mark.parametrize("prompt", range(1, 12))
@pytest.mark.parametrize("max_tokens", [None, *range(1, 12)])
def test_full_is_vllm_with_the_capacity_as_length(prompt: int, max_tokens: int | None) -> None:
    capacity = 8
    if prompt >= capacity or (max_tokens or 0) > capacity - prompt:
        with pytest.raises(ValueError, match=rf"^kv_policy='full'.*{prompt} tokens.*{capacity}"):
            check_full(prompt, max_tokens, capacity)
        return

    assert check_full(prompt, max_tokens, capacity) == (max_tokens or capacity - prompt)


def test_a_stream_must_fit_into_the_pool() -> None:
    schedule = Schedule(sink_tokens=64, window=32, stride=32)
    pages = pages_per_stream(schedule, 32)

    check_pages(schedule, 32, pages)
    with pytest.raises(
        ValueError, match=rf"sink_tokens=64.*{pages} KV cache pages.*has {pages - 1}"
    ):
        check_pages(schedule, 32, pages - 1)


@pytest.mark.parametrize(("pinned", "expected"), [(0, 4), (3, 4), (4, 4), (5, 5), (64, 64)])
def test_a_pin_never_lowers_the_sink_tokens(pinned: int, expected: int) -> None:
    assert pinned_sink_tokens(pinned, {"sink_pin": "system"}, CONFIG) == expected


@pytest.mark.parametrize("window", [10**6, -5, True, "60"])
def test_a_pin_beside_a_window_that_is_refused_elsewhere(window: object) -> None:
    """The numbers of the sentence are possible ones."""
    options = {"sink_pin": "system", "sink_window": window}

    assert pinned_sink_tokens(40, options, CONFIG) == 40
    with pytest.raises(ValueError, match=r"room for 64 beside a window of at least 32 and"):
        pinned_sink_tokens(65, options, CONFIG)


def test_a_pin_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"first 65 tokens.*128 tokens has room for 64 beside"):
        pinned_sink_tokens(65, {}, CONFIG)
    with pytest.raises(ValueError, match=r"first 40 tokens.*room for 36 beside a window of at lea"):
        pinned_sink_tokens(40, {"sink_window": 60}, CONFIG)


# -- through vLLM -------------------------------------------------------------------------------


async def _accepted(_self: Any, prompt: Any, *_args: Any) -> AsyncIterator[Any]:
    yield prompt


class _FrontEnd:
    """A real input processor, and ``AsyncLLM.generate`` as far as the wrapper goes."""

    def __init__(self, model: Path, additional_config: dict[str, Any], pages: int | None) -> None:
        config = EngineArgs(
            model=str(model), block_size=32, additional_config=additional_config
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = pages
        self.vllm_config = front_view(config)
        self._processor = InputProcessor(self.vllm_config)
        self._process = _wrap_process_inputs(inspect.unwrap(InputProcessor.process_inputs))
        self._generate = _wrap_generate(_accepted)

    def both(self, tokens: int, params: SamplingParams, pinned: int | None = None) -> Any:
        """The request the engine core gets; refusals must be the same on both ways."""
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": [7] * tokens}
        if pinned is not None:
            prompt[PINNED_KEY] = pinned
        errors = []
        try:
            assert isinstance(self._generate(self, prompt, params, "r"), AsyncGenerator)
        except VLLMValidationError as error:
            errors.append(str(error))
        try:
            request = self._process(self._processor, "r", prompt, params, ("generate",))
        except VLLMValidationError as error:
            sentence = str(error)
            assert errors == [sentence]
            raise
        assert errors == []
        return request


POLICY = {"kv_policy": "sink", "sink_tokens": 4, "sink_window": 92, "sink_stride": 32}


@pytest.fixture(scope="module")
def front(tiny_llama: Callable[[TinyLlama], Path]) -> _FrontEnd:
    return _FrontEnd(tiny_llama(TinyLlama()), POLICY, 32)


@pytest.fixture(scope="module")
def stock(tiny_llama: Callable[[TinyLlama], Path]) -> _FrontEnd:
    return _FrontEnd(tiny_llama(TinyLlama()), {}, 32)


def _params(max_tokens: int | None = 5, **xargs: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, extra_args=xargs or None)


def test_normalised_options_reach_the_engine(front: _FrontEnd) -> None:
    given = _params(sink_tokens=10, kv_policy="sink", mine=1)

    request = front.both(300, given)

    assert request.sampling_params.extra_args == {"mine": 1, "sink_tokens": 10, "sink_window": 86}
    # The caller's object is left alone.
    assert given.extra_args == {"sink_tokens": 10, "kv_policy": "sink", "mine": 1}


def test_nothing_is_added_to_ordinary_requests(front: _FrontEnd) -> None:
    assert front.both(300, _params()).sampling_params.extra_args is None


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "expected"),
    [(100, 28, 28), (100, None, 28), (127, 1, 1), (1, None, 127), (100, FRONT_MAX - 100, 28)],
)
def test_full_fits(front: _FrontEnd, tokens: int, max_tokens: int | None, expected: int) -> None:
    """Handlers of chats fill in all the room there is when no ``max_tokens`` is given."""
    request = front.both(tokens, _params(max_tokens, kv_policy="full"))

    assert request.sampling_params.max_tokens == expected
    assert request.sampling_params.extra_args == {"kv_policy": "full"}


@pytest.mark.parametrize(("tokens", "max_tokens"), [(100, 29), (128, None), (500, 1)])
def test_full_does_not_fit(front: _FrontEnd, tokens: int, max_tokens: int | None) -> None:
    with pytest.raises(VLLMValidationError, match=f"prompt of {tokens} tokens.*128 tokens"):
        front.both(tokens, _params(max_tokens, kv_policy="full"))


def test_refusals_are_client_errors_that_name_the_option(front: _FrontEnd) -> None:
    with pytest.raises(VLLMValidationError, match="use 64 or fewer") as error:
        front.both(10, _params(sink_tokens=65))

    assert error.value.parameter == "vllm_xargs.sink_tokens"


def test_a_stream_larger_than_the_pool(tiny_llama: Callable[[TinyLlama], Path]) -> None:
    front = _FrontEnd(tiny_llama(TinyLlama()), POLICY, 6)  # 5 pages beside vLLM's null block

    assert front.both(10, _params(sink_tokens=32)).sampling_params.extra_args is not None
    with pytest.raises(VLLMValidationError, match="6 KV cache pages"):
        front.both(10, _params(sink_tokens=33))
    unknown = _FrontEnd(tiny_llama(TinyLlama()), POLICY, None)
    assert unknown.both(10, _params(sink_tokens=33))


@pytest.mark.parametrize(
    ("xargs", "pinned", "expected"),
    [
        ({"sink_pin": "system"}, 40, {"sink_tokens": 40, "sink_window": 56}),
        ({"sink_pin": "system"}, 0, None),  # no system message: the server's own sink tokens
        ({"sink_pin": "none"}, 40, None),
        ({}, 40, None),  # the server does not pin by default
    ],
)
def test_a_pin_becomes_sink_tokens(
    front: _FrontEnd, xargs: dict[str, Any], pinned: int, expected: dict[str, int] | None
) -> None:
    assert front.both(300, _params(**xargs), pinned).sampling_params.extra_args == expected


@pytest.mark.parametrize(
    ("xargs", "expected"),
    [
        ({}, {"sink_tokens": 40, "sink_window": 56}),
        ({"sink_window": 40}, {"sink_tokens": 40, "sink_window": 40}),
        ({"sink_tokens": 9}, {"sink_tokens": 9, "sink_window": 87}),
        ({"sink_pin": "none"}, None),
        ({"kv_policy": "full"}, {"kv_policy": "full"}),
    ],
)
def test_a_server_that_pins(
    tiny_llama: Callable[[TinyLlama], Path], xargs: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    """What the request says itself comes first."""
    front = _FrontEnd(tiny_llama(TinyLlama()), {**POLICY, "sink_pin": "system"}, 32)

    assert front.both(60, _params(**xargs), 40).sampling_params.extra_args == expected
    assert front.both(60, _params()).sampling_params.extra_args is None  # a plain completion


def test_a_pin_that_nobody_found(front: _FrontEnd) -> None:
    with pytest.raises(VLLMValidationError, match="needs chat messages"):
        front.both(300, _params(sink_pin="system"))


@pytest.mark.parametrize(
    "xargs", [{"kv_policy": "sink"}, {"sink_tokens": 4}, {"sink_window": 4}, {"sink_pin": "system"}]
)
def test_a_server_without_the_policy_says_so(stock: _FrontEnd, xargs: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match="started with --kv-policy sink"):
        stock.both(10, _params(**xargs))


@pytest.mark.parametrize("xargs", [{}, {"kv_policy": "full"}, {"sink_pin": "none"}, {"sink": 1}])
def test_a_server_without_the_policy_is_stock(stock: _FrontEnd, xargs: dict[str, Any]) -> None:
    assert stock.both(10, _params(**xargs)).sampling_params.extra_args == (xargs or None)


# -- guards -------------------------------------------------------------------------------------


def test_guard_generate_takes_prompt_and_parameters() -> None:
    parameters = list(inspect.signature(AsyncLLM.generate).parameters)

    assert parameters[:4] == ["self", "prompt", "sampling_params", "request_id"]


@pytest.mark.parametrize("handler", [OpenAIServingChat, OpenAIServingCompletion])
def test_guard_handlers_call_generate_before_they_respond(handler: type) -> None:
    """``engine_client.generate(…)`` is called by the coroutine that answers, not by a stream."""
    name = "_create_chat_completion" if handler is OpenAIServingChat else "_create_completion"
    method = getattr(handler, name, None) or handler.create_completion  # type: ignore[attr-defined]

    assert inspect.iscoroutinefunction(method)
    assert "self.engine_client.generate(" in inspect.getsource(method)


@pytest.mark.parametrize("protocol", [ChatCompletionRequest, CompletionRequest])
def test_guard_extra_arguments_reach_the_sampling_parameters(protocol: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    if protocol is CompletionRequest:
        body = {"prompt": "a"}  # type: ignore[dict-item]
    request = protocol(**body, vllm_xargs={"sink_tokens": 5, "kv_policy": "sink"})

    params = request.to_sampling_params(5, {})

    assert params.extra_args == {"sink_tokens": 5, "kv_policy": "sink"}
    assert isinstance(params.extra_args["sink_tokens"], int)


# -- --sink-max-stream-tokens -------------------------------------------------------------------

MOST = 200


@pytest.fixture(scope="module")
def bounded(tiny_llama: Callable[[TinyLlama], Path]) -> _FrontEnd:
    return _FrontEnd(tiny_llama(TinyLlama()), POLICY | {"sink_max_stream_tokens": MOST}, 32)


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "xargs", "expected"),
    [
        (50, None, {}, 150),
        (50, FRONT_MAX - 50, {}, 150),  # what vLLM's handlers fill in
        (50, 10**12, {}, 150),
        (50, 151, {}, 150),
        (50, 149, {}, 149),
        (199, None, {}, 1),
        # Nothing is evicted: the capacity of 128 tokens is less than the bound.
        (50, None, {"kv_policy": "full"}, 78),
        (50, 78, {"kv_policy": "full"}, 78),
    ],
)
def test_output_is_cut_where_the_bound_is(
    bounded: _FrontEnd, tokens: int, max_tokens: int | None, xargs: dict[str, Any], expected: int
) -> None:
    assert bounded.both(tokens, _params(max_tokens, **xargs)).sampling_params.max_tokens == expected


def test_minimum_output_is_cut_too(bounded: _FrontEnd) -> None:
    params = SamplingParams(max_tokens=1000, min_tokens=500)

    request = bounded.both(50, params)

    assert request.sampling_params.min_tokens == request.sampling_params.max_tokens == 150
    assert (params.max_tokens, params.min_tokens) == (1000, 500)  # the caller's own


@pytest.mark.parametrize("tokens", [MOST, MOST + 1, 100_000])
@pytest.mark.parametrize("xargs", [{}, {"sink_tokens": 40}])
def test_a_prompt_that_leaves_no_room(
    bounded: _FrontEnd, tokens: int, xargs: dict[str, Any]
) -> None:
    with pytest.raises(VLLMValidationError) as error:
        bounded.both(tokens, _params(1, **xargs))

    assert error.value.parameter == "prompt"
    assert str(error.value).startswith(
        f"--sink-max-stream-tokens=200: a prompt of {tokens} tokens leaves no room for output in "
        "the 200 tokens of prompt and output that this server allows a request; send at most 199 "
        "tokens, or use a server with a larger --sink-max-stream-tokens."
    )


def test_a_bound_below_the_capacity(tiny_llama: Callable[[TinyLlama], Path]) -> None:
    front = _FrontEnd(tiny_llama(TinyLlama()), POLICY | {"sink_max_stream_tokens": 100}, 32)
    full = {"kv_policy": "full"}

    assert front.both(60, _params(None, **full)).sampling_params.max_tokens == 40
    with pytest.raises(VLLMValidationError, match=r"--sink-max-stream-tokens=100: .* 99 tokens"):
        front.both(100, _params(None, **full))
