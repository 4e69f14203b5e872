"""Longer RoPE tables, so that a stream seldom has to rotate its window back.

A stream's rope positions grow by ``g`` per eviction until the table ends; then every key of the
window is rotated back once (re-anchoring). With a capacity of the trained length, a model's
own table would end at the first eviction, and keys would be rotated, and rounded, again
at every one. Scores depend on differences of positions only, so more rows change nothing but how
far those positions may run.
"""

from collections.abc import Iterable

from sink_vllm.worker.layers.attention import AttentionLayer

TABLE_CAPACITIES = 4
"""Rows a table has at least, in capacities: a window is rotated once per three capacities."""


def extend_rope_tables(
    layers: Iterable[AttentionLayer], capacity: int, most: int | None = None
) -> None:
    """Let the rope positions of every rotating layer run up to ``TABLE_CAPACITIES * capacity``.

    Positions below the capacity, all that streams see which never evict, keep the model's rows.

    Args:
        layers: of the loaded model.
        capacity: cached tokens.
        most: rope positions that the model may be given at all; ``None`` for any number.
    """
    for rotation in {id(one.rotation): one.rotation for one in layers if one.rotation}.values():
        rotation.extend(TABLE_CAPACITIES * capacity, exact_from=capacity)
        if most is not None:
            rotation.limit(most)
