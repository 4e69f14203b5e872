"""Copy states of recurrent layers from page to page: whole pages, in which no token has a place.

mover = StateMover(layers)                           once the KV cache is there
mover.run(moves)                                     once per step, before anything writes states
"""

from collections.abc import Iterable, Sequence

import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase

from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.upload import upload

_AT_ONCE = 16
"""States of a layer in flight: what a copy takes of memory that no profile has seen."""


class StateMover:
    """Runs the moves whose KV cache group has recurrent layers."""

    def __init__(self, layers: Iterable[tuple[int, MambaBase]]) -> None:
        """``layers`` with their KV cache groups."""
        self._groups: dict[int, list[MambaBase]] = {}
        for group, layer in layers:
            self._groups.setdefault(group, []).append(layer)

    @torch.inference_mode()
    def run(self, moves: Sequence[PageMove]) -> None:
        """Copy pages ``src`` to ``dst``, bit by bit.

        No page that one of the moves writes is read by another: what is written was a free page.
        """
        for group, layers in self._groups.items():
            mine = [move for move in moves if move.group == group]
            if not mine:
                continue
            device = layers[0].kv_cache[0].device
            sources = upload([move.src for move in mine], device)
            targets = upload([move.dst for move in mine], device)
            for layer in layers:
                for state in layer.kv_cache:
                    for src, dst in zip(
                        sources.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True
                    ):
                        state.index_copy_(0, dst, state.index_select(0, src))
