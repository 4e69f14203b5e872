"""Rotation of keys by LongRoPE (Phi-3.5, Phi-4-mini).

vLLM's module has two sets of frequencies, of the short and of the long factors, and uses one of
them for every position: which, it decides once, from ``max_model_len``. So its rotations compose.
Both tables are in one buffer, the short one first.
"""

import torch
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding

from sink_vllm.worker.layers.rotation import Rotation


class LongRotation(Rotation):
    """``R(delta)`` of the factors that the module uses."""

    rotary: Phi3LongRoPEScaledRotaryEmbedding

    def __init__(self, rotary: Phi3LongRoPEScaledRotaryEmbedding, layer: str) -> None:
        """Take over dimensions and frequencies of ``rotary``.

        Args:
            rotary: rotary module of vLLM, after the model has been loaded.
            layer: name of an attention layer that uses it, for messages.

        Raises:
            ValueError: its table is not what its frequencies say.
        """
        self.rotary = rotary
        self._take(
            rotary,
            self._chosen(),
            head_size=rotary.head_size,
            is_neox=True,  # the module has no other pairing
            table_rows=len(self._read_table()),
        )
        self._check_table(layer)

    def extend(self, rows: int, exact_from: int) -> None:
        """Lengthen the table in use to at least ``rows`` rope positions; see ``Rotation.extend``.

        ``exact_from`` is the capacity, and a cache of the original length is one that the short
        factors are for. vLLM decided by the ``max_model_len`` of the policy, one token more.
        """
        rotary = self.rotary
        if exact_from <= rotary.original_max_position_embeddings:
            rotary.use_long_rope = False
            self.frequencies = self._chosen()
            self.table_rows = len(self._read_table())
        super().extend(rows, exact_from)

    def _chosen(self) -> torch.Tensor:
        rotary = self.rotary
        factors = rotary.long_factor if rotary.use_long_rope else rotary.short_factor
        # vLLM computes them in float32, and so its table; no more digits can be had.
        return rotary._compute_inv_freq(factors).double().cpu()

    def _read_table(self) -> torch.Tensor:
        short, long = self._tables()
        return long if self.rotary.use_long_rope else short

    def _write_table(self, table: torch.Tensor) -> None:
        """The long table begins where the module looks for it; the short one is read from 0."""
        short, _ = self._tables()
        both = torch.cat((short, table)) if self.rotary.use_long_rope else table
        self.rotary.long_short_cos_sin_cache = both

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.rotary.long_short_cos_sin_cache
        assert isinstance(both, torch.Tensor)
        original = self.rotary.original_max_position_embeddings
        return both[:original], both[original:]
