"""The memory that page moves work in: a few buffers, allocated once for all layers of a worker.

They exist before vLLM measures how much memory is left for the KV cache, so the pool is smaller by
their size and the first eviction needs no memory that nobody has counted. A batch of moves never
needs more (``pages_per_batch``); on a CPU vLLM's cache-write op takes dense copies of what it
writes besides, for the moment.
"""

from collections.abc import Iterable, Sequence
from math import prod

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

# Bytes of the pages of a batch. On a CPU they should stay in the second-level cache between reading
# and writing; on a GPU the batch should be large.
_BATCH_BYTES = {"cpu": 2 << 20}
_BATCH_BYTES_GPU = 32 << 20

PAGES, SOURCES, KEYS, HALF = "pages", "sources", "keys", "half of the keys"
_SHARES = {PAGES: 1.0, SOURCES: 1.0, KEYS: 1.0, HALF: 0.5}
"""The buffers, in batches: pages that are composed, pages laid over them, their keys in float32,
and the half of the numbers that a rotation needs twice."""


class Scratch:
    """Buffers for one batch of page moves; what is taken is valid until it is taken again."""

    def __init__(self, device: torch.device, batch_bytes: int | None = None) -> None:
        """
        Args:
            device: of the KV cache.
            batch_bytes: of the pages of a batch; by default what suits the device.
        """
        self.device = device
        self._batch_bytes = batch_bytes or _BATCH_BYTES.get(device.type, _BATCH_BYTES_GPU)
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, specs: Iterable[KVCacheSpec]) -> None:
        """Allocate all buffers; does nothing the second time.

        Args:
            specs: of the layers whose pages will be moved; a page that is larger than a batch
                counts as one.
        """
        heaviest = max(
            (
                page_weight(one.page_size_bytes, one.num_kv_heads * one.block_size * one.head_size)
                for one in specs
                if isinstance(one, AttentionSpec)
            ),
            default=0,
        )
        for slot, share in _SHARES.items():
            if slot not in self._buffers:
                self._allocate(slot, int(max(self._batch_bytes, heaviest) * share))

    def pages_per_batch(self, weight: int) -> int:
        """Pages (of one layer each) of which a batch may have so many; at least one.

        Args:
            weight: ``page_weight`` of one of them.
        """
        return max(self._batch_bytes // weight, 1)

    def take(self, slot: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A dense tensor in the buffer ``slot``, with anything in it."""
        nbytes = prod(shape) * dtype.itemsize
        if slot not in self._buffers or self._buffers[slot].numel() < nbytes:
            self._allocate(slot, nbytes)  # a batch that could not be cut (``independent_batches``)
        return self._buffers[slot][:nbytes].view(dtype).view(*shape)

    def take_like(self, slot: str, given: torch.Tensor) -> torch.Tensor:
        """The same with the shape and dtype of ``given``, its numbers in the order in which those
        of ``given`` lie in memory: what goes over both of them need not jump in either."""
        order = sorted(range(given.dim()), key=given.stride, reverse=True)
        taken = self.take(slot, [given.shape[dim] for dim in order], given.dtype)
        return taken.permute([order.index(dim) for dim in range(given.dim())])

    def addresses(self) -> dict[str, tuple[int, int]]:
        """Where the buffers are, and their size in bytes."""
        return {slot: (one.data_ptr(), one.numel()) for slot, one in self._buffers.items()}

    def _allocate(self, slot: str, nbytes: int) -> None:
        # Written to: memory that a CPU process has never touched is in nobody's account.
        self._buffers[slot] = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)


def page_weight(page_bytes: int, key_numbers: int) -> int:
    """Bytes of the largest buffer that a page of a layer needs: itself, or its keys in float32."""
    return max(page_bytes, key_numbers * torch.float32.itemsize)


def in_float32(keys: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
    """A contiguous copy, in scratch memory if there is any."""
    if scratch is None:
        return keys.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return scratch.take(KEYS, keys.shape, torch.float32).copy_(keys)
