"""The facts the gate looks at, and how they are read from vLLM's configuration.

No decision is made here. Imports vLLM only inside the functions that read.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sink_vllm.gate.model_facts import model_facts
from sink_vllm.policy.options import SinkOptions, flag

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
