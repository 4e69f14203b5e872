"""How long the cache of a model may be, as far as its configuration says: bounds of the capacity.

Some models treat positions beyond a length in another way: they rotate with other frequencies,
scale queries there, or see the next chunk of the text. Positions *inside the cache* never get there
if the cache is short enough; then a stream computes what the model computes below that length.
Imports neither torch nor vLLM.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sink_vllm.policy.bound import DEFAULT_CAPACITY, Bound

if TYPE_CHECKING:
    from vllm.config import ModelConfig


_TUNED_LENGTH = 32768
"""``max_model_len`` above which vLLM tunes the temperature of Llama 4 without being asked."""


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


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries are scaled by a step function of their position, which is 1 up to its first step."""

    setting: str
    """As the configuration spells it, and its value."""
    positions: int
    """How many positions come before the first step."""

    @classmethod
    def of(cls, model_config: "ModelConfig") -> "Temperature | None":
        """The first step of a model; ``None`` where its settings do not tell, or nothing scales."""
        text = model_config.hf_text_config
        steps = []
        llama_4 = hasattr(text, "attn_temperature_tuning")
        if llama_4 and _is_tuned(model_config, model_config.max_model_len > _TUNED_LENGTH):
            steps.append(cls.of_llama_4(text))
        # Mistral: floor(position / length), in a dictionary of its own or in that of RoPE.
        own = getattr(text, "llama_4_scaling", None)
        scaled = [own] if isinstance(own, dict) else []
        scaled += [one for one in rope_parameters(text) if one.get("llama_4_scaling_beta")]
        for one in scaled:
            length = one.get("original_max_position_embeddings")
            if length:
                setting = f"original_max_position_embeddings={length}"
                steps.append(cls(setting, math.ceil(length)))
        return min(steps, key=lambda step: step.positions, default=None)

    @classmethod
    def of_llama_4(cls, text: Any) -> "Temperature":
        scale = getattr(text, "floor_scale", 8192)
        # It counts from 1: floor((position + 1) / floor_scale).
        return cls(f"floor_scale={scale}", math.ceil(scale) - 1)

    @property
    def bound(self) -> Bound:
        """Half of the positions by default.

        A window is rotated back before its rope positions reach the step. With half of them, no key
        is rotated more than once or twice, and a stream is found in the prefix cache again.
        """
        return Bound(
            most=self.positions,
            default=(self.positions + 1) // 2,
            name=f"the positions before the first at which queries are scaled ({self.setting})",
        )

    def note(self) -> str:
        return (
            f"rope positions stay below {self.positions}, from where on the model scales its "
            f"queries ({self.setting}): up to there --max-model-len may be, and windows are "
            f"rotated back the more often"
        )


def _is_tuned(model_config: "ModelConfig", default: bool) -> bool:
    """Whether vLLM tunes the temperature of Llama 4; the model's own configuration has no say."""
    generation = model_config.try_get_generation_config() | model_config.override_generation_config
    return bool(generation.get("attn_temperature_tuning", default))


def rope_positions(model_config: "ModelConfig") -> int | None:
    """Rope positions that a stream may have, whatever the tables hold; ``None`` for any number."""
    temperature = Temperature.of(model_config)
    return None if temperature is None else temperature.positions


def bound_of(model_config: "ModelConfig", trained: int | None = None) -> Bound:
    """Of the capacity of a model.

    Args:
        model_config: of the model.
        trained: the length vLLM would start with if nobody named one; what ``model_config`` says,
            if it was made without ``--max-model-len``.
    """
    trained = model_config.max_model_len if trained is None else trained
    bounds = list(_bounds(model_config))
    long_rope = LongRope.of(model_config)
    if long_rope is not None:
        # Without --max-model-len vLLM starts with the original length, but it takes the longest.
        bounds.append(Bound(most=long_rope.longest, default=trained, name=""))
        trained = long_rope.longest
    return Bound.of(trained, bounds)


def _bounds(model_config: "ModelConfig") -> Iterator[Bound]:
    text = model_config.hf_text_config
    if hasattr(text, "attn_temperature_tuning") and not _is_tuned(model_config, False):
        # Caches of up to this length are not tuned unless somebody asks for it.
        most = max(_TUNED_LENGTH - 1, Temperature.of_llama_4(text).positions)
        name = f"the length up to which vLLM tunes no temperature of Llama 4 ({_TUNED_LENGTH})"
        yield Bound(most=most, default=most, name=name)
    else:
        temperature = Temperature.of(model_config)
        if temperature is not None:
            yield temperature.bound
    chunk = attention_chunk(model_config)
    if chunk is not None:
        name = f"one chunk of its attention (attention_chunk_size={chunk})"
        yield Bound(most=chunk, default=chunk, name=name)
    if any(parameters.get("rope_type") == "dynamic" for parameters in rope_parameters(text)):
        # vLLM takes the length times the factor for the trained one, and makes no more rows.
        rows: int = text.max_position_embeddings
        name = "the length the model was trained for (vLLM's table of dynamic RoPE ends there)"
        yield Bound(most=rows, default=rows, name=name)


def notes_of(model_config: "ModelConfig", capacity: int) -> list[str]:
    """What a user who reads the log of a start should know of the positions of a model."""
    long_rope, temperature = LongRope.of(model_config), Temperature.of(model_config)
    notes = [] if long_rope is None else [long_rope.note(capacity)]
    if temperature is not None:
        notes.append(temperature.note())
    if notes:  # which say how long it may be
        return notes
    bound = own_bound_of(model_config)
    if capacity <= bound.default == DEFAULT_CAPACITY < bound.most:
        notes.append(
            f"this model takes a capacity of up to {bound.most} tokens, the default is "
            f"{DEFAULT_CAPACITY}; --max-model-len makes it longer, and streams larger"
        )
    return notes


def own_bound_of(model_config: "ModelConfig") -> Bound:
    """The same as :func:`bound_of`, whatever ``--max-model-len`` is now: vLLM derives it anew."""
    return bound_of(model_config, model_config.get_and_verify_max_len(None))  # type: ignore[arg-type]


def attention_chunk(model_config: "ModelConfig") -> int | None:
    """Tokens in a chunk of the text, which some layers see alone; all of the cache, if it fits."""
    return getattr(model_config.hf_text_config, "attention_chunk_size", None) or None


def rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a model, one dictionary per kind of layer."""
    from vllm.transformers_utils.config import iter_rope_parameters

    return list(iter_rope_parameters(text_config))
