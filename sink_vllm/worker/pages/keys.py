"""Where keys and values are inside a page, behind one interface.

``KeyPages`` works on scratch pages of a ``PageStore``: dense copies, outside the KV cache. One
implementation per family of layouts:

- ``cpu``: vLLM's CPU attention, which packs keys (and with AMX and BFMMLA values) as its
  instruction set likes; the packing is learned from vLLM's own cache-write op;
- ``strided``: every GPU backend with plain keys and values, in any ``KVCacheLayout``, and
  the rows of multi-head latent attention.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.scratch import Scratch


class KeyPages(ABC):
    """Reads and writes slots ``[begin, end)`` of scratch pages.

    Slots are tokens of a page. Pages are ``[n, layers, page_size]`` as ``PageStore.gather``
    returns them. Slots outside the range are neither read nor changed.
    """

    key_size: int
    """Numbers of a token's key in one head, as far as it is read."""

    @abstractmethod
    def __init__(self, layer: AttentionLayer, store: PageStore) -> None:
        """Learn the layout from ``layer``, which stands for all layers of ``store``.

        Raises:
            ValueError: a layout this class does not read; names the layer.
        """

    @abstractmethod
    def read_keys(
        self, pages: torch.Tensor, begin: int, end: int, scratch: Scratch | None = None
    ) -> torch.Tensor:
        """Keys in float32: contiguous ``[n, layers, end - begin, heads, head_size]``.

        A copy of them: in ``scratch``, until keys are next read, or in memory of its own.
        """

    @abstractmethod
    def read_values(self, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Values in ``layer.cache_dtype``: ``[n, layers, end - begin, heads, head_size]``."""

    @abstractmethod
    def write(
        self,
        pages: torch.Tensor,
        begin: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write keys (float32, rounded to nearest even) and values (copied), shaped as read.

        In 8-bit floating point, keys beyond its range become its largest numbers, in ``keys`` too.
        """

    def rotate(
        self,
        pages: torch.Tensor,
        begin: int,
        end: int,
        rotate: Callable[[torch.Tensor], None],
        scratch: Scratch,
    ) -> None:
        """Rotate keys in place.

        Args:
            pages: scratch pages.
            begin, end: slots.
            rotate: rotates float32 ``[n, layers, end - begin, heads, head_size]``, of any strides,
                in place.
            scratch: memory for keys in float32.
        """
        keys = self.read_keys(pages, begin, end, scratch)
        rotate(keys)
        self.write(pages, begin, end, keys, self.read_values(pages, begin, end))

    def key_part(self, cache: torch.Tensor) -> torch.Tensor | None:
        """The part of a layer's cache that holds keys and nothing else.

        Returns:
            A view ``[blocks, heads, tokens, head_size]`` in which every head of a page is one
            run of memory; ``None`` (the default) where keys and values alternate.
        """
        return None

    def rotate_parts(
        self, parts: torch.Tensor, rotate: Callable[[torch.Tensor], None], scratch: Scratch
    ) -> None:
        """Rotate all keys of scratch copies of ``key_part`` in place.

        Args:
            parts: ``[n, layers, heads * tokens * head_size]``.
            rotate: rotates float32 ``[n, layers, tokens, heads, head_size]``, of any strides, in
                place.
            scratch: memory for keys in float32.

        Raises:
            NotImplementedError: ``key_part`` is ``None`` in this layout, so there is nothing to
                rotate; nobody who asked that first gets here.
        """
        raise NotImplementedError
