"""The facts the gate looks at, and how they are read from vLLM's configuration.

No decision is made here. Imports vLLM only inside the functions that read.
"""

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# How configurations that predate ``rope_parameters`` show that their model rotates.
_LEGACY_ROPE_SETTINGS = ("rope_theta", "rotary_dim", "rotary_emb_base", "rope_ratio")
# The names ``layer_types`` uses for attention over everything, and over the last tokens.
_STREAMING_ATTENTION = ("attention", "full_attention", "sliding_attention")
_CHUNKED_ATTENTION_SETTINGS = (
    "attention_chunk_size",
    "dual_chunk_attention_config",
    "rswa_window",
)
_SPARSE_ATTENTION_SETTINGS = ("index_topk", "sparse_attention_config", "sparse_attn_config")
_POSITION_SCALING_SETTINGS = (
    "attn_temperature_tuning",
    "llama_4_scaling",
    "llama_4_scaling_beta",
    "use_logn_attn",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the gate looks at. The defaults describe a start that is accepted."""

    # The model.
    architecture: str = "LlamaForCausalLM"
    positions: str = "rope"
    """``rope``, ``alibi`` or ``other`` (learned absolute embeddings, or nothing we recognise)."""
    rope_types: tuple[str, ...] = ("default",)
    runner: str = "generate"
    encoder_decoder: bool = False
    attention_free: bool = False
    recurrent_layers: bool = False
    multimodal: bool = False
    mrope: bool = False
    chunked_attention: str | None = None
    """The setting by which some layers see neither everything nor just the last tokens."""
    unequal_layers: bool = False
    shared_kv_layers: int = 0
    mla: bool = False
    sparse_attention: bool = False
    bidirectional: bool = False
    diffusion: bool = False
    position_scaled_attention: str | None = None
    """The setting that scales queries by their absolute position."""
    prompt_embeds: bool = False
    custom_logits_processors: str | None = None
    """The option that names some, or the installed plugin that brings some."""
    watermarking: str | None = None
    """The algorithm that marks texts."""

    # The engine.
    platform: str = "cpu"
    cpu_has_fp8_kernels: bool = True
    routed_experts: bool = False
    rust_frontend: bool = False
    chunked_prefill: bool = True
    kv_cache_dtype: str = "auto"
    speculative_method: str | None = None
    draft_kv_cache: bool = False
    """Whether what drafts caches keys of its own."""
    kv_connector: str | None = None
    kv_offloading_gib: float | None = None
    prefill_context_parallel: int = 1
    decode_context_parallel: int = 1
    pipeline_parallel: int = 1
    v2_runner: bool = False
    legacy_ray_executor: bool = False
    microbatching: bool = False
    kv_sharing_fast_prefill: bool = False


def facts_of(vllm_config: "VllmConfig") -> Facts:
    """Facts of a finished configuration."""
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    speculative = vllm_config.speculative_config
    transfer = vllm_config.kv_transfer_config
    import torch
    from vllm.platforms import current_platform

    return Facts(
        **model_facts(vllm_config.model_config),
        platform=current_platform.device_type,
        # What ``cpu_attn._get_attn_isa`` asks, after the workers have started.
        cpu_has_fp8_kernels=torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported(),
        routed_experts=vllm_config.aux_output_config.enable_return_routed_experts,
        rust_frontend=os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
        chunked_prefill=vllm_config.scheduler_config.enable_chunked_prefill,
        kv_cache_dtype=cache.cache_dtype,
        speculative_method=None if speculative is None else str(speculative.method),
        draft_kv_cache=speculative is not None and speculative.uses_draft_kv_cache(),
        kv_connector=None if transfer is None else str(transfer.kv_connector),
        kv_offloading_gib=cache.kv_offloading_size,
        prefill_context_parallel=parallel.prefill_context_parallel_size,
        decode_context_parallel=parallel.decode_context_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        watermarking=None if (mark := vllm_config.watermark_config) is None else mark.algorithm,
        v2_runner=vllm_config.use_v2_model_runner,
        legacy_ray_executor=parallel.use_ray and older_ray_executor(),
        microbatching=parallel.use_ubatching,
        kv_sharing_fast_prefill=cache.kv_sharing_fast_prefill,
    )


def older_ray_executor() -> bool:
    """Whether Ray would run vLLM's older executor, which 0.33 no longer has."""
    from vllm import envs

    return not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)


def model_facts(model_config: "ModelConfig") -> dict[str, Any]:
    """The part of :class:`Facts` that the model alone decides, by field name."""
    text = model_config.hf_text_config
    architecture = model_config.model_arch_config
    rope = _rope_parameters(text)
    return {
        "architecture": model_config.architecture,
        "positions": _positions(model_config, rope),
        "rope_types": tuple(sorted({_rope_type(parameters) for parameters in rope})),
        "runner": model_config.runner_type,
        "encoder_decoder": model_config.is_encoder_decoder,
        "attention_free": model_config.is_attention_free,
        "recurrent_layers": model_config.is_hybrid or model_config.has_inner_state,
        "multimodal": model_config.is_multimodal_model,
        "mrope": model_config.uses_mrope,
        "chunked_attention": _chunked_attention(text),
        "unequal_layers": architecture.per_layer_overrides is not None,
        "shared_kv_layers": getattr(text, "num_kv_shared_layers", 0) or 0,
        "mla": model_config.use_mla,
        "sparse_attention": _setting(text, _SPARSE_ATTENTION_SETTINGS) is not None,
        "bidirectional": model_config.is_mm_prefix_lm or not getattr(text, "is_causal", True),
        "diffusion": model_config.is_diffusion,
        "position_scaled_attention": _setting(text, _POSITION_SCALING_SETTINGS)
        or next(filter(None, (_setting(p, _POSITION_SCALING_SETTINGS) for p in rope)), None),
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


def _rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a model, one dictionary per kind of layer."""
    from vllm.transformers_utils.config import iter_rope_parameters

    return list(iter_rope_parameters(text_config))


def _rope_type(parameters: dict[str, Any]) -> str:
    # Fourier position embeddings call themselves "default" in vLLM's rope_type.
    return "fope" if parameters.get("use_fope") else str(parameters.get("rope_type", "default"))


def _positions(model_config: "ModelConfig", rope: list[dict[str, Any]]) -> str:
    """How the model knows positions, as far as its configuration tells.

    Models with learned absolute embeddings (GPT-2, OPT, GPTBigCode, ...) have none of the rotary
    settings. Whatever is not recognised counts as ``other`` and is refused; the workers' start-up
    self-test is the second net, for a configuration that promises RoPE and does something else.
    """
    if model_config.uses_alibi:
        return "alibi"
    if rope or _setting(model_config.hf_text_config, _LEGACY_ROPE_SETTINGS) is not None:
        return "rope"
    return "other"


def _chunked_attention(text_config: Any) -> str | None:
    setting = _setting(text_config, _CHUNKED_ATTENTION_SETTINGS)
    if setting is not None:
        return setting
    other = set(getattr(text_config, "layer_types", None) or ()) - set(_STREAMING_ATTENTION)
    return f"layer_types: {', '.join(sorted(other))}" if other else None


def _setting(config: Any, names: tuple[str, ...]) -> str | None:
    """``"name=value"`` of the first of ``names`` that is switched on in ``config``."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value:
            return f"{name}={value}"
    return None
