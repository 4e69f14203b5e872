"""Families whose layers attend in ways of their own: sliding windows, latent attention."""

from tests.support.family import HEAD_SIZE, HEADS, HIDDEN, MOE, TIED, Family, rope

HYBRID = {"num_hidden_layers": 4, "sliding_window": 24}
GEMMA_HYBRID = {**HYBRID, **TIED, "query_pre_attn_scalar": HEAD_SIZE}
GEMMA_3 = {
    **GEMMA_HYBRID,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}
LATENT = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 512,  # the one shape of vLLM's latent attention on CPUs
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": HEAD_SIZE,
    "v_head_dim": HEAD_SIZE,
    "head_dim": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    # Without scaling, vLLM 0.32 rotates the wrong numbers on CPUs: it takes the rotated parts of
    # the tokens for neighbours in memory.
    **rope(
        "yarn",
        factor=4.0,
        original_max_position_embeddings=32,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    **MOE,
}

LLAMA_4 = Family(
    name="Llama 4",
    model="Llama4Text",
    special="chunked attention, every fourth layer without rotation (NoPE) and with queries "
    "scaled by their position",
    still=(3,),
    generation={"attn_temperature_tuning": True},  # or vLLM scales caches above 32768 only
    settings={
        "num_hidden_layers": 4,
        "attention_chunk_size": 64,  # as long as the cache
        "floor_scale": 129,  # twice the cache, half of the table it would have
        "attn_scale": 2.0,
        "intermediate_size_mlp": 2 * HIDDEN,
        "num_local_experts": 2,
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        **rope(),
    },
)
DEEPSEEK_V3 = {
    **LATENT,
    "q_lora_rank": 64,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

SPECIAL = (
    Family(
        name="Mistral 7B v0.1",
        model="Mistral",
        special="a sliding window in every layer",
        settings={"sliding_window": 29},
    ),
    LLAMA_4,
    Family(
        name="Gemma 2",
        model="Gemma2",
        special="hybrid, soft caps",
        settings={
            **GEMMA_HYBRID,
            "attn_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        tied_gain=1.0,
    ),
    Family(
        name="Gemma 3",
        quick=True,
        model="Gemma3Text",
        special="hybrid, two bases of rotation",
        settings=GEMMA_3,
        tied_gain=1.0,
    ),
    Family(
        name="gpt-oss",
        model="GptOss",
        special="hybrid, learned softmax sinks, yarn scaling",
        settings={
            **HYBRID,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
            ),
        },
    ),
    Family(
        name="Command R7B",
        gain=2.0,
        model="Cohere2",
        special="hybrid, full attention without rotation (NoPE), window into the sinks",
        still=(3,),
        settings={
            **HYBRID,
            **TIED,
            "sliding_window": 48,
            "logit_scale": 1.0,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        },
    ),
    Family(
        name="DeepSeek-V2",
        quick=True,
        model="DeepseekV2",
        special="latent attention (MLA), yarn scaling",
        page=16,
        settings={**LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    ),
    Family(
        name="DeepSeek-V3",
        model="DeepseekV3",
        special="latent attention (MLA), latent queries",
        page=16,
        settings=DEEPSEEK_V3,
    ),
    Family(
        name="OLMo 3",
        model="Olmo3",
        backend="transformers",
        special="hybrid, norms after attention, window as long as the cache",
        settings={
            **HYBRID,
            "sliding_window": 64,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        },
    ),
)
