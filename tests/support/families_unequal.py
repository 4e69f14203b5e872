"""Families whose layers differ in shape, or read the cache of another layer."""

from tests.support.families_media import IMAGE
from tests.support.family import HEAD_SIZE, HEADS, HIDDEN, MAX_POSITIONS, MOE, TIED, Family
from tests.support.tiny_models import BOS, EOS, PAD, VOCAB_SIZE

ALTERNATING = [*["sliding_attention"] * 3, "full_attention"] * 2
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
PER_LAYER = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 32}
GEMMA_4 = {
    **TIED,
    "num_hidden_layers": 4,
    "layer_types": ALTERNATING[:4],
    "sliding_window": 24,
    "rope_parameters": ROPE,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 2 * HEAD_SIZE,
}
# A page of a layer with a window is twice as large as one of the others.
GEMMA_4_31B = {
    **GEMMA_4,
    "num_key_value_heads": HEADS,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
}

MIMO_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MIMO = {
    "num_hidden_layers": len(MIMO_LAYERS),
    "layer_types": MIMO_LAYERS,
    "num_key_value_heads": 1,
    "v_head_dim": HEAD_SIZE,
    "attention_value_scale": 0.707,
    "sliding_window": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    **MOE,
}

UNEQUAL = (
    Family(
        name="Gemma 4 31B",
        quick=True,
        model="Gemma4Text",
        special="hybrid, fewer and longer heads in layers without a window, whose values are keys, "
        "too; a part of the pairs rotated, with the frequencies of all",
        settings=GEMMA_4_31B,
        tied_gain=1.0,
    ),
    Family(
        name="Gemma 4 26B-A4B",
        model="Gemma4Text",
        special="the same, mixture of experts, window into the sinks: pages of several sizes "
        "behind one table",
        quick=True,
        settings={
            **GEMMA_4_31B,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "sliding_window": 48,
        },
        tied_gain=1.0,
    ),
    Family(
        name="Gemma 4 E2B, E4B",
        quick=True,
        model="Gemma4Text",
        special="hybrid, longer heads in layers without a window, layers that read the cache of "
        "another, embeddings per layer",
        settings={
            **GEMMA_4,
            **PER_LAYER,
            "num_hidden_layers": 8,
            "layer_types": ALTERNATING,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
        },
        tied_gain=1.0,
    ),
    Family(
        name="Gemma 3n",
        model="Gemma3nText",
        special="hybrid, layers that read the cache of another, alternating updates; without "
        "embeddings per layer, which vLLM's class of the text does not look up",
        settings={
            **TIED,
            **PER_LAYER,
            "num_hidden_layers": 8,
            "layer_types": ALTERNATING,
            "sliding_window": 24,
            "num_kv_shared_layers": 4,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0] * 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        tied_gain=1.0,
    ),
    Family(
        name="Gemma 4, multimodal",
        model="Gemma4",
        special="as Gemma 4 31B",
        settings=GEMMA_4_31B,
        media={
            "image_token_id": IMAGE,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 14,
                "position_embedding_size": 64,
            },
        },
        tied_gain=1.0,
    ),
    Family(
        name="MiMo-V2-Flash, values as long as keys",
        model="MiMoV2Flash",
        special="hybrid, more heads of keys and learned softmax sinks in layers with a window, two "
        "bases of rotation, partial rotation, sigmoid router with a bias",
        settings={
            **MIMO,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 0.5,
                },
            },
        },
        published={
            "model_type": "mimo_v2_flash",
            "architectures": ["MiMoV2FlashForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_attention_heads": HEADS,
            "head_dim": HEAD_SIZE,
            "swa_num_attention_heads": HEADS,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": HEAD_SIZE,
            "swa_v_head_dim": HEAD_SIZE,
            "hybrid_layer_pattern": [0, 1, 1, 0],
            "moe_layer_freq": [0, 1, 1, 1],
            "sliding_window_size": 24,
            "add_swa_attention_sink_bias": True,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_theta": 10000.0,
            "swa_rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
            "layernorm_epsilon": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **MIMO,
        },
    ),
)
