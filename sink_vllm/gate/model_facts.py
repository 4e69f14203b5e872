"""The part of the gate's facts that the model alone decides.

No decision is made here. Imports vLLM only inside the functions that read.
"""

import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sink_vllm.gate.lengths import Temperature, rope_parameters

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# How configurations that predate ``rope_parameters`` show that their model rotates.
_LEGACY_ROPE_SETTINGS = ("rope_theta", "rotary_dim", "rotary_emb_base", "rope_ratio")
_TEXT_ARCHITECTURE = re.compile(r'architectures=\["(\w+)"\]')
# What ``layer_types`` calls attention over everything, over the last tokens, over one chunk (of a
# size that bounds the capacity); and layers that have no other attention than these, or none.
_STREAMING_LAYERS = (
    *("attention", "full_attention", "sliding_attention", "chunked_attention"),
    *("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"),
    *("mlp", "moe", "dense", "sparse"),
)
_CHUNKED_ATTENTION_SETTINGS = ("dual_chunk_attention_config", "rswa_window")
_SPARSE_ATTENTION_SETTINGS = ("index_topk", "sparse_attention_config", "sparse_attn_config")
# What configurations of default values do not say, and the classes that vLLM runs do.
_SPARSE_CLASSES = ("DeepseekV4",)
_SCALED_CLASSES = ("HunYuan",)  # norms with weights follow the rotation
_POSITION_SCALING_SETTINGS = ("llama_4_scaling", "llama_4_scaling_beta", "use_logn_attn")
"""Of which ``Temperature`` knows the first step, or not."""


def model_facts(model_config: "ModelConfig") -> dict[str, Any]:
    """The part of :class:`sink_vllm.gate.facts.Facts` that the model decides, by field name."""
    text = model_config.hf_text_config
    rope = rope_parameters(text)
    name = model_config.architecture
    return {
        "architecture": name,
        "positions": _positions(model_config, rope),
        "rope_types": tuple(sorted({_rope_type(parameters) for parameters in rope})),
        "transformers_backend": model_config.using_transformers_backend(),
        "runner": model_config.runner_type,
        "encoder_decoder": model_config.is_encoder_decoder,
        "attention_free": model_config.is_attention_free,
        "recurrent_layers": _recurrent_layers(model_config),
        "convolves_part_of_projection": name.startswith("Qwen3_5"),
        "heads_rotated_apart": name.startswith("Lfm2"),
        "multimodal": model_config.supports_multimodal_inputs,
        "foreign_mrope": _foreign_mrope(model_config),
        "chunked_attention": _chunked_attention(text),
        "value_size": _value_size(model_config),
        "scaled_after_rotation": name.startswith(_SCALED_CLASSES),
        "mla": model_config.use_mla,
        "hidden_latents": None if model_config.use_mla else _setting(text, ("kv_lora_rank",)),
        "static_sinks": _setting(text, ("param_sink_number",)),
        "prefix_lm": getattr(text, "prefix_lm", None) is not None,
        "sparse_attention": _setting(text, _SPARSE_ATTENTION_SETTINGS) is not None
        or name.startswith(_SPARSE_CLASSES),
        # Attention in both directions over images alone ends with the images.
        "bidirectional": not getattr(text, "is_causal", True)
        or (model_config.is_mm_prefix_lm and not model_config.supports_multimodal_inputs),
        "diffusion": model_config.is_diffusion,
        "position_scaled_attention": _position_scaled_attention(model_config, rope),
        "prompt_embeds": model_config.enable_prompt_embeds,
        "custom_logits_processors": _custom_logits_processors(model_config),
    }


def _custom_logits_processors(model_config: "ModelConfig") -> str | None:
    from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

    if model_config.logits_processors:
        return "--logits-processors"
    # vLLM loads those of installed packages without being asked.
    plugin = next(iter(entry_points(group=LOGITSPROCS_GROUP)), None)
    return None if plugin is None else f"the installed plugin {plugin.name!r}"


def _rope_type(parameters: dict[str, Any]) -> str:
    # Fourier position embeddings call themselves "default" in vLLM's rope_type.
    return "fope" if parameters.get("use_fope") else str(parameters.get("rope_type", "default"))


def _positions(model_config: "ModelConfig", rope: list[dict[str, Any]]) -> str:
    """How the model knows positions, as far as its configuration and its code tell.

    Models with learned absolute embeddings (GPT-2, OPT, GPTBigCode, ...) have none of the rotary
    settings, and neither have those without any positions (NoPE), whose order comes from recurrent
    layers. Whatever is not recognised counts as ``other`` and is refused; the workers' start-up
    self-test is the second net, for a configuration that promises one thing and does another.
    """
    text = model_config.hf_text_config
    recurrent = _is_recurrent(model_config)
    named = getattr(text, "position_embedding_type", "")
    if model_config.uses_alibi:
        return "alibi"
    if named == "nope" or (recurrent and named is None):  # beside rotary settings without effect
        return "none"
    if (
        rope
        or _setting(text, _LEGACY_ROPE_SETTINGS) is not None
        or _rotates(model_config.architecture)
    ):
        return "rope"
    return "none" if recurrent else "other"


def _rotates(architecture: str) -> bool:
    """Whether vLLM's code of the model makes rotary modules, whatever its configuration names.

    Code of multimodal models names the architecture of their text.
    """
    code = _code_of(architecture)
    codes = [code, *map(_code_of, _TEXT_ARCHITECTURE.findall(code))]
    return any("get_rope(" in one for one in codes)


def _is_recurrent(model_config: "ModelConfig") -> bool:
    return model_config.is_hybrid or model_config.has_inner_state


def _recurrent_layers(model_config: "ModelConfig") -> tuple[str, ...]:
    if not _is_recurrent(model_config):
        return ()
    code = _code_of(model_config.architecture)
    shapes = re.findall(r"MambaStateShapeCalculator\.(\w+)_state_shape", code)
    return tuple(sorted(set(shapes))) or ("unknown",)


def _code_of(architecture: str) -> str:
    """The text of vLLM's code of the model; nothing if there is none.

    Read and not imported: models may ask for packages, and for a GPU.
    """
    from vllm.model_executor.models import ModelRegistry

    module = getattr(ModelRegistry.models.get(architecture), "module_name", None)
    spec = None if module is None else find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")


def _value_size(model_config: "ModelConfig") -> int | None:
    """By the names of MiMo V2, for layers without a window and with one."""
    text = model_config.hf_text_config
    for kind in ("", "swa_"):
        value = getattr(text, f"{kind}v_head_dim", None)
        # Asked only then: where layers have keys of several sizes, there is no answer.
        if value and not model_config.use_mla and value != getattr(text, f"{kind}head_dim", value):
            return int(value)
    return None


def _position_scaled_attention(
    model_config: "ModelConfig", rope: list[dict[str, Any]]
) -> str | None:
    if Temperature.of(model_config) is not None:
        return None
    settings = (_setting(one, _POSITION_SCALING_SETTINGS) for one in rope)
    return _setting(model_config.hf_text_config, _POSITION_SCALING_SETTINGS) or next(
        filter(None, settings), None
    )


def _foreign_mrope(model_config: "ModelConfig") -> str | None:
    if not model_config.uses_mrope:
        return None
    if model_config.using_transformers_backend():
        return "vLLM's Transformers backend"
    sections = model_config.mrope_num_dims
    return f"{sections} sections" if sections != 3 else None


def _chunked_attention(text_config: Any) -> str | None:
    setting = _setting(text_config, _CHUNKED_ATTENTION_SETTINGS)
    if setting is not None:
        return setting
    kinds = set(getattr(text_config, "layer_types", None) or ())
    other = kinds - set(_STREAMING_LAYERS)
    if "chunked_attention" in kinds and not getattr(text_config, "attention_chunk_size", None):
        other.add("chunked_attention")  # nobody knows of which size
    return f"layer_types: {', '.join(sorted(other))}" if other else None


def _setting(config: Any, names: tuple[str, ...]) -> str | None:
    """``"name=value"`` of the first of ``names`` that is switched on in ``config``."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value:
            return f"{name}={value}"
    return None
