"""The model families that are tested: the table behind ``docs/models.md``."""

from typing import Any

from tests.support.families_experts import EXPERTS
from tests.support.families_hybrid import HYBRIDS
from tests.support.families_media import MEDIA
from tests.support.families_special import SPECIAL
from tests.support.families_unequal import UNEQUAL
from tests.support.family import (
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    LAYERS,
    MAX_POSITIONS,
    MINISTRAL_3,
    MOE,
    TIED,
    Family,
    rope,
)
from tests.support.tiny_models import LLAMA3_ROPE


def longrope(original: int, partial_rotary_factor: float = 1.0) -> dict[str, Any]:
    """Settings of a model that was trained for ``original`` tokens and stretched to more."""
    pairs = int(HEAD_SIZE * partial_rotary_factor) // 2
    return {
        "original_max_position_embeddings": original,
        **rope(
            "longrope",
            original_max_position_embeddings=original,
            partial_rotary_factor=partial_rotary_factor,
            short_factor=[1.0 + i / pairs for i in range(pairs)],
            long_factor=[1.5 + 3.0 * i / pairs for i in range(pairs)],
        ),
    }


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
GPT2_NAMES = {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": MAX_POSITIONS,
}
FALCON = {"ffn_hidden_size": 4 * HIDDEN, "bias": False}

FAMILIES = (
    Family(name="Llama 2", model="Llama", special="MHA", settings={"num_key_value_heads": HEADS}),
    Family(
        name="Llama 3.1",
        quick=True,
        model="Llama",
        special="GQA, llama3 scaling",
        settings={"rope_parameters": LLAMA3_ROPE},
    ),
    Family(
        name="Llama, linear scaling",
        model="Llama",
        special="positions divided by a factor",
        settings=rope("linear", factor=4.0) | {"max_position_embeddings": 32},
    ),
    Family(
        name="Llama, dynamic NTK",
        model="Llama",
        special="a cache as long as vLLM's table of it",
        settings=rope("dynamic", factor=2.0) | {"max_position_embeddings": 64},
    ),
    Family(
        name="Llama, yarn scaling",
        quick=True,
        model="Llama",
        special="magnitude in the table",
        settings=YARN,
    ),
    Family(
        name="Llama, proportional scaling",
        model="Llama",
        special="a part of the pairs, with the frequencies of all (as in Gemma 4)",
        settings=rope("proportional", partial_rotary_factor=0.5),
    ),
    Family(
        name="Mistral",
        model="Mistral",
        special="GQA, no sliding window",
        settings={"sliding_window": None},
    ),
    Family(
        name="Ministral 3",
        model="Ministral3",
        special="queries scaled by their position, yarn scaling",
        settings=MINISTRAL_3,
    ),
    Family(
        name="Mixtral",
        model="Mixtral",
        special="mixture of experts",
        settings={"sliding_window": None, "num_local_experts": 4},
    ),
    Family(name="Qwen2", model="Qwen2", special="biases of queries and keys"),
    Family(
        name="Qwen3",
        quick=True,
        model="Qwen3",
        special="queries and keys normalised before rotation",
    ),
    Family(
        name="Qwen3-MoE",
        model="Qwen3Moe",
        special="mixture of experts",
        settings={"num_experts": 4, **MOE},
    ),
    Family(
        name="Phi-3",
        model="Phi3",
        special="fused projections",
        settings={"original_max_position_embeddings": MAX_POSITIONS},
    ),
    Family(
        name="Phi-4-mini",
        model="Phi3",
        special="fused projections, partial rotation, longrope with its short factors",
        settings=longrope(original=64, partial_rotary_factor=0.75),  # as long as the cache
    ),
    Family(
        name="Phi-3.5",
        model="Phi3",
        special="fused projections, longrope with its long factors",
        settings=longrope(original=32),
    ),
    Family(
        name="GPT-J",
        quick=True,
        model="GPTJ",
        special="interleaved pairs, partial rotation",
        settings={**GPT2_NAMES, "rotary_dim": 16},
    ),
    Family(
        name="GLM-4",
        model="Glm4",
        special="interleaved pairs, partial rotation",
        settings=rope(partial_rotary_factor=0.5),
    ),
    Family(
        name="Falcon 7B",
        model="Falcon",
        special="one head of keys (MQA)",
        settings={
            "multi_query": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "parallel_attn": True,
            **FALCON,
        },
    ),
    Family(
        name="Falcon 40B",
        gain=1.5,
        model="Falcon",
        special="GQA, two norms",
        settings={"new_decoder_architecture": True, "alibi": False, "num_kv_heads": 2, **FALCON},
    ),
    Family(
        name="StableLM",
        model="StableLm",
        special="partial rotation",
        settings=rope(partial_rotary_factor=0.25),
    ),
    Family(
        name="Command R",
        gain=2.0,
        model="Cohere",
        special="interleaved pairs",
        settings={**TIED, "logit_scale": 1.0},
    ),
    Family(
        name="Gemma",
        model="Gemma",
        special="embeddings times a factor",
        settings=TIED,
        tied_gain=1.0,
    ),
    Family(
        name="OLMoE",
        model="Olmoe",
        special="mixture of experts, norms of whole projections",
        settings={"num_experts": 4, **MOE},
    ),
    Family(
        name="Falcon-RW",
        quick=True,
        distinct=90,
        model="Falcon",
        special="ALiBi",
        positions="alibi",
        settings={
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "new_decoder_architecture": False,
            **FALCON,
            "bias": True,
        },
    ),
    Family(
        name="BLOOM",
        gain=3.0,
        model="Bloom",
        special="ALiBi",
        positions="alibi",
        settings={"n_head": HEADS, "n_layer": LAYERS, "hidden_size": HIDDEN, **TIED},
    ),
    Family(
        name="MPT",
        quick=True,
        gain=3.0,
        tied_gain=1.0,
        distinct=90,  # what is clipped says less
        model="Mpt",
        special="ALiBi, clipped projections",
        positions="alibi",
        backend="sink_vllm",
        settings={
            "d_model": HIDDEN,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "max_seq_len": MAX_POSITIONS,
            "attn_config": {"clip_qkv": 2.0},  # transformers ignores ``alibi_bias_max``
            **TIED,
        },
    ),
    Family(
        name="Pythia",
        quick=True,
        model="GPTNeoX",
        special="partial rotation",
        backend="transformers",
        settings=rope(partial_rotary_factor=0.25),
    ),
    Family(
        name="Phi-1.5",
        model="Phi",
        special="partial rotation",
        backend="transformers",
        settings=rope(partial_rotary_factor=0.5),
    ),
    Family(name="OLMo", model="Olmo", special="norms without weights", backend="transformers"),
    Family(name="OLMo 2", model="Olmo2", special="norms after attention", backend="transformers"),
    Family(
        name="GLM-4-9B",
        model="Glm",
        special="interleaved pairs, partial rotation",
        backend="transformers",
        settings=rope(partial_rotary_factor=0.5),
    ),
    Family(
        name="SmolLM3",
        quick=True,
        model="SmolLM3",
        special="a layer without rotation (NoPE)",
        backend="transformers",
        still=(1,),
        settings={"no_rope_layers": [1, 0, 1, 1], "num_hidden_layers": 4},
    ),
    *SPECIAL,
    *UNEQUAL,
    *EXPERTS,
    *MEDIA,
    *HYBRIDS,
)
