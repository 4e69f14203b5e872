"""The front end's own view of the configuration, in which lengths have no limit.

The engine's ``max_model_len`` is ``C + 1``, the bounded sequence. Everything in the front end that
compares lengths (renderers, tokenization, OpenAI handlers, input processor) reads
``max_model_len`` from the configuration handed to ``AsyncLLM`` or ``LLMEngine``; everything that
starts an engine reads the configuration handed to ``EngineCoreClient``. So the front end gets a
copy of the configuration with a limit nobody reaches, and the engine client gets the original
back::

    create_engine_config ──► AsyncLLM / LLMEngine (front view) ──► EngineCoreClient (engine's own)
        C + 1                    FRONT_MAX                             C + 1

The copy is shallow: what the engine reports back at start-up (``cache_config``) is shared.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import MOST_STREAM_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FRONT_MAX = MOST_STREAM_TOKENS
"""The limit that the front end sees. ``--sink-max-stream-tokens`` is enforced per request instead
(``sink_vllm.server.options``), whose refusal names the option."""

_ATTRIBUTE = "_streaming_llm_front_view"


@dataclass(frozen=True, slots=True)
class FrontView:
    """What a front-end copy of a ``VllmConfig`` remembers."""

    engine_config: "VllmConfig"
    policy: SinkConfig


def front_view(vllm_config: "VllmConfig") -> "VllmConfig":
    """The configuration the front end works with; ``vllm_config`` itself when the policy is off.

    Raises:
        ValueError: the policy is on but was not resolved by ``create_engine_config``.
    """
    if _view_of(vllm_config) is not None or not isinstance(vllm_config.additional_config, dict):
        return vllm_config
    policy = SinkConfig.of(vllm_config)
    if policy is None:
        return vllm_config
    view = FrontView(vllm_config, policy)
    front = copy.copy(vllm_config)
    front.model_config = copy.copy(vllm_config.model_config)
    front.model_config.max_model_len = FRONT_MAX
    # On both: the handlers of /v1/models see the model's configuration only.
    setattr(front, _ATTRIBUTE, view)
    setattr(front.model_config, _ATTRIBUTE, view)
    return front


def engine_view(vllm_config: "VllmConfig") -> "VllmConfig":
    """The configuration the engine works with, for either kind of ``vllm_config``."""
    view = _view_of(vllm_config)
    return vllm_config if view is None else view.engine_config


def policy_of(config: Any) -> SinkConfig | None:
    """The policy of a front-end ``VllmConfig`` or ``ModelConfig``; ``None`` when it is off."""
    view = _view_of(config)
    return None if view is None else view.policy


def _view_of(config: Any) -> FrontView | None:
    view: FrontView | None = getattr(config, _ATTRIBUTE, None)
    return view


def _wrap_make_client(original: Callable[..., Any]) -> Callable[..., Any]:
    """For both constructors of engine clients, which differ in where the configuration stands."""

    def make_client(*args: Any, **kwargs: Any) -> Any:
        args = tuple(engine_view(arg) for arg in args)
        kwargs = {name: engine_view(value) for name, value in kwargs.items()}
        return original(*args, **kwargs)

    return make_client


def _wrap_show_available_models(original: Callable[..., Any]) -> Callable[..., Any]:
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        policy = policy_of(self.model_config)
        if policy is not None:
            for card in models.data:  # OpenAI clients read null as "not stated"
                card.max_model_len = policy.max_stream_tokens or None
        return models

    return show_available_models


PATCHES = (
    Patch(
        target="vllm.v1.engine.core_client:EngineCoreClient.make_client",
        wrapper=_wrap_make_client,
        record="0003-front-end-view-of-lengths",
    ),
    Patch(
        target="vllm.v1.engine.core_client:EngineCoreClient.make_async_mp_client",
        wrapper=_wrap_make_client,
        record="0003-front-end-view-of-lengths",
    ),
    Patch(
        target="vllm.entrypoints.openai.models.serving:OpenAIModelRegistry.show_available_models",
        wrapper=_wrap_show_available_models,
        record="0004-model-cards",
    ),
)
