"""Watches which memory a model reads its positions from; CUDA graphs replay addresses."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class PositionsSeen:
    """What the model was given, over all forward passes since watching began."""

    addresses: list[int] = field(default_factory=list)
    """Distinct addresses of ``positions``, in the order of their first use."""
    tables: list[int] = field(default_factory=list)
    """Distinct addresses of the first layer's rotary table (transformers: its frequencies)."""
    passes: int = 0
    largest: int = 0
    """Largest position given to the model."""


def watch_positions(runner: Any) -> PositionsSeen:
    """Watch the forward passes of a model runner that has been started."""
    seen = PositionsSeen()
    rotations = [layer.rotation for layer in runner.attention_layers if layer.rotation]

    def before_forward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs["positions"]
        seen.passes += 1
        seen.largest = max(seen.largest, int(positions.max()))
        if positions.data_ptr() not in seen.addresses:
            seen.addresses.append(positions.data_ptr())
        for rotation in rotations[:1]:
            rotary = rotation.rotary
            table = rotary.cos_sin_cache if hasattr(rotary, "cos_sin_cache") else rotary.inv_freq
            if table.data_ptr() not in seen.tables:
                seen.tables.append(table.data_ptr())

    runner.get_model().register_forward_pre_hook(before_forward, with_kwargs=True)
    return seen
