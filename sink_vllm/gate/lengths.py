"""How long the cache of a model may be, as far as its configuration says: bounds of the capacity.

Some models treat positions beyond a length in another way: they rotate with other frequencies,
scale queries there, or see the next chunk of the text. Positions *inside the cache* never get there
if the cache is short enough; then a stream computes what the model computes below that length.
Imports neither torch nor vLLM.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sink_vllm.policy.bound import Bound

if TYPE_CHECKING:
    from vllm.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LongRope:
    """Two sets of frequencies, of which vLLM chooses one when it starts."""

    original: int
    """The longest cache (tokens) that is rotated with the short factors."""
    longest: int
    """The longest cache at all."""

    @classmethod
    def of(cls, model_config: "ModelConfig") -> "LongRope | None":
        text = model_config.hf_text_config
        for parameters in rope_parameters(text):
            if parameters.get("rope_type") == "longrope":
                longest: int = text.max_position_embeddings
                return cls(parameters["original_max_position_embeddings"], longest)
        return None

    def note(self, capacity: int) -> str:
        """What the log of a start says about it."""
        if capacity <= self.original:
            return (
                f"LongRoPE rotates with its short factors, as in stock vLLM up to the original "
                f"length of {self.original} tokens; a capacity above it takes the long ones"
            )
        return (
            f"LongRoPE rotates with its long factors, as the capacity is above the original "
            f"length; --max-model-len {self.original} takes the short ones"
        )


def bound_of(model_config: "ModelConfig") -> Bound:
    """Of the capacity of a model.

    Args:
        model_config: made without ``--max-model-len``.
    """
    trained: int = model_config.max_model_len
    bounds = list(_bounds(model_config))
    long_rope = LongRope.of(model_config)
    if long_rope is not None:
        # Without --max-model-len vLLM starts with the original length, but it takes the longest.
        bounds.append(Bound(most=long_rope.longest, default=trained, name=""))
        trained = long_rope.longest
    return Bound.of(trained, bounds)


def _bounds(model_config: "ModelConfig") -> Iterator[Bound]:
    text = model_config.hf_text_config
    if any(parameters.get("rope_type") == "dynamic" for parameters in rope_parameters(text)):
        # vLLM takes the length times the factor for the trained one, and makes no more rows.
        rows: int = text.max_position_embeddings
        name = "the length the model was trained for (vLLM's table of dynamic RoPE ends there)"
        yield Bound(most=rows, default=rows, name=name)


def notes_of(model_config: "ModelConfig", capacity: int) -> list[str]:
    """What a user who reads the log of a start should know of the positions of a model."""
    long_rope = LongRope.of(model_config)
    return [] if long_rope is None else [long_rope.note(capacity)]


def rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a model, one dictionary per kind of layer."""
    from vllm.transformers_utils.config import iter_rope_parameters

    return list(iter_rope_parameters(text_config))
