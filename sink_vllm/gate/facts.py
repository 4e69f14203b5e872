"""The facts the gate looks at, and how they are read from vLLM's configuration.

No decision is made here. Imports vLLM only inside the functions that read.
"""

import os
import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sink_vllm.gate.lengths import Temperature, rope_parameters
from sink_vllm.policy.options import SinkOptions, flag

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the gate looks at. The defaults describe a start that is accepted."""

    # The model.
    architecture: str = "LlamaForCausalLM"
    positions: str = "rope"
    """``rope``, ``alibi``, ``none``, or ``other`` (learned absolute embeddings, or nothing we
    recognise)."""
    rope_types: tuple[str, ...] = ("default",)
    transformers_backend: bool = False
    """Whether vLLM runs the model code of transformers."""
    runner: str = "generate"
    encoder_decoder: bool = False
    attention_free: bool = False
    recurrent_layers: tuple[str, ...] = ()
    """Kinds of recurrent layers, as vLLM names the shapes of their states; ``unknown`` where its
    code of the model names none."""
    heads_rotated_apart: bool = False
    """The model hands its heads to the rotary module with a dimension of their own."""
    convolves_part_of_projection: bool = False
    """Gated delta nets give their convolution a part of a wider projection."""
    multimodal: bool = False
    """Requests may bring images, audio and the like: vLLM does not serve the text side alone."""
    foreign_mrope: str | None = None
    """Positions in sections (M-RoPE), and not as vLLM's own classes give three of them to text."""
    chunked_attention: str | None = None
    """The setting by which some layers see neither everything nor just the last tokens of a cache,
    however short it is."""
    value_size: int | None = None
    """Numbers of a value, where a key of the same head has another number of them."""
    scaled_after_rotation: bool = False
    """Keys and queries are multiplied by weights, number by number, once they are rotated."""
    mla: bool = False
    hidden_latents: str | None = None
    """The setting by which keys are of low rank, though vLLM manages no latents."""
    static_sinks: str | None = None
    """The setting by which the model puts keys of its own into the cache."""
    prefix_lm: bool = False
    sparse_attention: bool = False
    bidirectional: bool = False
    diffusion: bool = False
    position_scaled_attention: str | None = None
    """The setting that scales queries by their absolute position, nobody knows from which on."""
    prompt_embeds: bool = False
    custom_logits_processors: str | None = None
    """The option that names some, or the installed plugin that brings some."""
    watermarking: str | None = None
    """The algorithm that marks texts."""

    # The engine.
    platform: str = "cpu"
    cpu_has_fp8_kernels: bool = True
    cpu_has_bf16_convolutions: bool = False
    routed_experts: bool = False
    rust_frontend: bool = False
    rotary_op: bool = False
    """Whether rotary modules run vLLM's own op and not their torch code."""
    chunked_prefill: bool = True
    prefix_caching: bool = False
    replayed_states: bool = False
    """Whether recurrent layers compute states from a buffer of inputs."""
    kv_cache_dtype: str = "auto"
    speculative_method: str | None = None
    draft_kv_cache: bool = False
    """Whether what drafts caches keys of its own."""
    kv_connector: str | None = None
    kv_offloading_gib: float | None = None
    kept_pages: str | None = None
    """The option that keeps pages outside the block pool."""
    kept_on_disk: bool = False
    executor: str | None = None
    """What starts the workers, if it is not a process of this machine."""
    kv_events: bool = False
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
        # What ``gdn_attention._cpu_gdn_attention_nonspec`` asks, likewise.
        cpu_has_bf16_convolutions=torch.cpu._is_avx512_bf16_supported(),
        routed_experts=vllm_config.aux_output_config.enable_return_routed_experts,
        rust_frontend=os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
        rotary_op=not {"none", "-rotary_embedding"} & {*vllm_config.compilation_config.custom_ops},
        chunked_prefill=vllm_config.scheduler_config.enable_chunked_prefill,
        prefix_caching=cache.enable_prefix_caching,
        replayed_states=cache.use_replayssm,
        kv_cache_dtype=cache.cache_dtype,
        speculative_method=None if speculative is None else str(speculative.method),
        draft_kv_cache=speculative is not None and speculative.uses_draft_kv_cache(),
        kv_connector=None if transfer is None else str(transfer.kv_connector),
        kv_offloading_gib=cache.kv_offloading_size,
        **_kept_pages(vllm_config),
        prefill_context_parallel=parallel.prefill_context_parallel_size,
        decode_context_parallel=parallel.decode_context_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        watermarking=None if (mark := vllm_config.watermark_config) is None else mark.algorithm,
        v2_runner=vllm_config.use_v2_model_runner,
        legacy_ray_executor=parallel.use_ray and older_ray_executor(),
        microbatching=parallel.use_ubatching,
        kv_sharing_fast_prefill=cache.kv_sharing_fast_prefill,
    )


def _kept_pages(vllm_config: "VllmConfig") -> dict[str, Any]:
    options = SinkOptions.parse(vllm_config.additional_config)
    if options is None or not options.sink_host_gib:
        return {}
    parallel, events = vllm_config.parallel_config, vllm_config.kv_events_config
    name = parallel.distributed_executor_backend
    elsewhere = f"{parallel.nnodes} nodes" if parallel.nnodes > 1 else str(name)
    is_local = parallel.nnodes == 1 and name in (None, "uni", "mp")
    return {
        "kept_pages": f"{flag('sink_host_gib')}={options.sink_host_gib}",
        "kept_on_disk": options.sink_disk is not None,
        "executor": None if is_local else elsewhere,
        "kv_events": events is not None and events.enable_kv_cache_events,
    }


def older_ray_executor() -> bool:
    """Whether Ray would run vLLM's older executor, which 0.33 no longer has."""
    from vllm import envs

    return not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)


def model_facts(model_config: "ModelConfig") -> dict[str, Any]:
    """The part of :class:`Facts` that the model alone decides, by field name."""
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
