"""Host memory in which a worker keeps pages outside the KV cache, and the copies to and from it.

    arena = Arena(mover, slots, slot_bytes, device)      once the KV cache is there
    arena.run(plan)                                      once per step, before anything else of it

A slot has the bytes of one page in all layers of its KV cache group, as they are in the cache;
which page is in which slot is the engine core's business. On a GPU the memory is pinned, and copies
are queued on the stream of the step: it begins with them, and they wait for the step before.
"""

import mmap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from sink_vllm.policy.plan import PageCopy, StepPlan
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.scratch import PAGES
from sink_vllm.worker.upload import upload

if TYPE_CHECKING:
    from sink_vllm.worker.moves.mover import PageMover


class Batch(NamedTuple):
    """Part of some pages that is copied at once."""

    store: PageStore
    pages: torch.Tensor
    """int64 on the device: of the backend, which may be smaller than the scheduler's."""
    first: int
    last: int
    """Layers of ``store``."""
    slots: list[int]
    offset: int
    nbytes: int
    """Where it lies in each slot."""


class Arena:
    """Slots for pages; see above."""

    def __init__(
        self,
        mover: "PageMover",
        slots: int,
        slot_bytes: int,
        device: torch.device,
        shared: mmap.mmap | None = None,
    ) -> None:
        """
        Args:
            mover: of the KV cache, whose pages are copied.
            slots: pages there is room for.
            slot_bytes: of the largest page.
            device: of the KV cache.
            shared: so many bytes that the engine core uses, too.
        """
        self._mover, self._slot_bytes = mover, slot_bytes
        self._is_pinned = device.type == "cuda"
        self._is_shared = shared is not None
        if shared is None:
            self.memory = torch.empty(
                (slots, slot_bytes), dtype=torch.uint8, pin_memory=self._is_pinned
            )
        else:
            self.memory = torch.frombuffer(shared, dtype=torch.uint8).view(slots, slot_bytes)
            if self._is_pinned:
                code = torch.cuda.cudart().cudaHostRegister(
                    self.memory.data_ptr(), self.memory.numel(), 0
                )
                torch.cuda.check_error(int(code))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> None:
        """Copy the pages of a step out, and then back."""
        for batch in self._batches(plan.stores):
            found = batch.store.gather(batch.pages, batch.first, batch.last, PAGES)
            rows = found.view(len(batch.slots), -1).view(torch.uint8)
            for slot, row in zip(batch.slots, rows, strict=True):
                self._part(slot, batch).copy_(row, non_blocking=self._is_pinned)
        for batch in self._batches(plan.loads):
            scratch = batch.store.scratch_pages(len(batch.pages), batch.first, batch.last, PAGES)
            rows = scratch.view(len(batch.slots), -1).view(torch.uint8)
            for slot, row in zip(batch.slots, rows, strict=True):
                row.copy_(self._part(slot, batch), non_blocking=self._is_pinned)
            batch.store.scatter(batch.pages, batch.first, batch.last, scratch)
        if self._is_shared and self._is_pinned:
            # The engine core takes a step that is over for one whose copies are made.
            torch.cuda.current_stream().synchronize()

    def _part(self, slot: int, batch: Batch) -> torch.Tensor:
        return self.memory[slot, batch.offset : batch.offset + batch.nbytes]

    def _batches(self, copies: Sequence[PageCopy]) -> Iterator[Batch]:
        """Copies in batches that scratch memory has room for."""
        offsets: dict[int, int] = {}
        for layers in self._mover.layer_groups() if copies else ():
            store, split = layers.store, layers.split
            mine = [copy for copy in copies if copy.group == layers.index]
            count = len(store.caches)
            step = max(min(count, layers.budget // split), 1)
            at_once = max(layers.budget // (step * split), 1)
            for first in range(0, count, step):
                last = min(first + step, count)
                nbytes = split * (last - first) * store.page_size * store.dtype.itemsize
                offset = offsets.get(layers.index, 0)
                offsets[layers.index] = offset + nbytes
                assert offset + nbytes <= self._slot_bytes, "a page is larger than its slot"
                for begin in range(0, len(mine), at_once):
                    part = mine[begin : begin + at_once]
                    pages = [copy.block * split + i for copy in part for i in range(split)]
                    slots = [copy.slot for copy in part]
                    device_pages = upload(pages, store.device)
                    yield Batch(store, device_pages, first, last, slots, offset, nbytes)


def layout_of(mover: "PageMover", slot_bytes: int) -> str:
    """What must be the same for pages of one worker to be read by another.

    The table's rows are in it: from where on they end, keys are rotated back, and a page does not
    tell how often its own have been.
    """
    kinds = [
        (
            layers.index,
            layers.layers[0].module.attn_backend.get_name(),
            len(layers.layers),
            layers.split,
            layers.store.page_shape,
            tuple(layers.store.page_strides),
            str(layers.store.dtype),
            layers.budget,
            None if layers.rotation is None else layers.rotation.table_rows,
        )
        for layers in mover.layer_groups()
    ]
    device = _processor(mover)
    return f"{kinds} in {slot_bytes} bytes on {device}"


def _processor(mover: "PageMover") -> str:
    """The processor, whose kernels may order a page as suits them."""
    device = mover.layers[0].kv_cache.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
