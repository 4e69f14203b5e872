"""Tokens per KV page: what start-up may choose, and what vLLM will make of it.

vLLM decides late, in the workers, when the layers of the loaded model have named their attention
backends (``Platform.update_block_size_for_backend``); engine core and front end are told. The
stride is a multiple of the page and is needed at start-up, so vLLM's decision is asked for before.
Naming a size to vLLM instead would decide more than pages: a size that was named rules out the
backends, and kernels, that take another.
"""

import copy
from typing import TYPE_CHECKING, cast

from sink_vllm.gate.refused import Refused
from sink_vllm.policy.options import SinkOptions

if TYPE_CHECKING:
    import torch
    from vllm.config import CacheConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

_CPU_BLOCK_MULTIPLE = 32  # vLLM's CPU attention takes nothing else
_CPU_LATENT_BLOCK_SIZE = 16
_CPU_BLOCK_SIZES = (128, 64, 32)  # the last one divides the others
_BLOCKS_PER_STREAM = 8  # fewer make the default stride a large part of the cache


def named_block_size(
    given: int | None, options: SinkOptions, limit: int, latent: bool
) -> int | None:
    """Tokens per page that vLLM is to be told: the user's own, or on CPUs one that suits the cache.

    Args:
        given: ``--block-size``.
        options: of the policy.
        limit: bounds the capacity (tokens).
        latent: multi-head latent attention (MLA).

    Returns:
        ``None`` where vLLM decides.

    Raises:
        Refused: the user's own is none that vLLM's CPU attention takes.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return given
    if latent:
        if given not in (None, _CPU_LATENT_BLOCK_SIZE):
            raise Refused(
                f"--block-size={given} is not {_CPU_LATENT_BLOCK_SIZE}, the only size of a page "
                f"that vLLM's latent attention (MLA) takes on CPUs; use {_CPU_LATENT_BLOCK_SIZE}, "
                f"or drop --block-size."
            )
        return _CPU_LATENT_BLOCK_SIZE
    if given is not None:
        if given % _CPU_BLOCK_MULTIPLE:
            raise Refused(
                f"--block-size={given} is not a multiple of {_CPU_BLOCK_MULTIPLE}, which vLLM's "
                f"CPU attention asks for; use one of {', '.join(map(str, _CPU_BLOCK_SIZES))}, or "
                "drop --block-size."
            )
        return given
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


def settled_block_size(vllm_config: "VllmConfig") -> int:
    """Tokens per page that vLLM's workers will settle on.

    It is their own function that answers, on a copy, with stand-ins for the model's layers: one for
    each kind of attention window the model has. What only a loaded layer knows, such as learned
    softmax sinks, may make it choose another backend, with other pages: ``SinkConfig.of`` refuses
    those that the stride does not fit.

    Args:
        vllm_config: finished, but for the numbers of the policy.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform

    class Layer(AttentionLayerBase):
        def __init__(self, backend: "type[AttentionBackend]") -> None:
            self.backend = backend

        def get_attn_backend(self) -> "type[AttentionBackend]":
            return self.backend

        def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> None:
            return None

    cache_config: CacheConfig = copy.copy(vllm_config.cache_config)
    layers = {str(index): Layer(one) for index, one in enumerate(backends_of(vllm_config))}
    if not layers:  # the worker, which knows the layers, says which and why
        return cache_config.block_size
    probe = copy.copy(vllm_config)
    probe.cache_config = cache_config
    probe.compilation_config = copy.copy(vllm_config.compilation_config)
    probe.compilation_config.static_forward_context = dict(layers)
    current_platform.update_block_size_for_backend(probe)
    return cache_config.block_size


def backends_of(vllm_config: "VllmConfig") -> "list[type[AttentionBackend]]":
    """The attention backends vLLM chooses, one for each kind of window the model has.

    Empty if there is none, or no GPU here, such as on the head node of a Ray cluster.
    """
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    if current_platform.is_cuda_alike() and current_platform.get_device_capability() is None:
        return []
    model = vllm_config.model_config
    try:
        with set_current_vllm_config(vllm_config):
            return [
                get_attn_backend(
                    model.get_head_size(),
                    cast("torch.dtype", model.dtype),
                    vllm_config.cache_config.cache_dtype,
                    use_mla=model.use_mla,
                    num_heads=model.get_num_attention_heads(vllm_config.parallel_config),
                    has_sliding_window=windowed,
                )
                for windowed in _windows(vllm_config)
            ]
    except ValueError:
        return []


def _windows(vllm_config: "VllmConfig") -> set[bool]:
    """Whether attention has a sliding window: of some layers, of all, or of none."""
    text = vllm_config.model_config.hf_text_config
    native = bool(getattr(text, "sliding_window", None))
    kinds = getattr(text, "layer_types", None) or ()
    return {native and kind == "sliding_attention" for kind in kinds} or {native}
