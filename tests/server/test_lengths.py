"""The front end has no length limit under the policy; the engine keeps its own."""

import asyncio
import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient, MPClient
from vllm.v1.engine.llm_engine import LLMEngine

from sink_vllm.server import front_end, lengths
from sink_vllm.server.lengths import FRONT_MAX, engine_view, front_view, policy_of
from tests.support.tiny_models import TinyLlama

POLICY = {"kv_policy": "sink", "sink_tokens": 4, "sink_window": 92, "sink_stride": 32}
CAPACITY = 4 + 92 + 32


@pytest.fixture(scope="module")
def config_with(tiny_llama: Callable[[TinyLlama], Path]) -> Callable[..., VllmConfig]:
    def make(additional_config: dict[str, Any]) -> VllmConfig:
        model = str(tiny_llama(TinyLlama()))
        return EngineArgs(
            model=model, block_size=32, additional_config=additional_config
        ).create_engine_config()

    return make


@pytest.fixture(scope="module")
def engine_config(config_with: Callable[..., VllmConfig]) -> VllmConfig:
    return config_with(POLICY)


@pytest.fixture(scope="module")
def stock_config(config_with: Callable[..., VllmConfig]) -> VllmConfig:
    return config_with({"somebody_elses": 1})


def test_front_end_gets_a_copy_without_the_limit(engine_config: VllmConfig) -> None:
    front = front_view(engine_config)

    assert front.model_config.max_model_len == FRONT_MAX
    assert engine_config.model_config.max_model_len == CAPACITY + 1
    assert front.cache_config is engine_config.cache_config  # updates by the engine are seen
    for config in (front, front.model_config):
        policy = policy_of(config)
        assert policy is not None
        assert policy.capacity == CAPACITY


def test_engine_gets_the_original_back(engine_config: VllmConfig) -> None:
    front = front_view(engine_config)

    assert engine_view(front) is engine_config
    assert engine_view(engine_config) is engine_config
    assert front_view(front) is front


def test_view_survives_a_copy(engine_config: VllmConfig) -> None:
    """Data parallelism over Ray copies configurations deeply."""
    front = copy.deepcopy(front_view(engine_config))

    assert engine_view(front).model_config.max_model_len == CAPACITY + 1


def test_policy_off_changes_nothing(stock_config: VllmConfig) -> None:
    before = copy.copy(vars(stock_config))

    assert front_view(stock_config) is stock_config
    assert engine_view(stock_config) is stock_config
    assert policy_of(stock_config) is None
    assert policy_of(stock_config.model_config) is None
    assert vars(stock_config) == before


def test_clients_are_given_the_engines_configuration(engine_config: VllmConfig) -> None:
    front = front_view(engine_config)
    make_client = lengths._wrap_make_client(lambda *args, **kwargs: (args, kwargs))

    assert make_client(True, front, log_stats=True) == ((True, engine_config), {"log_stats": True})
    assert make_client(1, vllm_config=front)[1]["vllm_config"] is engine_config


class _Front:
    """Has the constructor arguments that ``AsyncLLM`` and ``LLMEngine`` share."""

    output_processor: Any = None

    def __init__(
        self,
        vllm_config: VllmConfig,
        executor_class: Any,
        log_stats: bool,
        stat_loggers: list[Any] | None = None,
    ) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.seen = (vllm_config, executor_class, log_stats, stat_loggers)
        self.output_processor = OutputProcessor(None, log_stats=False)


def test_constructor_with_the_policy(engine_config: VllmConfig) -> None:
    from sink_vllm.server.memory import EndlessOutputProcessor
    from sink_vllm.server.metrics import StreamingLLMStatLogger

    front = _Front.__new__(_Front)
    front_end._wrap_init(_Front.__init__)(front, engine_config, None, log_stats=True)

    assert front.seen[0].model_config.max_model_len == FRONT_MAX
    assert front.seen[3] == [StreamingLLMStatLogger]
    assert type(front.output_processor) is EndlessOutputProcessor


def test_constructor_without_statistics_gets_no_logger(engine_config: VllmConfig) -> None:
    """A logger would switch them on."""
    front = _Front.__new__(_Front)
    front_end._wrap_init(_Front.__init__)(front, engine_config, None, False)

    assert front.seen[2:] == (False, None)


def test_constructor_without_the_policy(stock_config: VllmConfig) -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    front = _Front.__new__(_Front)
    front_end._wrap_init(_Front.__init__)(front, stock_config, "executor", log_stats=True)

    assert front.seen == (stock_config, "executor", True, None)
    assert type(front.output_processor) is OutputProcessor


@pytest.mark.parametrize("request_class", [CompletionRequest, ChatCompletionRequest])
@pytest.mark.parametrize("max_tokens", [1, CAPACITY, 10**6, FRONT_MAX])
def test_handlers_accept_any_length(
    engine_config: VllmConfig, request_class: Any, max_tokens: int
) -> None:
    front = front_view(engine_config).model_config
    content: dict[str, Any] = (
        {"prompt": "a"} if request_class is CompletionRequest else {"messages": []}
    )
    request = request_class(model="m", max_tokens=max_tokens, **content)

    tok_params = request.build_tok_params(front)

    assert tok_params.apply_post_tokenization(None, {"prompt_token_ids": [1] * 5000})
    room = get_max_tokens(front.max_model_len, max_tokens, 5000, {})
    assert room == min(max_tokens, FRONT_MAX - 5000)


@pytest.mark.parametrize("max_tokens", [FRONT_MAX + 1, 2**63, 2**100])
def test_absurd_max_tokens_are_refused(engine_config: VllmConfig, max_tokens: int) -> None:
    request = CompletionRequest(model="m", seed=None, prompt="a", max_tokens=max_tokens)

    with pytest.raises(VLLMValidationError, match="max_tokens"):
        request.build_tok_params(front_view(engine_config).model_config)


def test_omitted_max_tokens(engine_config: VllmConfig) -> None:
    """Chat: to the end, or what the generation configuration says; completions: 16 as ever."""
    limit = front_view(engine_config).model_config.max_model_len

    assert get_max_tokens(limit, None, 100, {}) == FRONT_MAX - 100
    assert get_max_tokens(limit, None, 100, {"max_tokens": 50}) == 50
    assert get_max_tokens(limit, 70, 100, {}, override_max_tokens=60) == 60
    assert CompletionRequest(model="m", seed=None, prompt="a").max_tokens == 16


def _cards(config: VllmConfig) -> list[int | None]:
    registry = OpenAIModelRegistry(config.model_config, [BaseModelPath("m", "/m")])
    wrapped = lengths._wrap_show_available_models(type(registry).show_available_models)
    return [card.max_model_len for card in asyncio.run(wrapped(registry)).data]


def test_models_state_the_limit_that_clients_meet(
    config_with: Callable[..., VllmConfig], engine_config: VllmConfig, stock_config: VllmConfig
) -> None:
    bounded = config_with(POLICY | {"sink_max_stream_tokens": 5000})

    assert _cards(front_view(engine_config)) == [None]
    assert _cards(front_view(bounded)) == [5000]
    assert _cards(stock_config) == [stock_config.model_config.max_model_len]


def test_guard_constructors_build_the_front_end_from_their_argument() -> None:
    """Everything in them is made from ``vllm_config``, and the client is asked for by class."""
    for cls, make in ((AsyncLLM, "make_async_mp_client"), (LLMEngine, "make_client")):
        parameters = inspect.signature(cls.__init__).parameters
        assert {"vllm_config", "log_stats", "stat_loggers"} <= parameters.keys()
        source = inspect.getsource(cls.__init__)
        for expected in (
            "self.vllm_config = vllm_config",
            "self.model_config = vllm_config.model_config",
            "renderer_from_config(self.vllm_config)",
            "InputProcessor(self.vllm_config, renderer)",
            "self.output_processor = OutputProcessor(",
            f"EngineCoreClient.{make}(",
            "vllm_config=vllm_config",
        ):
            assert expected in source, f"{cls.__name__}: {expected}"


def test_guard_engines_are_made_from_what_the_client_is_given() -> None:
    for make in (EngineCoreClient.make_client, EngineCoreClient.make_async_mp_client):
        assert "vllm_config" in inspect.signature(make).parameters
    assert "launch_core_engines(" in inspect.getsource(MPClient.__init__)


def test_guard_ready_response_lowers_the_limit_of_the_given_config() -> None:
    """Why the client must not see the front end's copy."""
    source = inspect.getsource(MPClient._apply_ready_response)

    assert "vllm_config = self.vllm_config" in source
    assert "vllm_config.model_config.max_model_len = min(" in source


def test_guard_model_cards_may_leave_the_limit_out() -> None:
    assert ModelCard(id="m", max_model_len=None).max_model_len is None
    source = inspect.getsource(OpenAIModelRegistry.show_available_models)
    assert "max_model_len=max_model_len" in source
