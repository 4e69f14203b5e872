"""Execute the page moves of a step: one batch of pages at a time, all layers together.

    layers = attention_layers(model, vllm_config)        once the model is loaded
    mover = PageMover(layers, block_size)                any time; reads the caches lazily
    mover.run(moves)                                     once per step, before anything writes KV
    mover.read_page(page)                                its keys and values, per layer

The number of tensor operations of a step depends neither on the number of streams nor on the
number of layers, but on how much is moved: scratch memory is bounded (``scratch``), so large steps
go in batches of layers, which never depend on each other, and of pages. What is read and written,
and in which order, is drawn in ``plan``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.layers.attention import AttentionLayer
from sink_vllm.worker.layers.rotation import Rotation
from sink_vllm.worker.moves.plan import (
    MovePlan,
    Overlay,
    in_kernel_pages,
    independent_batches,
    split_turns,
)
from sink_vllm.worker.moves.turner import PageTurner
from sink_vllm.worker.pages.keys import KeyPages
from sink_vllm.worker.pages.layouts import key_pages_for
from sink_vllm.worker.pages.store import PageStore
from sink_vllm.worker.scratch import PAGES, SOURCES, Scratch, page_weight
from sink_vllm.worker.upload import upload

KeyPagesFactory = Callable[[AttentionLayer, PageStore], KeyPages]


class PageMover:
    """Moves slots between KV pages and rotates their keys; see ``PageMove`` for the contract."""

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        block_size: int,
        key_pages: KeyPagesFactory = key_pages_for,
        scratch: Scratch | None = None,
    ) -> None:
        """
        Args:
            layers: all attention layers of this worker.
            block_size: tokens per page of the scheduler, to which the moves refer. The backend's
                own pages may be smaller.
            key_pages: finds the layout of a layer's pages.
            scratch: memory to work in; by default it is allocated when it is needed.
        """
        self.layers = list(layers)
        self.block_size = block_size
        self._key_pages = key_pages
        self._scratch = scratch
        self._groups: list[_LayerGroup] = []

    @classmethod
    def for_runner(cls, runner: Any) -> "PageMover":
        """The mover of a model runner whose KV cache has been initialised."""
        block_size = runner.cache_config.block_size
        return cls(runner.attention_layers, block_size, scratch=runner.page_scratch)

    @torch.inference_mode()
    def run(self, moves: Sequence[PageMove]) -> None:
        """Execute moves: all of them read before any of them writes.

        Raises:
            ValueError: on the first call only, if the layout of the KV cache is not supported.
        """
        for group in self._bound_groups():
            # Also with one group here: moves of others may be meant for other pipeline stages.
            mine = [move for move in moves if move.group == group.index]
            if mine:
                group.run(mine)

    @torch.inference_mode()
    def read_page(self, page: int, index: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (float32) of a page by layer: ``[block_size, heads, head_size]`` each.

        With an fp8 cache they are divided by the layer's scales.

        Args:
            page: of the scheduler.
            index: KV cache group; its layers are read.
        """
        return {
            layer.name: (keys[i], values[i])
            for group in self._bound_groups()
            if group.index == index
            for keys, values in [group.read_page(page)]
            for i, layer in enumerate(group.layers)
        }

    @torch.inference_mode()
    def clear(self, pages: Sequence[int]) -> None:
        """Fill pages with zeros, as vLLM allocates them."""
        for group in self._bound_groups():
            group.clear(pages)

    def layer_groups(self) -> "list[_LayerGroup]":
        """Layers by the kind of their pages: what can be copied at once."""
        return self._bound_groups()

    def rebind(self) -> None:
        """Forget what was derived from layers: their rotation or caches have changed."""
        self._groups = []

    def _bound_groups(self) -> "list[_LayerGroup]":
        if not self._groups or not all(group.is_bound() for group in self._groups):
            by_kind: dict[object, list[AttentionLayer]] = {}
            for layer in self.layers:
                cache = layer.kv_cache
                kind = (
                    layer.group,
                    id(layer.rotation),
                    cache.shape,
                    cache.stride(),
                    cache.dtype,
                    cache.untyped_storage().data_ptr(),
                )
                by_kind.setdefault(kind, []).append(layer)
            scratch = self._scratch or Scratch(self.layers[0].kv_cache.device)
            self._groups = [
                _LayerGroup(group, self.block_size, self._key_pages, scratch)
                for group in by_kind.values()
            ]
        return self._groups


class _LayerGroup:
    """Layers whose pages are alike and rotate alike: they are moved by the same operations."""

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        block_size: int,
        key_pages: KeyPagesFactory,
        scratch: Scratch,
    ) -> None:
        self.layers = list(layers)
        self.index = layers[0].group
        names = [layer.name for layer in layers]
        self.scratch = scratch
        self.store = PageStore(names, [layer.kv_cache for layer in layers], scratch)
        self._bound = [layer.module.kv_cache for layer in layers]
        self.pages = key_pages(layers[0], self.store)
        self.rotation: Rotation | None = layers[0].rotation
        tokens = self.store.page_shape[1]
        if block_size % tokens:
            raise ValueError(
                f"{layers[0].name}: its pages of {tokens} tokens do not divide blocks of "
                f"{block_size}; set --block-size to a multiple of {tokens}."
            )
        self.tokens = tokens
        self.split = block_size // tokens
        heads = self.store.page_shape[0]
        weight = page_weight(
            self.store.page_size * self.store.dtype.itemsize,
            heads * tokens * self.pages.key_size,
        )
        self.budget = scratch.pages_per_batch(weight)
        """Scratch pages per batch, layers times pages."""
        parts = [self.pages.key_part(cache) for cache in self.store.caches]
        key_parts = [part for part in parts if part is not None]
        self.turner = (
            PageTurner(PageStore(names, key_parts, scratch), self.pages, self.rotation, scratch)
            if self.rotation is not None and key_parts
            else None
        )

    def is_bound(self) -> bool:
        """Whether the layers still have the caches this group was made for."""
        return all(
            layer.module.kv_cache is cache
            for layer, cache in zip(self.layers, self._bound, strict=True)
        )

    def run(self, moves: Sequence[PageMove]) -> None:
        if self.split > 1:
            moves = in_kernel_pages(moves, self.tokens, self.split)
        if self.turner is not None:
            turns, moves = split_turns(moves, self.tokens)
            if turns:  # first or last does not matter: no other move reads or writes their slots
                self.turner.run(turns)
            if not moves:
                return
        for batch in independent_batches(moves, self.budget):
            plan = MovePlan.of(batch, self.tokens)
            layers = len(self.layers)
            step = max(min(layers, self.budget // len(plan.pages)), 1)
            prepared = _Prepared(plan, self.store.device, self.rotation)
            for first in range(0, layers, step):
                self._compose(prepared, first, min(first + step, layers))

    def _compose(self, prepared: "_Prepared", first: int, last: int) -> None:
        """Compose and write all pages of the plan, in layers ``[first, last)``."""
        composed = self.store.gather(prepared.bases, first, last, PAGES)
        # Sources are read from the caches, and nothing is written there before all of them were.
        for overlay, sources, rows in prepared.overlays:
            laid, begin, end = composed[overlay.at], overlay.begin, overlay.end
            rotate = None
            if rows is not None:
                assert self.rotation is not None
                rotate = partial(self.rotation.rotate, rows=rows, scratch=self.scratch)
            if sources is None:
                if rotate is not None:  # else a rotation of keys that do not rotate
                    self.pages.rotate(laid, begin, end, rotate, self.scratch)
                continue
            given = self.store.gather(sources, first, last, SOURCES)
            keys = self.pages.read_keys(given, begin, end, self.scratch)
            if rotate is not None:
                rotate(keys)
            self.pages.write(laid, begin, end, keys, self.pages.read_values(given, begin, end))
        self.store.scatter(prepared.pages, first, last, composed)

    def read_page(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[layers, block_size, heads, size]`` of a page, float32."""
        index = page * self.split + torch.arange(self.split, device=self.store.device)
        pages = self.store.gather(index, 0, len(self.layers), PAGES)
        keys = self.pages.read_keys(pages, 0, self.tokens)
        values = self.pages.read_values(pages, 0, self.tokens)
        values = values.to(torch.float32, copy=True)
        return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def clear(self, pages: Sequence[int]) -> None:
        for page in pages:
            for cache in self.store.caches:
                cache[page * self.split : (page + 1) * self.split] = 0


class _Prepared:
    """The index tensors of a plan, on the device; they are the same for all layers."""

    def __init__(self, plan: MovePlan, device: torch.device, rotation: Rotation | None) -> None:
        self.bases = upload(plan.bases, device)
        self.pages = upload(plan.pages, device)
        deltas = [delta for one in plan.overlays for delta in one.deltas or ()]
        rows = rotation.rows_of(deltas, device) if rotation is not None and deltas else None
        self.overlays: list[tuple[Overlay, torch.Tensor | None, torch.Tensor | None]] = []
        for one in plan.overlays:
            sources = None if one.sources is None else upload(one.sources, device)
            mine = None
            if rows is not None and one.deltas is not None:
                mine, rows = rows[: len(one.deltas)], rows[len(one.deltas) :]
            self.overlays.append((one, sources, mine))
