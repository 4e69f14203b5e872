"""vLLM's layers of latent attention with pages of their own, without a model or a GPU."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheLayout, MLAAttentionSpec

from benchmarks.gpu.pages import Backend
from benchmarks.kv_buffer import kv_caches
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import Rotation

LATENT, ROTATED, LAYERS, BLOCKS = 512, 64, 2, 8  # rows of DeepSeek's models


def frequencies() -> torch.Tensor:
    """Of the layers' rotation, which pairs neighbours."""
    half = ROTATED // 2
    return 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)


def turned(keys: torch.Tensor, by: torch.Tensor | float) -> torch.Tensor:
    """Rotated parts ``[..., 64]``, turned by positions ``[...]``, in float64."""
    angles = torch.as_tensor(by, dtype=torch.float64)[..., None] * frequencies()
    pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def latent_layers(
    backend: str, dtype: str, size: int, layout: KVCacheLayout = KVCacheLayout.LBNHC
) -> list[AttentionLayer]:
    """Layers of ``backend`` with pages of ``size`` tokens, in one buffer."""
    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        rotary: Any = get_rope(
            ROTATED, 512, is_neox_style=False, rope_parameters={"rope_theta": 10000.0}
        )
    layers = []
    without_warm_up: Any = SimpleNamespace(kernel_config=SimpleNamespace(enable_jit_warmup=False))
    for index in range(LAYERS):
        module: Any = MLAAttention.__new__(MLAAttention)
        nn.Module.__init__(module)
        module.kv_lora_rank, module.qk_rope_head_dim = LATENT, ROTATED
        module.head_size, module.kv_cache_dtype = LATENT + ROTATED, dtype
        module.sliding_window = module.indexer = module.topk_buffer_width = None
        module.non_causal_multi_token_decode = False
        module._vllm_config = without_warm_up
        module.attn_backend = Backend(backend)
        name = f"model.layers.{index}.self_attn.attn"
        layers.append(AttentionLayer(name, module, Rotation(rotary, name)))
    asked: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=size), model_config=None)
    spec = layers[0].module.get_kv_cache_spec(asked)
    assert type(spec) is MLAAttentionSpec
    spec = MLACommonBackend.customize_spec(spec)
    views = kv_caches(spec, [one.name for one in layers], BLOCKS, layout, torch.device("cpu"))
    for layer in layers:
        layer.module.bind_kv_cache(views[layer.name])
    return layers
