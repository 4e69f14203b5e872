"""Rotate all keys of whole pages where they lie: what a re-anchoring does to a stream's window.

The general way (``mover``) composes pages in scratch memory and writes them back whole. Here
values are not touched, keys are rotated in the order they lie in, and nothing is repacked: half
the memory traffic and a fraction of the work. Needs a layout with keys apart from values
(``KeyPages.key_part``).
"""

from collections.abc import Sequence
from functools import partial

from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.layers.rotation import Rotation
from sink_vllm.worker.pages.keys import KeyPages
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.scratch import PAGES, Scratch, page_weight
from sink_vllm.worker.upload import upload


class PageTurner:
    """In-place rotation of the pages of layers that are alike."""

    def __init__(
        self, store: PageStore, pages: KeyPages, rotation: Rotation, scratch: Scratch
    ) -> None:
        """
        Args:
            store: of the key parts of the layers' caches.
            pages: the layout of these caches.
            rotation: of the layers' keys.
            scratch: memory to work in.
        """
        self._store = store
        self._pages = pages
        self._rotation = rotation
        self._scratch = scratch
        size = store.page_size
        self._budget = scratch.pages_per_batch(page_weight(size * store.dtype.itemsize, size))

    def run(self, moves: Sequence[PageMove]) -> None:
        """Rotate ``move.dst`` by ``move.delta`` for each of ``moves``, no page twice."""
        device, layers = self._store.device, len(self._store.caches)
        pages = upload([move.dst for move in moves], device)
        rows = self._rotation.rows_of([move.delta for move in moves], device)
        at_once = max(self._budget // layers, 1)
        step = min(layers, self._budget)
        for some, their_rows in zip(pages.split(at_once), rows.split(at_once), strict=True):
            rotate = partial(self._rotation.rotate, rows=their_rows, scratch=self._scratch)
            for first in range(0, layers, step):
                last = min(first + step, layers)
                parts = self._store.gather(some, first, last, PAGES)
                self._pages.rotate_parts(parts, rotate, self._scratch)
                self._store.scatter(some, first, last, parts)
