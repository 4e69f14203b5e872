"""Attention layers with KV pages, but without a model: for micro benchmarks and for tests.

Everything is vLLM's own: the ``Attention`` objects, their rotary module, the buffer
(``allocate_kv_cache``), and the op that writes keys and values (``do_kv_cache_update``).
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from benchmarks.kv_buffer import kv_caches
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import Rotation

DEFAULT_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(kw_only=True)
class PagedLayers:
    """``layers`` attention layers of one shape, with ``blocks`` pages of ``block_size`` tokens."""

    layers: int = 3
    kv_heads: int = 2
    head_size: int = 32
    block_size: int = 32
    blocks: int = 8
    dtype: torch.dtype = torch.float32
    kv_cache_dtype: CacheDType = "auto"
    rope: Mapping[str, Any] | None = field(default_factory=lambda: DEFAULT_ROPE)
    """``rope_parameters`` of the model's config; ``None``: no rotation."""
    is_neox: bool = True
    max_positions: int = 4096
    layout: KVCacheLayout = KVCacheLayout.LBHNC
    kernel_block_size: int | None = None

    def __post_init__(self) -> None:
        current_platform.import_kernels()
        with tempfile.TemporaryDirectory() as folder:
            self._llama_config().save_pretrained(folder)
            model_config = ModelConfig(folder, dtype=self.dtype, skip_tokenizer_init=True)
        self.config = VllmConfig(
            model_config=model_config,
            device_config=DeviceConfig("cpu"),
            cache_config=CacheConfig(block_size=self.block_size, cache_dtype=self.kv_cache_dtype),
        )
        self.names = [f"model.layers.{i}.self_attn.attn" for i in range(self.layers)]
        with set_current_vllm_config(self.config):
            self.modules = [self._attention(name) for name in self.names]
            self.rotary = (
                None
                if self.rope is None
                else get_rope(
                    self.head_size,
                    self.max_positions,
                    is_neox_style=self.is_neox,
                    rope_parameters=dict(self.rope),
                    dtype=self.dtype,
                )
            )
        self._bind()

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        rotation = None if self.rotary is None else Rotation(self.rotary, self.names[0])
        return [
            AttentionLayer(name, module, rotation)
            for name, module in zip(self.names, self.modules, strict=True)
        ]

    def _llama_config(self) -> LlamaConfig:
        """What the attention layers need to know of a model they could be in."""
        return LlamaConfig(
            hidden_size=self.kv_heads * self.head_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.kv_heads,
            head_dim=self.head_size,
            architectures=["LlamaForCausalLM"],
        )

    def _attention(self, name: str) -> Attention:
        module = Attention(
            self.kv_heads,
            self.head_size,
            1.0,
            self.kv_heads,
            cache_config=self.config.cache_config,
            prefix=name,
        )
        # As CPUAttentionMetadataBuilder does, which needs a model.
        isa = _get_attn_isa(self.dtype, self.block_size, self.head_size)
        module.isa = isa  # type: ignore[assignment]
        return module

    @property
    def spec(self) -> FullAttentionSpec:
        """What a model runner would say of one of the layers."""
        return FullAttentionSpec(
            block_size=self.block_size,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            dtype=kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, self.config.model_config),
        )

    def _bind(self) -> None:
        """Allocate one buffer and give every layer its view, as the model runners do."""
        device = torch.device("cpu")
        views = kv_caches(
            self.spec, self.names, self.blocks, self.layout, device, self.kernel_block_size
        )
        for name, module in zip(self.names, self.modules, strict=True):
            module.bind_kv_cache(views[name])

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Write ``[layers, tokens, heads, head_size]`` with the backend's own cache-write op.

        ``slots`` are int64 ``[tokens]``: page times ``block_size`` plus slot in the page.
        """
        for layer, module in enumerate(self.modules):
            module.impl.do_kv_cache_update(  # type: ignore[attr-defined]
                module, keys[layer], values[layer], module.kv_cache, slots
            )
