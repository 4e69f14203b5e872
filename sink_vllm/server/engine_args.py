"""Turns the options into engine settings while vLLM builds its configuration.

``EngineArgs.create_engine_config`` is the one place every way of starting vLLM goes through
before anything is derived from ``max_model_len``. With the policy off the original runs
untouched. With it on, the bounded sequence becomes the engine's ``max_model_len``, and scheduler
and worker become ours.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sink_vllm.compat.parts import CPU_WORKER, GPU_WORKER, SCHEDULER, check_config
from sink_vllm.compat.patching import Patch
from sink_vllm.gate.check import check
from sink_vllm.gate.facts import Facts, facts_of
from sink_vllm.gate.lengths import bound_of
from sink_vllm.gate.model_facts import model_facts
from sink_vllm.gate.refused import Refused, refusals
from sink_vllm.policy.bound import Bound
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import SinkOptions
from sink_vllm.server.block_size import named_block_size, settled_block_size
from sink_vllm.server.streams.opening import prepare

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def _wrap_create_engine_config(
    original: Callable[..., "VllmConfig"],
) -> Callable[..., "VllmConfig"]:
    def create_engine_config(self: "EngineArgs", *args: Any, **kwargs: Any) -> "VllmConfig":
        with refusals():
            options = SinkOptions.parse(self.additional_config)
        if options is None:
            return original(self, *args, **kwargs)
        _refuse_own_classes(self)
        model = _look_at_model(self, options)
        config = _resolve(self, options, model, model.block_size)
        with _engine_settings(self, config, model):
            vllm_config = original(self, *args, **kwargs)
        settled = settled_block_size(vllm_config)
        if settled != config.block_size:
            config = _resolve(self, options, model, settled)
            with _engine_settings(self, config, model):
                vllm_config = original(self, *args, **kwargs)
        _finish(vllm_config, config, model.longest)
        call = inspect.signature(original).bind(self, *args, **kwargs).arguments
        if _is_of_api_server(self, call.get("usage_context")) and not call.get("headless"):
            prepare(vllm_config)
        return vllm_config

    return create_engine_config


def _is_of_api_server(engine_args: "EngineArgs", usage_context: Any) -> bool:
    """Not of ``vllm preload``, say, which has the context but starts no engine to be asked."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    return (
        isinstance(engine_args, AsyncEngineArgs) and usage_context is UsageContext.OPENAI_API_SERVER
    )


def _refuse_own_classes(engine_args: "EngineArgs") -> None:
    for option, value, default in (
        ("--scheduler-cls", engine_args.scheduler_cls, (None, SCHEDULER)),
        ("--worker-cls", engine_args.worker_cls, ("auto", CPU_WORKER, GPU_WORKER)),
        ("--mamba-cache-mode", engine_args.mamba_cache_mode, (None, "none")),
    ):
        if value not in default:
            raise Refused(
                f"{option}={value!r} contradicts --kv-policy sink, which brings its own; "
                f"drop one of the two."
            )


class _Model(NamedTuple):
    """What has to be known of a model before anything is decided."""

    bound: Bound
    """Of the capacity."""
    longest: int
    """The largest ``max_model_len`` that vLLM takes."""
    named_block_size: int | None
    """Tokens per KV page that vLLM is told; ``None`` where vLLM decides."""
    recurrent: bool
    """Whether it has recurrent layers beside attention."""

    @property
    def block_size(self) -> int:
        """The same, as far as it is known before vLLM has been asked."""
        from vllm.config import CacheConfig

        return self.named_block_size or CacheConfig.DEFAULT_BLOCK_SIZE


def _look_at_model(engine_args: "EngineArgs", options: SinkOptions) -> _Model:
    """Refuse models the policy does not work with, and say what is to be known of the others."""
    given_len: int | None = engine_args.max_model_len  # vLLM types it as int, with default None
    if given_len == -1:
        raise Refused(
            "--max-model-len=auto leaves the length to the free memory, but --kv-policy sink "
            "needs to know the size of its cache; give a number, or drop --max-model-len."
        )
    probe = copy.copy(engine_args)
    probe.max_model_len = None  # type: ignore[assignment]
    model_config = probe.create_model_config()
    check(Facts(**model_facts(model_config)))
    bound = bound_of(model_config)
    limit, _ = bound.limit(options.sink_window, given_len)
    named = named_block_size(engine_args.block_size, options, limit, model_config.use_mla)
    longest = max(model_config.max_model_len, bound.most)
    return _Model(bound, longest, named, model_config.is_hybrid)


def _resolve(
    engine_args: "EngineArgs", options: SinkOptions, model: _Model, block_size: int
) -> SinkConfig:
    """Decide every number, for pages of ``block_size`` tokens."""
    with refusals():
        return SinkConfig.resolve(
            options,
            block_size=block_size,
            bound=model.bound,
            max_model_len=engine_args.max_model_len,
            states=model.recurrent,
        )


@contextmanager
def _engine_settings(
    engine_args: "EngineArgs", config: SinkConfig, model: _Model
) -> Iterator[None]:
    """``engine_args`` with the settings of the policy; the user's own come back afterwards.

    vLLM may build the configuration twice from the same arguments (once to look, once to run).
    """
    from vllm.platforms import current_platform

    settings = {
        "max_model_len": _given_len(config, model.longest),
        "block_size": model.named_block_size,
        "scheduler_cls": SCHEDULER,
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
        "additional_config": engine_args.additional_config | config.as_additional_config(),
    }
    whole_prompts = engine_args.enable_chunked_prefill is False
    if model.recurrent and whole_prompts and engine_args.enable_prefix_caching is None:
        # What is wrong with that is said below; vLLM would fail an assertion about states first.
        settings["enable_prefix_caching"] = False
    own = {name: getattr(engine_args, name) for name in settings}
    for name, value in settings.items():
        setattr(engine_args, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(engine_args, name, value)


def _given_len(config: SinkConfig, longest: int) -> int:
    """vLLM takes no more than the trained length; ``_finish`` adds the last token."""
    return min(config.max_model_len, longest)


def _finish(vllm_config: "VllmConfig", config: SinkConfig, longest: int) -> None:
    """Refuse what only the finished configuration shows, and make it carry the plugin."""
    from sink_vllm.compat.disk_folder import check_folder
    from sink_vllm.compat.shipping import ShippedConfig
    from sink_vllm.ray.choose import choose_executor

    check(facts_of(vllm_config))
    # The workers will say the same; until then vLLM has its default there.
    vllm_config.cache_config.block_size = config.block_size
    check_config(vllm_config, config, _given_len(config, longest))
    # The cache holds capacity <= trained length tokens. The one more is room for the token that
    # has been sampled and evicts before it is computed: no untrained position is ever used.
    vllm_config.model_config.max_model_len = config.max_model_len
    if vllm_config.model_config.is_hybrid:
        # Tokens after which a stream would get another page for its state: more than it ever has.
        vllm_config.cache_config.mamba_block_size = config.max_model_len
        # One state per stream also where prefixes are kept: vLLM would find the others by cache
        # positions, which evictions shift (`engine/states.py`).
        vllm_config.cache_config.mamba_cache_mode = "none"
    scheduler = vllm_config.scheduler_config
    if not scheduler.enable_chunked_prefill:
        # A prompt is begun in one step or not at all, also while all others decode.
        whole = config.max_model_len + scheduler.max_num_seqs
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, whole)
    with refusals():
        check_folder(config, vllm_config)
    choose_executor(vllm_config.parallel_config)
    vllm_config.additional_config = ShippedConfig(
        cast(dict[str, Any], vllm_config.additional_config)
    )


PATCHES = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        wrapper=_wrap_create_engine_config,
        record="0002-engine-args-create-engine-config",
    ),
)
