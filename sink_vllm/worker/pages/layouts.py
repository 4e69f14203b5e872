"""Which layout the pages of a layer have."""

import torch
from vllm.model_executor.layers.attention import MLAAttention

from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.pages.cpu import CPUKeyPages
from sink_vllm.worker.pages.keys import KeyPages
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.pages.strided import LatentKeyPages, StridedKeyPages

LATENT_BACKENDS = (
    "CPU_MLA",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN_MLA",
    "CUTLASS_MLA",
    "TOKENSPEED_MLA",
    "TRITON_MLA",
)
"""Backends of multi-head latent attention whose pages have been moved by a test: all that vLLM
chooses from on NVIDIA GPUs, but for sparse attention (``tests/worker/test_latent_layouts.py``)."""


def key_pages_for(layer: AttentionLayer, store: PageStore) -> KeyPages:
    """The implementation for the backend of ``layer``.

    Raises:
        ValueError: no implementation reads this layout; names layer, backend and way out.
    """
    backend = layer.module.attn_backend.get_name()
    dtype = layer.cache_dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        raise ValueError(
            f"{layer.name}: its KV cache of {str(dtype).removeprefix('torch.')} elements in "
            f"{backend} is not supported; use --kv-cache-dtype auto."
        )
    if backend == "CPU_ATTN":
        return CPUKeyPages(layer, store)
    if isinstance(layer.module, MLAAttention):
        if backend not in LATENT_BACKENDS:
            raise ValueError(
                f"{layer.name}: --kv-policy sink has not been tested with the pages of "
                f"{backend}; use --attention-backend "
                f"{'CPU_MLA' if layer.kv_cache.is_cpu else 'TRITON_MLA'}."
            )
        return LatentKeyPages(layer, store)
    return StridedKeyPages(layer, store)
