"""Rotate cached keys by a difference of rope positions, as their own rotary module would have.

A key rotated at rope position ``p`` becomes the key at ``p + delta`` by one more rotation,
``K(p + delta) = R(delta) K(p)`` (RoFormer, arXiv 2104.09864, section 3.4). What ``R`` is, is the
business of the layer's rotary module, so nothing about it is configured here:

- pairing (``is_neox_style``: halves, else neighbours) and ``rotary_dim`` (dimensions behind it
  pass through) are read from the module;
- frequencies come from the module's own ``_compute_inv_freq`` (linear, NTK, llama3, yarn and
  proportional scaling live there), angles of a delta are computed from them in float64: the
  module's table is in the model's dtype, too coarse to be composed;
- yarn's magnitude is in the stored key already. The rows used here are pure rotations, it is
  never applied a second time.

Keys are rotated in float32, with a table of ours.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from vllm.model_executor.layers.rotary_embedding import (
    _ROPE_DICT,
    DeepseekScalingRotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Gemma4RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    NTKScalingRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from sink_vllm.worker.scratch import HALF, Scratch
from sink_vllm.worker.upload import upload

# Deltas kept: evictions use multiples of the stride, re-anchorings their negatives.
_TABLE_ROWS = 1024


def _of_base(rotary: RotaryEmbedding) -> torch.Tensor:
    return rotary._compute_inv_freq(rotary.base)


def _of_linear(rotary: LinearScalingRotaryEmbedding) -> torch.Tensor:
    if len(rotary.scaling_factors) != 1:
        raise ValueError(f"its table concatenates {len(rotary.scaling_factors)} scaling factors")
    return rotary._compute_inv_freq(rotary.base).double() / rotary.scaling_factors[0]


def _of_yarn(
    rotary: YaRNScalingRotaryEmbedding | DeepseekScalingRotaryEmbedding,
) -> torch.Tensor:
    # The argument of yarn's method is the scaling factor, not the base.
    return rotary._compute_inv_freq(rotary.scaling_factor)


def _of_mrope(rotary: MRotaryEmbedding) -> torch.Tensor:
    # All sections of a text have the same position, so they rotate as one.
    if rotary.scaling_factor is None:
        return rotary._compute_inv_freq(rotary.base)
    return rotary._compute_inv_freq(rotary.scaling_factor)  # yarn's method


def _of_table(rotary: RotaryEmbedding) -> torch.Tensor:
    """Frequencies of modules that compute them inside ``_compute_cos_sin_cache``.

    Row 1 of the table is the rotation by one position, at most one radian.
    """
    cos, sin = rotary._compute_cos_sin_cache()[1].double().chunk(2)
    return torch.atan2(sin, cos)


# By exact type: a subclass may change anything.
_FREQUENCIES: dict[type, Callable[..., torch.Tensor]] = {
    RotaryEmbedding: _of_base,
    Llama3RotaryEmbedding: _of_base,
    NTKScalingRotaryEmbedding: _of_base,
    Gemma4RotaryEmbedding: _of_base,
    LinearScalingRotaryEmbedding: _of_linear,
    YaRNScalingRotaryEmbedding: _of_yarn,
    DeepseekScalingRotaryEmbedding: _of_yarn,
    MRotaryEmbedding: _of_mrope,
    DynamicNTKScalingRotaryEmbedding: _of_table,  # vLLM's bases are constants, nothing dynamic
    DynamicNTKAlphaRotaryEmbedding: _of_table,
}


class Rotation:
    """``R(delta)`` of one rotary module, for any integer delta, negative ones included."""

    has_table: ClassVar = True
    """Whether the module looks up cosines and sines of positions, or computes them."""

    def __init__(self, rotary: torch.nn.Module, layer: str) -> None:
        """Take over pairing, dimensions and frequencies of ``rotary``.

        Args:
            rotary: rotary module of vLLM, after the model has been loaded.
            layer: name of an attention layer that uses it, for messages.

        Raises:
            ValueError: the module is of a class whose rotations do not compose, or are not known
                to, or its table is not what its frequencies say.
        """
        kind = type(rotary)
        try:
            frequencies_of = _FREQUENCIES[kind]
            frequencies = frequencies_of(rotary).double().cpu()
        except (KeyError, ValueError) as error:
            why = f": {error}" if isinstance(error, ValueError) else ""
            raise ValueError(
                f"{layer}: cached keys cannot be re-rotated under {kind.__name__}{why}; "
                f"serve this model with --kv-policy full (usable are "
                f"{', '.join(sorted(known.__name__ for known in _FREQUENCIES))})."
            ) from None
        assert isinstance(rotary, RotaryEmbeddingBase)  # base of every known class
        self._take(
            rotary,
            frequencies,
            head_size=rotary.head_size,
            is_neox=rotary.is_neox_style,
            table_rows=rotary.cos_sin_cache.shape[0],
        )
        self._check_table(layer)

    def _take(
        self,
        rotary: torch.nn.Module,
        frequencies: torch.Tensor,
        *,
        head_size: int,
        is_neox: bool,
        table_rows: int,
    ) -> None:
        self.rotary = rotary
        self.frequencies = frequencies
        """Radians per rope position: float64 ``[rotary_dim / 2]``."""
        self.rotary_dim = 2 * len(frequencies)
        self.head_size = head_size
        self.is_neox = is_neox
        self.table_rows = table_rows
        """Rope positions the model can be given."""
        self._rows: dict[int, int] = {}
        self._table = torch.empty(0)

    def extend(self, rows: int, exact_from: int) -> None:
        """Lengthen the module's table to at least ``rows`` rope positions.

        Rows before ``exact_from`` stay the model's own, bit for bit. From there on they are
        computed in float64 from the module's frequencies, times its magnitude (yarn), and rounded
        to the table's dtype: vLLM rounds angles to float32, an error that grows with the position
        and would be the largest one of a long stream. Call it before the model is compiled or
        captured: the table is a buffer of the module.
        """
        table = self._read_table()
        own = table[:exact_from]
        positions = torch.arange(len(own), max(rows, self.table_rows), dtype=torch.float64)
        angles = torch.outer(positions, self.frequencies)
        more = torch.cat((angles.cos(), angles.sin()), dim=-1) * table[0, 0].double().cpu()
        longer = torch.cat((own, more.to(table)))
        self._write_table(longer)
        self.table_rows = len(longer)
        # vLLM hands the same module to the next model with these settings in this process.
        for key in [key for key, module in _ROPE_DICT.items() if module is self.rotary]:
            del _ROPE_DICT[key]

    def limit(self, rows: int) -> None:
        """Let no rope position be ``rows`` or more, whatever the table holds."""
        self.table_rows = min(self.table_rows, rows)

    def _read_table(self) -> torch.Tensor:
        """The rows ``[cos | sin]`` that the module has for rope positions, from 0 on."""
        table = self.rotary.cos_sin_cache
        assert isinstance(table, torch.Tensor)
        return table

    def _write_table(self, table: torch.Tensor) -> None:
        self.rotary.cos_sin_cache = table

    def cos_sin(self, deltas: Sequence[int]) -> torch.Tensor:
        """Rows ``[cos | sin]`` of unit magnitude: float32 ``[len(deltas), rotary_dim]``."""
        steps = torch.tensor(deltas, dtype=torch.float64)
        angles = torch.outer(steps, self.frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()

    def rows_of(self, deltas: Sequence[int], device: torch.device) -> torch.Tensor:
        """Rows of ``deltas`` in the table that ``rotate`` reads: int64 ``[len(deltas)]``.

        Valid until the next call: the table is rebuilt when it is full.
        """
        if self._table.device != device or not self._rows:
            self._table = torch.empty(_TABLE_ROWS, self.rotary_dim, device=device)
            self._rows.clear()
        rows = self._rows
        missing = list(dict.fromkeys(delta for delta in deltas if delta not in rows))
        if missing:
            if len(rows) + len(missing) > self._table.shape[0]:
                missing = list(dict.fromkeys(deltas))
                rows.clear()
                size = max(2 * len(missing), _TABLE_ROWS)
                self._table = torch.empty(size, self.rotary_dim, device=device)
            first = len(rows)
            self._table[first : first + len(missing)] = upload(self.cos_sin(missing), device)
            rows.update((delta, first + i) for i, delta in enumerate(missing))
        return upload([rows[delta] for delta in deltas], device)

    def rotate(
        self, keys: torch.Tensor, rows: torch.Tensor, scratch: Scratch | None = None
    ) -> None:
        """Rotate in place.

        Element by element and in one order of operations, so that a key becomes the same bits
        wherever it lies: a page that is rotated where it is, and one that is rotated on its way
        to another page, stay interchangeable.

        Args:
            keys: float32 ``[n, ..., head_size]``, of any strides; all of ``keys[i]`` is rotated
                by the delta of ``rows[i]``.
            rows: what ``rows_of`` returned: int64 ``[n]``.
            scratch: memory for half of the keys, which are needed twice.
        """
        shape = (len(rows), *(1 for _ in keys.shape[2:]), self.rotary_dim)
        cos, sin = self._table[rows].view(shape).chunk(2, dim=-1)
        half = self.rotary_dim // 2
        if self.is_neox:
            first, second = keys[..., :half], keys[..., half : 2 * half]
        else:
            first, second = keys[..., 0 : 2 * half : 2], keys[..., 1 : 2 * half : 2]
        half_of_keys = None if scratch is None else scratch.take_like(HALF, first)
        rotated = torch.mul(first, cos, out=half_of_keys).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(first, sin)
        first.copy_(rotated)

    def _check_table(self, layer: str) -> None:
        """Compare the frequencies with the table the model really uses.

        Raises:
            ValueError: another rotation, or a magnitude that is not constant.
        """
        table = self._read_table()
        rows = sorted({*range(min(8, self.table_rows)), self.table_rows // 2, self.table_rows - 1})
        cos_sin = table[torch.tensor(rows, device=table.device)].double().cpu()
        magnitude = cos_sin[0, 0]
        angles = torch.outer(torch.tensor(rows, dtype=torch.float64), self.frequencies)
        expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude
        # Entries are rounded to the table's dtype, angles were rounded to float32.
        rounding = magnitude * torch.finfo(table.dtype).eps
        tolerance = rounding + magnitude * angles.repeat(1, 2) * 2.0**-22
        if cos_sin.shape != expected.shape or bool(((cos_sin - expected).abs() > tolerance).any()):
            raise ValueError(
                f"{layer}: the table of {type(self.rotary).__name__} is not what its frequencies "
                f"say, so cached keys cannot be re-rotated; serve this model with "
                f"--kv-policy full."
            )


def within_range(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same keys, changed in place so that conversion to ``dtype`` leaves them finite.

    A rotation may lengthen a number by a factor of sqrt(2). ``float8_e4m3fn`` has no infinity, and
    not every conversion to it stops at its largest number: some make NaN.
    """
    if dtype != torch.float8_e4m3fn:
        return keys
    largest = torch.finfo(dtype).max
    return keys.clamp_(-largest, largest)
