"""KV pages of a model's size without the model, laid out as vLLM's GPU backends ask for."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from benchmarks.kv_buffer import kv_caches
from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import Rotation

DTYPES = {"bfloat16": torch.bfloat16, "fp8": torch.uint8}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
MAX_POSITIONS = 131072


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Keys and values of a model: those of an 8B model, unless a test wants less."""

    layers: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    """Of the cache: bytes stand for fp8, as in vLLM."""
    value_size: int | None = None
    """Numbers of a value; ``None``: as many as of a key."""

    @property
    def content(self) -> int:
        """Numbers of a token of a head."""
        return self.head_size + (self.value_size or self.head_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, keys and values."""
        return self.kv_heads * self.block_size * self.content * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Backend:
    """All that page moves ask of an attention backend."""

    name: str = "FLASH_ATTN"

    def get_name(self) -> str:
        return self.name


def rotary_of(shape: Shape, device: torch.device) -> Any:
    """vLLM's rotary module for keys of this shape; its table is never in fp8."""
    current_platform.import_kernels()
    dtype = torch.bfloat16 if shape.dtype == torch.uint8 else shape.dtype
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(
            shape.head_size, MAX_POSITIONS, is_neox_style=True, rope_parameters=ROPE, dtype=dtype
        )
    return rotary.to(device)


def attention_layers(
    shape: Shape, device: torch.device, blocks: int, layout: KVCacheLayout
) -> list[AttentionLayer]:
    """Layers with ``blocks`` pages in one buffer of vLLM's, in ``layout``."""
    spec = FullAttentionSpec(
        block_size=shape.block_size,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        head_size_v=shape.content - shape.head_size,
        dtype=shape.dtype,
    )
    names = [f"model.layers.{i}.self_attn.attn" for i in range(shape.layers)]
    views = kv_caches(spec, names, blocks, layout, device)
    rotation = Rotation(rotary_of(shape, device), names[0])
    known: dict[str, Any] = {
        "num_kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "head_size_v": shape.content - shape.head_size,
        "attn_backend": Backend(),
        "kv_cache_dtype": "fp8" if shape.dtype == torch.uint8 else "auto",
    }
    return [
        AttentionLayer(name, cast(Any, SimpleNamespace(kv_cache=views[name], **known)), rotation)
        for name in names
    ]


def moves_of_one_eviction(block: int, sink_tokens: int, take: Callable[[], int]) -> list[PageMove]:
    """Moves of one stream that evicts; ``take`` returns a fresh page."""
    moves = []
    delta = block * random.randint(1, 4000)
    for begin in range(0, sink_tokens, block):
        head, sinks = take(), min(block, sink_tokens - begin)
        moves.append(PageMove(take(), head, 0, sinks, delta))
        if sinks < block:
            moves.append(PageMove(take(), head, sinks, block, 0))
    return moves
