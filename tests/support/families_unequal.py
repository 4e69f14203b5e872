"""Families whose layers differ in shape, or read the cache of another layer."""

from tests.support.family import HEAD_SIZE, HEADS, TIED, Family
from tests.support.tiny_models import VOCAB_SIZE

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
        special="the same, mixture of experts",
        settings={
            **GEMMA_4_31B,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
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
        special="hybrid, layers that read the cache of another, embeddings per layer, alternating "
        "updates",
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
)
