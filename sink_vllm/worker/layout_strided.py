"""Keys and values as plain numbers: the pages of vLLM's GPU backends.

A token of a head is ``content = head_size + head_size_v`` consecutive numbers, its key, then its
value (``AttentionSpec.state_content_size_bytes``); FlashAttention, FlashInfer, Triton and
FlexAttention all slice their caches this way.
"""

import torch

from sink_vllm.worker.key_pages import KeyPages
from sink_vllm.worker.layers import AttentionLayer
from sink_vllm.worker.page_store import PageStore


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
        self._head_size: int = module.head_size
        self._shape = store.page_shape
        self._strides = store.page_strides

    def _slots(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """View ``[n, layers, end - begin, heads, content]``."""
        (heads, _, content), (head, token, number) = self._shape, self._strides
        return pages.as_strided(
            (*pages.shape[:2], end - begin, heads, content),
            (*pages.stride()[:2], token, head, number),
            pages.storage_offset() + begin * token,
        )

    def read_keys(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        keys = self._slots(pages, begin, end)[..., : self._head_size]
        return keys.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    def read_values(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return self._slots(pages, begin, end)[..., self._head_size :]

    def write(
        self,
        pages: torch.Tensor,
        begin: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        slots = self._slots(pages, begin, end)
        slots[..., : self._head_size] = keys
        slots[..., self._head_size :] = values
