"""Families of large mixtures of experts: what is special is their attention, and how they route.

Experts are few and as many as vLLM's CPU kernels take; routers are far from ties, or rounding
would choose another expert than the judge's.
"""

from tests.support.families_media import IMAGE
from tests.support.families_special import LATENT
from tests.support.family import HEAD_SIZE, HEADS, HIDDEN, MAX_POSITIONS, Family, rope
from tests.support.tiny_models import BOS, EOS, LLAMA3_ROPE, PAD, VOCAB_SIZE

ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
BIASED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **ROUTED}
SOFTMAX = {"scoring_func": "softmax", "use_routing_bias": False}
"""vLLM's router on CPUs gives sigmoids to grouped experts only; published models have sigmoids."""
STEP_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
STEP_THETA = {"full_attention": 10000.0, "sliding_attention": 100.0}
STEP_PARTS = {"full_attention": 0.5, "sliding_attention": 1.0}
STEP = {
    "num_hidden_layers": len(STEP_LAYERS),
    "layer_types": STEP_LAYERS,
    "sliding_window": 24,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 2 * HEADS,
        "num_attention_groups": HEADS // 2,
        "head_dim": HEAD_SIZE,
    },
    "rope_theta": [STEP_THETA[kind] for kind in STEP_LAYERS],
    "partial_rotary_factors": [STEP_PARTS[kind] for kind in STEP_LAYERS],
    "rope_scaling": LLAMA3_ROPE,
    "yarn_only_types": ["full_attention"],
    "moe_layers_enum": "2,3",
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_intermediate_size": 64,
    "share_expert_dim": 64,
}

EXPERTS = (
    Family(
        name="GLM-4.5",
        model="Glm4Moe",
        special="partial rotation, norms of queries and keys, sigmoid router with a bias",
        settings={
            **rope(partial_rotary_factor=0.5),
            **BIASED,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    Family(
        name="GLM-4.7-Flash, yarn scaling",
        model="Glm4MoeLite",
        special="latent attention (MLA), latent queries",
        page=16,
        settings={
            **LATENT,
            "q_lora_rank": 64,
            "mlp_layer_types": ["dense", "sparse"],
            "rms_norm_eps": 1e-6,  # what transformers takes for latents, whatever is said here
        },
    ),
    Family(
        name="MiniMax M2",
        model="MiniMaxM2",
        special="partial rotation, norms of whole projections, softmax router",
        settings={
            "rotary_dim": HEAD_SIZE // 2,
            "rope_theta": 10000.0,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **SOFTMAX,
        },
        dropped=("e_score_correction_bias",),
    ),
    Family(
        name="Hy3",
        model="HYV3",
        special="norms of queries and keys, sigmoid router with a bias, shared expert",
        settings={
            **rope(),
            **ROUTED,
            "num_experts": 4,
            "num_shared_experts": 1,
            "router_scaling_factor": 2.0,
            # what published configurations say beside what transformers reads
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 64,
            "qk_norm": True,
            "route_norm": True,
        },
    ),
    Family(
        name="Step-3.5",
        model="Step3p7",
        special="hybrid, more heads of queries in layers with a window, two bases and parts of "
        "rotation, a gate per head, softmax router",
        settings=STEP,
        media={
            "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 28},
            "image_token_id": IMAGE,
        },
        published={
            "model_type": "step3p5",
            "architectures": ["Step3p5ForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_attention_heads": HEADS,
            "num_attention_groups": HEADS // 2,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": MAX_POSITIONS,
            "use_head_wise_attn_gate": True,
            "moe_router_activation": "softmax",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **STEP,
        },
        dropped=("vision", "projector"),
    ),
)
