"""Families whose layers are recurrent but for some: their states run on when tokens are evicted.

A page holds the state of a layer, so pages are larger than elsewhere, and so is the cache. Weights
are drawn so that states forget slowly (``tests.support.family``): what was evicted stays in them
for as many tokens as the cache has.
"""

from typing import Any

from tests.support.family import HIDDEN, MOE, TIED, Family, rope

MAMBA: dict[str, Any] = {
    "mamba_d_ssm": HIDDEN,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 1,
    "mamba_chunk_size": 16,
}
GDN: dict[str, Any] = {
    # The one shape of vLLM's gated delta nets on CPUs; heads of attention to match its state.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}

HYBRIDS = (
    Family(
        name="Falcon-H1",
        quick=True,
        model="FalconH1",
        special="Mamba2 beside attention in every layer",
        recurrent=True,
        settings=MAMBA,
    ),
    Family(
        name="Granite 4 H",
        model="GraniteMoeHybrid",
        special="Mamba2, attention without positions (NoPE)",
        positions="none",
        recurrent=True,
        settings={
            **{name: value for name, value in MAMBA.items() if name != "mamba_d_ssm"},
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "shared_intermediate_size": HIDDEN,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.2,
            "position_embedding_type": "nope",
        },
    ),
    Family(
        name="Nemotron 3",
        model="NemotronH",
        special="Mamba2, attention without positions (NoPE), layers without either",
        positions="none",
        recurrent=True,
        settings={
            "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    Family(
        name="LFM2",
        distinct=60,  # its first stream has 65
        model="Lfm2",
        special="short convolutions",
        recurrent=True,
        stride=32,  # a state is smaller than a page
        settings={
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            # Of published checkpoints, which vLLM reads and the class of transformers does not.
            **dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), HIDDEN),
            "conv_L_cache": 3,
            **TIED,
        },
        options={"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
    ),
    Family(
        name="Qwen3.5",
        model="Qwen3_5Text",
        special="the text class; gated delta nets, partial rotation, M-RoPE",
        dtype="bfloat16",
        torch_convolutions=True,
        recurrent=True,
        settings={
            **GDN,
            **rope(partial_rotary_factor=0.5, mrope_section=[6, 5, 5], mrope_interleaved=True),
        },
    ),
    Family(
        name="Qwen3-Next",
        model="Qwen3Next",
        special="gated delta nets, partial rotation, mixture of experts",
        dtype="bfloat16",
        torch_convolutions=True,
        recurrent=True,
        settings={
            **GDN,
            **rope(partial_rotary_factor=0.5),
            **MOE,
            # All of them: a router that rounding makes choose others would hide everything else.
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 64,
        },
    ),
)
