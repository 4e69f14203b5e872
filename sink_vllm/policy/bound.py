"""What bounds the capacity beside the length a model was trained for (no torch, no vLLM)."""

from collections.abc import Iterable
from dataclasses import dataclass

DEFAULT_CAPACITY = 8192
"""The capacity (tokens) that a start without ``--sink-window`` or ``--max-model-len`` gets at most.

Many models are trained for 131,072 tokens: 16 GiB of keys and values per stream for Llama 3.1 8B,
1 GiB at this capacity. A fixed number rather than a share of the free memory, because the capacity
decides what a model sees: the same command has to give the same answers on every machine.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Capacities at which a model computes what the policy says it computes, in tokens."""

    most: int
    """The largest of them."""
    default: int
    """The one for users who name neither a window nor ``--max-model-len``; see
    :data:`DEFAULT_CAPACITY`."""
    name: str
    """What this length is, as a part of a sentence."""

    @classmethod
    def of(cls, trained_len: int, others: Iterable["Bound"] = ()) -> "Bound":
        """The bounds of a model together: the shortest counts, and names itself."""
        trained = cls(
            most=trained_len, default=trained_len, name="the length the model was trained for"
        )
        bounds = [trained, *others]
        shortest = min(bounds, key=lambda bound: bound.most)  # the first of equals
        return cls(
            most=shortest.most,
            default=min(DEFAULT_CAPACITY, shortest.most, *(bound.default for bound in bounds)),
            name=shortest.name,
        )

    def limit(self, window: int | None, max_model_len: int | None) -> tuple[int, str]:
        """The largest capacity that fits what a user names, and what this length is.

        Args:
            window: ``--sink-window``.
            max_model_len: ``--max-model-len``.
        """
        if max_model_len is not None:
            return max_model_len, "--max-model-len"
        if window is None and self.default < self.most:
            return self.default, f"the default; --max-model-len may be up to {self.most}"
        return self.most, self.name
