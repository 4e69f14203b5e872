"""Turns the options into engine settings while vLLM builds its configuration.

``EngineArgs.create_engine_config`` is the one place every way of starting vLLM goes through
before anything is derived from ``max_model_len``. With the policy off the original runs
untouched. With it on, the bounded sequence becomes the engine's ``max_model_len``, and scheduler
and worker become ours.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sink_vllm.compat.parts import CPU_WORKER, GPU_WORKER, SCHEDULER, check_config
from sink_vllm.compat.patching import Patch
from sink_vllm.gate.check import check
from sink_vllm.gate.facts import Facts, facts_of, model_facts
from sink_vllm.gate.refused import Refused, refusals
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import SinkOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_CPU_BLOCK_MULTIPLE = 32  # vLLM's CPU attention takes nothing else
_CPU_LATENT_BLOCK_SIZE = 16
_CPU_BLOCK_SIZES = (128, 64, 32)  # the last one divides the others
_GPU_BLOCK_SIZE = 16  # vLLM's default
_BLOCKS_PER_STREAM = 8  # fewer make the default stride a large part of the cache


def _wrap_create_engine_config(
    original: Callable[..., "VllmConfig"],
) -> Callable[..., "VllmConfig"]:
    def create_engine_config(self: "EngineArgs", *args: Any, **kwargs: Any) -> "VllmConfig":
        with refusals():
            options = SinkOptions.parse(self.additional_config)
        if options is None:
            return original(self, *args, **kwargs)
        _refuse_own_classes(self)
        config, trained_len = _resolve(self, options)
        with _engine_settings(self, config, trained_len):
            vllm_config = original(self, *args, **kwargs)
        _finish(vllm_config, config, trained_len)
        return vllm_config

    return create_engine_config


def _refuse_own_classes(engine_args: "EngineArgs") -> None:
    for option, value, default in (
        ("--scheduler-cls", engine_args.scheduler_cls, (None, SCHEDULER)),
        ("--worker-cls", engine_args.worker_cls, ("auto", CPU_WORKER, GPU_WORKER)),
    ):
        if value not in default:
            raise Refused(
                f"{option}={value!r} contradicts --kv-policy sink, which brings its own; "
                f"drop one of the two."
            )


def _resolve(engine_args: "EngineArgs", options: SinkOptions) -> tuple[SinkConfig, int]:
    """Decide every number, after refusing models the policy does not work with.

    Returns:
        The policy, and the length the model was trained for (tokens).
    """
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
    trained_len = model_config.max_model_len
    limit = trained_len if given_len is None else given_len
    block_size = _block_size(engine_args, options, limit, model_config.use_mla)
    with refusals():
        config = SinkConfig.resolve(
            options, block_size=block_size, trained_len=trained_len, max_model_len=given_len
        )
    return config, trained_len


def _block_size(engine_args: "EngineArgs", options: SinkOptions, limit: int, latent: bool) -> int:
    """Tokens per KV page; ``limit`` bounds the capacity (tokens), ``latent`` is for MLA.

    A choice of ours is given to vLLM explicitly, because it may otherwise change the block size
    when it picks the attention backend, after the stride has been decided.
    """
    from vllm.platforms import current_platform

    given: int | None = engine_args.block_size
    if latent and current_platform.is_cpu():
        if given not in (None, _CPU_LATENT_BLOCK_SIZE):
            raise Refused(
                f"--block-size={given} is not {_CPU_LATENT_BLOCK_SIZE}, the only size of a page "
                f"that vLLM's latent attention (MLA) takes on CPUs; use {_CPU_LATENT_BLOCK_SIZE}, "
                f"or drop --block-size."
            )
        return _CPU_LATENT_BLOCK_SIZE
    if given is not None:
        if current_platform.is_cpu() and given % _CPU_BLOCK_MULTIPLE:
            raise Refused(
                f"--block-size={given} is not a multiple of {_CPU_BLOCK_MULTIPLE}, which vLLM's "
                f"CPU attention asks for; use one of {', '.join(map(str, _CPU_BLOCK_SIZES))}, or "
                "drop --block-size."
            )
        return given
    if not current_platform.is_cpu():
        return _GPU_BLOCK_SIZE
    if options.sink_window is None:
        capacity = limit
    else:
        asked = options.sink_tokens + options.sink_window + (options.sink_stride or 0)
        capacity = min(asked, limit)  # what is above is refused, and not because of the block
    for block_size in _CPU_BLOCK_SIZES:
        fits_stride = options.sink_stride is None or options.sink_stride % block_size == 0
        if fits_stride and block_size * _BLOCKS_PER_STREAM <= capacity:
            return block_size
    return _CPU_BLOCK_SIZES[-1]


@contextmanager
def _engine_settings(
    engine_args: "EngineArgs", config: SinkConfig, trained_len: int
) -> Iterator[None]:
    """``engine_args`` with the settings of the policy; the user's own come back afterwards.

    vLLM may build the configuration twice from the same arguments (once to look, once to run).
    """
    from vllm.platforms import current_platform

    settings = {
        "max_model_len": _given_len(config, trained_len),
        "block_size": config.block_size,
        "scheduler_cls": SCHEDULER,
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
        "additional_config": engine_args.additional_config | config.as_additional_config(),
    }
    own = {name: getattr(engine_args, name) for name in settings}
    for name, value in settings.items():
        setattr(engine_args, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(engine_args, name, value)


def _given_len(config: SinkConfig, trained_len: int) -> int:
    """vLLM takes no more than the trained length; ``_finish`` adds the last token."""
    return min(config.max_model_len, trained_len)


def _finish(vllm_config: "VllmConfig", config: SinkConfig, trained_len: int) -> None:
    """Refuse what only the finished configuration shows, and make it carry the plugin."""
    from sink_vllm.compat.shipping import ShippedConfig
    from sink_vllm.ray.choose import choose_executor

    check(facts_of(vllm_config))
    block_size = vllm_config.cache_config.block_size
    if block_size != config.block_size:
        raise Refused(
            f"--block-size={config.block_size} was changed to {block_size} by vLLM for this "
            f"model and platform; set --block-size {block_size}, and --sink-stride to a multiple "
            "of it."
        )
    check_config(vllm_config, config, _given_len(config, trained_len))
    # The cache holds capacity <= trained length tokens. The one more is room for the token that
    # has been sampled and evicts before it is computed: no untrained position is ever used.
    vllm_config.model_config.max_model_len = config.max_model_len
    scheduler = vllm_config.scheduler_config
    if not scheduler.enable_chunked_prefill:
        # A prompt is begun in one step or not at all, also while all others decode.
        whole = config.max_model_len + scheduler.max_num_seqs
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, whole)
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
