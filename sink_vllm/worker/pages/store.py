"""Whole pages of several layers, read and written with one index operation.

vLLM allocates the caches of all layers in one buffer and gives each layer a strided view
``[blocks, heads, tokens, content]`` of it (``create_kv_cache_views``), in one of six orders. In
each of them a page of a layer consists of equally long, regularly placed runs of memory: one run
if the page is dense, one per head otherwise. So the buffer is a table of runs, and the runs of
any pages of any layers are rows of that table::

    LBHNC, LBNHC, BLHNC, BLNHC     one run per page
    LHBNC, BHLNC                   one run per head and page

(Padded blocks need not start at a multiple of a run; then the rows are the longest pieces that
runs and starts are multiples of.)

Nothing here knows what a page contains; see ``sink_vllm.worker.pages.keys``.
"""

import math
from collections.abc import Sequence

import torch

from sink_vllm.worker.scratch import Scratch

# Runs are moved in the widest words they divide into. Floating-point words, because torch's
# ``index_copy_`` is vectorised for them on CPUs and not for integers (3 to 4 times slower for
# int64); they are loaded and stored only, so every bit pattern survives.
_WORDS = (torch.complex128, torch.float64, torch.float32, torch.float16)


class PageStore:
    """Pages of layers whose caches have one shape, in one buffer.

    Scratch pages are ``[n, layers, page_size]`` in the dtype of the cache, dense, and inside a
    page ordered as ``page_shape`` and ``page_strides`` say.
    """

    def __init__(
        self, names: Sequence[str], caches: Sequence[torch.Tensor], scratch: Scratch
    ) -> None:
        """Find the runs of the pages of some layers.

        Args:
            names: of the layers, for messages.
            caches: ``[blocks, heads, tokens, content]`` each: their caches, or the same part of
                each of them.
            scratch: memory that pages are gathered in.

        Raises:
            ValueError: the caches are not in one buffer of equal runs; names the layer.
        """
        self.caches = list(caches)
        first = self.caches[0]
        self.dtype = first.dtype
        self.device = first.device
        self.num_pages = first.shape[0]
        self.page_shape = tuple(first.shape[1:])
        """``(heads, tokens, content)``."""
        strides = first.stride()
        heads, tokens, content = self.page_shape
        if _dense(self.page_shape, strides[1:]):
            runs, run_shape = 1, self.page_shape
            self.page_strides = strides[1:]
        else:
            runs, run_shape = heads, (tokens, content)
            self.page_strides = (tokens * content, *strides[2:])
        self.page_size = heads * tokens * content
        run = self.page_size // runs
        starts = [int(cache.storage_offset()) for cache in self.caches]
        for name, cache in zip(names, self.caches, strict=True):
            if (
                not _dense(run_shape, strides[-len(run_shape) :])
                or (cache.shape, cache.stride(), cache.dtype) != (first.shape, strides, first.dtype)
                or cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            ):
                raise ValueError(
                    f"{name}: its KV cache {tuple(cache.shape)} with strides "
                    f"{cache.stride()} is not made of equal runs of memory; set "
                    f"VLLM_KV_CACHE_LAYOUT=LBHNC, or serve this model with --kv-policy full."
                )
        lowest = min(starts)
        piece = math.gcd(run, strides[0], strides[1] * (runs > 1), *(s - lowest for s in starts))
        word, self._rows = self._table_of_pieces(lowest, piece)
        self._page_step = strides[0] // piece
        bases = torch.tensor([(start - lowest) // piece for start in starts])
        in_page = torch.arange(runs)[:, None] * (strides[1] // piece) + torch.arange(run // piece)
        self._bases = (bases[:, None] + in_page.view(-1)).to(self.device)
        self._word = word
        self._scratch = scratch

    def gather(self, pages: torch.Tensor, first: int, last: int, slot: str) -> torch.Tensor:
        """Copy pages of layers ``[first, last)`` into scratch memory.

        Args:
            pages: int64 ``[n]`` on the device.
            first, last: range of layers.
            slot: scratch memory to use; what it held before is lost.

        Returns:
            Scratch pages ``[n, last - first, page_size]``.
        """
        rows = self._rows_of(pages, first, last)
        scratch = self.scratch_pages(len(pages), first, last, slot)
        words = scratch.view(-1).view(self._word).view(rows.shape[0], -1)
        torch.index_select(self._rows, 0, rows, out=words)
        return scratch

    def scratch_pages(self, count: int, first: int, last: int, slot: str) -> torch.Tensor:
        """Scratch pages ``[count, last - first, page_size]`` with anything in them."""
        shape = (count, last - first, self.page_size)
        return self._scratch.take(slot, shape, self.dtype)

    def scatter(self, pages: torch.Tensor, first: int, last: int, scratch: torch.Tensor) -> None:
        """Write scratch pages of layers ``[first, last)`` to ``pages`` (no page twice)."""
        rows = self._rows_of(pages, first, last)
        words = scratch.view(-1).view(self._word).view(rows.shape[0], -1)
        self._rows.index_copy_(0, rows, words)

    def _rows_of(self, pages: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows of pages: int64 ``[n * layers * rows per page]``."""
        starts = pages * self._page_step
        return (starts[:, None, None] + self._bases[first:last]).view(-1)

    def _table_of_pieces(self, lowest: int, piece: int) -> tuple[torch.dtype, torch.Tensor]:
        """The buffer from element ``lowest`` on as ``[pieces, words per piece]``."""
        item = self.dtype.itemsize
        storage = self.caches[0].untyped_storage()
        word = next(
            word
            for word in _WORDS
            if piece * item % word.itemsize == 0
            and lowest * item % word.itemsize == 0
            and storage.data_ptr() % word.itemsize == 0
        )
        words = piece * item // word.itemsize
        count = (storage.nbytes() - lowest * item) // (piece * item)
        table = torch.empty(0, dtype=word, device=self.device).set_(
            storage, lowest * item // word.itemsize, (count, words), (words, 1)
        )
        return word, table


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this shape occupies one piece of memory without holes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
