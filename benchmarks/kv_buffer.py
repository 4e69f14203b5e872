"""KV caches in one buffer of vLLM's, as its model runners allocate them, but without a model."""

from collections.abc import Sequence

import torch
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.worker.utils import allocate_kv_cache


def kv_caches(
    spec: AttentionSpec,
    names: Sequence[str],
    blocks: int,
    layout: KVCacheLayout,
    device: torch.device,
    kernel_block_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """The cache of every layer: a view of the buffer, with ``blocks`` pages.

    Args:
        spec: of all layers.
        names: of the layers, which make one KV cache group.
        kernel_block_size: tokens per page of the backend, where they are not those of ``spec``.
    """
    layers = list(names)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, blocks, len(layers), layout)
    tensor = KVCacheTensor(
        size=spec.page_size_bytes * blocks * len(layers),
        layers=layers,
        layer_stride=layer_stride,
        block_stride=block_stride,
    )
    config = KVCacheConfig(blocks, [tensor], [KVCacheGroupSpec(layers, spec)])
    sizes = None if kernel_block_size is None else [kernel_block_size]
    return allocate_kv_cache(config, device, layout, sizes)
