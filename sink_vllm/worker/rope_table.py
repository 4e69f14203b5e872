"""Longer RoPE tables, so that a stream seldom has to rotate its window back.

A stream's rope positions grow by ``g`` per eviction until the table ends; then every key of the
window is rotated back once (re-anchoring). With the default capacity, the trained length, a
model's own table would end at the first eviction, and keys would be rotated, and rounded, again
at every one. Scores depend on differences of positions only, so more rows change nothing but how
far those positions may run.
"""

from collections.abc import Iterable

import torch

from sink_vllm.worker.layers import AttentionLayer

TABLE_CAPACITIES = 4
"""Rows a table has at least, in capacities: a window is rotated once per three capacities."""


def extend_rope_tables(layers: Iterable[AttentionLayer], rows: int) -> None:
    """Give every rotary module of ``layers`` a table of at least ``rows`` rope positions.

    The model's own rows stay bit for bit; new ones are computed in float64 from the module's
    frequencies, times its magnitude (yarn), and rounded to the table's dtype. Call it before the
    model is compiled or captured: the table is a buffer of the module.
    """
    for layer in layers:
        rotation = layer.rotation
        if rotation is None or rotation.table_rows >= rows:
            continue
        table = rotation.rotary.cos_sin_cache
        positions = torch.arange(rotation.table_rows, rows, dtype=torch.float64)
        angles = torch.outer(positions, rotation.frequencies)
        magnitude = table[0, 0].double().cpu()
        more = torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude
        rotation.rotary.cos_sin_cache = torch.cat((table, more.to(table)))
        rotation.table_rows = rows
