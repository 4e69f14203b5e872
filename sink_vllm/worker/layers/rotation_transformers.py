"""Rotation of keys by the rotary modules of transformers (vLLM's Transformers backend).

These modules keep frequencies and no table: they compute cosines and sines of whatever positions
they are given. How they pair dimensions is not in the module but next to it, in the function
``rotate_half`` of the model's source file; it is asked. As with every other rotation, the start-up
self-test has the last word.
"""

import sys
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.models.utils import extract_layer_index

from sink_vllm.worker.layers.rotation import Rotation

_PAIRINGS = {(-2, -3, 0, 1): True, (-1, 0, -3, 2): False}
"""What ``rotate_half`` makes of (0, 1, 2, 3), and whether it pairs halves (neox)."""


def is_transformers_rotary(module: nn.Module) -> bool:
    """Whether ``module`` is a rotary module of transformers: frequencies and no table."""
    names = [f"{one}_inv_freq" for one in getattr(module, "layer_types", ())] or ["inv_freq"]
    return type(module).__name__.endswith("RotaryEmbedding") and all(
        isinstance(getattr(module, name, None), torch.Tensor) for name in names
    )


def kind_of_layer(rotary: nn.Module, layer: str) -> str | None:
    """Which of the module's frequencies a layer uses; ``None`` if there is one set of them.

    Models whose sliding-window layers rotate differently (OLMo 3) keep both sets in one module.
    """
    if not hasattr(rotary, "layer_types"):
        return None
    config: Any = rotary.config
    return str(config.layer_types[extract_layer_index(layer)])


class TransformersRotation(Rotation):
    """``R(delta)`` of a rotary module of transformers."""

    has_table: ClassVar = False

    def __init__(self, rotary: nn.Module, layer: str, head_size: int) -> None:
        """Take over frequencies and pairing of ``rotary``.

        Args:
            rotary: rotary module, after the model has been loaded.
            layer: name of an attention layer that uses it, for messages.
            head_size: of that layer.

        Raises:
            ValueError: the model's source does not show how dimensions are paired.
        """
        rotate_half = getattr(sys.modules[type(rotary).__module__], "rotate_half", None)
        shown = None if rotate_half is None else rotate_half(torch.arange(4)).tolist()
        if shown is None or tuple(shown) not in _PAIRINGS:
            raise ValueError(
                f"{layer}: the source of {type(rotary).__name__} does not show which dimensions "
                f"it rotates together, so cached keys cannot be re-rotated; serve this model "
                f"with --kv-policy full."
            )
        kind = kind_of_layer(rotary, layer)
        frequencies = getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq")
        assert isinstance(frequencies, torch.Tensor)
        self._take(
            rotary,
            frequencies.double().cpu(),
            head_size=head_size,
            is_neox=_PAIRINGS[tuple(shown)],
            table_rows=0,
        )

    def extend(self, rows: int, exact_from: int) -> None:
        """Let positions run up to ``rows``: there is no table to lengthen."""
        self.table_rows = max(self.table_rows, rows)
