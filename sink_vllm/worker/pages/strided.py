"""Keys and values as plain numbers: the pages of vLLM's GPU backends, and of latent attention.

A token of a head is ``content = head_size + head_size_v`` consecutive numbers, its key, then its
value (``AttentionSpec.state_content_size_bytes``); FlashAttention, FlashInfer, Triton and
FlexAttention all slice their caches this way.

With an fp8 cache the numbers are keys and values divided by a scale of the layer or of the head
(``Attention._k_scale``). A rotation within a head commutes with that division, so pages are moved
without knowing it.

Multi-head latent attention (MLA) caches one row per token for all heads: a latent, from which keys
and values are computed, then the part of the key that is rotated
(``MLAAttentionImpl.do_kv_cache_update``). To page moves the latter is the key and the former the
value. In fp8 all of a row is divided by one scale of the layer; rows that are packed with scales of
their own (``fp8_ds_mla``) have another length, and are refused.
"""

from typing import TYPE_CHECKING, cast

import torch

from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import within_range
from sink_vllm.worker.pages.keys import KeyPages
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.scratch import Scratch, in_float32

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import MLAAttention


class StridedKeyPages(KeyPages):
    """Pages ``[heads, tokens, key | value]`` in any order of heads and tokens."""

    def __init__(self, layer: AttentionLayer, store: PageStore) -> None:
        module = layer.module
        heads, _, content = store.page_shape
        head_size_v = getattr(module, "head_size_v", module.head_size)
        if (heads, content) != (module.num_kv_heads, module.head_size + head_size_v):
            raise ValueError(
                f"{layer.name}: {module.attn_backend.get_name()} stores {heads} heads of "
                f"{content} numbers per token, not keys of {module.num_kv_heads} heads of "
                f"{module.head_size} numbers followed by values; use --attention-backend "
                f"FLASH_ATTN or TRITON_ATTN."
            )
        keys, values = slice(0, module.head_size), slice(module.head_size, content)
        self._take(store, layer.cache_dtype, keys, values)

    def _take(self, store: PageStore, dtype: torch.dtype, key: slice, value: slice) -> None:
        self._key, self._value = key, value
        """Where the two are in the ``content`` of a token."""
        self.key_size = key.stop - key.start
        self._dtype = dtype
        self._shape = store.page_shape
        self._strides = store.page_strides

    def _slots(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """View ``[n, layers, end - begin, heads, content]``."""
        (heads, _, content), (head, token, number) = self._shape, self._strides
        return pages.view(self._dtype).as_strided(
            (*pages.shape[:2], end - begin, heads, content),
            (*pages.stride()[:2], token, head, number),
            pages.storage_offset() + begin * token,
        )

    def read_keys(
        self, pages: torch.Tensor, begin: int, end: int, scratch: Scratch | None = None
    ) -> torch.Tensor:
        return in_float32(self._slots(pages, begin, end)[..., self._key], scratch)

    def read_values(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return self._slots(pages, begin, end)[..., self._value]

    def write(
        self,
        pages: torch.Tensor,
        begin: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        slots = self._slots(pages, begin, end)
        slots[..., self._key] = within_range(keys, self._dtype)
        slots[..., self._value] = values


class LatentKeyPages(StridedKeyPages):
    """Pages ``[1, tokens, latent | rotated part of the key]`` of multi-head latent attention."""

    def __init__(self, layer: AttentionLayer, store: PageStore) -> None:
        module = cast("MLAAttention", layer.module)
        heads, _, content = store.page_shape
        latent, rotated = module.kv_lora_rank, module.qk_rope_head_dim
        if (heads, content) != (1, latent + rotated):
            raise ValueError(
                f"{layer.name}: {module.attn_backend.get_name()} stores {heads} rows of {content} "
                f"numbers per token, not one latent of {latent} numbers followed by {rotated} "
                f"rotated ones; serve this model with --kv-policy full."
            )
        self._take(store, layer.cache_dtype, slice(latent, content), slice(0, latent))
