"""Longer RoPE tables, so that a stream seldom has to rotate its window back.

A stream's rope positions grow by ``g`` per eviction until the table ends; then every key of the
window is rotated back once (re-anchoring), in the longest step there is. With a capacity of the
trained length, a model's own table would end at the first eviction, and keys would be rotated, and
rounded, again at every one. Scores depend on differences of positions only, so more rows change
nothing but how far those positions may run.
"""

import os
from collections.abc import Iterable

from sink_vllm.worker.layers.attention import AttentionLayer

ROWS = "SINK_VLLM_ROPE_ROWS"
"""Environment variable for another number of rows than ``TABLE_ROWS``: fewer of them let tests and
measurements see many re-anchorings. The same in all workers of an engine."""
TABLE_ROWS = 65_536
"""Rows a table has at least: 16 MiB for 128 rotated dimensions in 16 bits. A window is rotated
once in so many tokens, less the capacity."""
TABLE_CAPACITIES = 4
"""The same in capacities: a window is rotated at most once per three capacities."""


def extend_rope_tables(
    layers: Iterable[AttentionLayer], capacity: int, most: int | None = None
) -> None:
    """Let the rope positions of every rotating layer run up to the larger of both numbers.

    Positions below the capacity, all that streams see which never evict, keep the model's rows.
    Modules without a table compute angles from positions in float32, an error that grows with the
    position: for them it is ``TABLE_CAPACITIES * capacity``.

    Args:
        layers: of the loaded model.
        capacity: cached tokens.
        most: rope positions that the model may be given at all; ``None`` for any number.

    Raises:
        ValueError: the environment variable is no number of rows.
    """
    least = _least_rows()
    for rotation in {id(one.rotation): one.rotation for one in layers if one.rotation}.values():
        rows = TABLE_CAPACITIES * capacity
        rotation.extend(max(rows, least) if rotation.has_table else rows, exact_from=capacity)
        if most is not None:
            rotation.limit(most)


def _least_rows() -> int:
    given = os.environ.get(ROWS, str(TABLE_ROWS))
    if not given.isdecimal():
        raise ValueError(f"{ROWS}={given!r} is no number of rows; unset it for {TABLE_ROWS}.")
    return int(given)
