"""Tiny random-weight checkpoints of the model families: real architectures to the engine.

Shapes are the least that shows what is special about a family; weights are scaled as in
``tests.tiny_models``: attention is peaked, its output outweighs the embedding, logits are spread.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig

from tests.tiny_models import BOS, EOS, LLAMA3_ROPE, PAD, VOCAB_SIZE, _tokenizer

HIDDEN, HEADS, HEAD_SIZE, LAYERS, MAX_POSITIONS = 128, 4, 32, 2, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of models."""

    name: str
    """As people call it; what the documentation shows."""
    model: str
    """Name of the configuration class in transformers, without ``Config``."""
    special: str
    """What this row is in the table for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, on top of the common ones."""
    positions: str = "rope"
    backend: str = "vLLM"
    """Whose model code vLLM 0.32 runs: its own, that of transformers, or this project's."""
    still: tuple[int, ...] = ()
    """Layers whose keys do not depend on the position."""
    page: int = 32
    """Tokens per KV page: the smallest of the attention backend."""
    tied_gain: float = 4.0
    """Scale of embeddings that are the output's weights, too."""
    quick: bool = False
    """Whether it is tested by default, for all that is like it."""
    v2: bool = False
    """Whether it is tested on the V2 model runner, too."""

    @property
    def architecture(self) -> str:
        return f"{self.model.removesuffix('Text')}ForCausalLM"

    @property
    def model_class(self) -> Any:
        """Of transformers."""
        return getattr(transformers, self.architecture)

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-")


def rope(rope_type: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


TIED = {"tie_word_embeddings": True}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
GPT2_NAMES = {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": MAX_POSITIONS,
}
HYBRID = {"num_hidden_layers": 4, "sliding_window": 24}
GEMMA_HYBRID = {**HYBRID, **TIED, "query_pre_attn_scalar": HEAD_SIZE}
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
FALCON = {"ffn_hidden_size": 4 * HIDDEN, "bias": False}

FAMILIES = (
    Family(name="Llama 2", model="Llama", special="MHA", settings={"num_key_value_heads": HEADS}),
    Family(
        name="Llama 3.1",
        quick=True,
        v2=True,
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
        name="Llama, yarn scaling",
        quick=True,
        model="Llama",
        special="magnitude in the table",
        settings=YARN,
    ),
    Family(
        name="Mistral",
        model="Mistral",
        special="GQA, no sliding window",
        settings={"sliding_window": None},
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
        special="fused projections, partial rotation",
        settings={
            "original_max_position_embeddings": MAX_POSITIONS,
            **rope(partial_rotary_factor=0.75),
        },
    ),
    Family(
        name="GPT-J",
        quick=True,
        v2=True,
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
        name="Mistral 7B v0.1",
        model="Mistral",
        special="a sliding window in every layer",
        settings={"sliding_window": 29},
    ),
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
        v2=True,
        model="Gemma3Text",
        special="hybrid, two bases of rotation",
        settings={
            **GEMMA_HYBRID,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
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
        name="OLMoE",
        model="Olmoe",
        special="mixture of experts, norms of whole projections",
        settings={"num_experts": 4, **MOE},
    ),
    Family(
        name="DeepSeek-V2",
        quick=True,
        model="DeepseekV2",
        special="latent attention (MLA; on CPUs only), yarn scaling",
        page=16,
        settings={**LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    ),
    Family(
        name="DeepSeek-V3",
        model="DeepseekV3",
        special="latent attention (MLA; on CPUs only), latent queries",
        page=16,
        settings={
            **LATENT,
            "q_lora_rank": 64,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    Family(
        name="Falcon-RW",
        quick=True,
        v2=True,
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
        model="Bloom",
        special="ALiBi",
        positions="alibi",
        settings={"n_head": HEADS, "n_layer": LAYERS, "hidden_size": HIDDEN, **TIED},
    ),
    Family(
        name="MPT",
        quick=True,
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
        v2=True,
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
        settings={"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3},
    ),
)


def write_family(folder: Path, family: Family) -> Path:
    """Write configuration, weights and tokenizer of a tiny model of ``family``."""
    config = config_of(family)
    model = family.model_class(config).float()
    _fill(model, family)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def config_of(family: Family) -> PreTrainedConfig:
    """The configuration: common settings in the names of the family, then its own."""
    config_class = getattr(transformers, f"{family.model}Config")
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "float32",
        "architectures": [family.architecture],
    }
    if "n_embd" in family.settings or family.model in ("Bloom", "GPTNeoX", "Falcon", "Mpt"):
        for name in ("num_key_value_heads", "head_dim"):
            del common[name]
    if {"n_embd", "d_model"} & family.settings.keys():
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            del common[name]
        for name in ("intermediate_size", "max_position_embeddings"):
            del common[name]
    config: PreTrainedConfig = config_class(**(common | family.settings))
    return config


def _fill(model: Any, family: Family) -> None:
    """Draw every weight, by what its name says it does."""
    generator = torch.Generator().manual_seed(0)
    tied = model.config.tie_word_embeddings
    offset = 1.0 if family.model.startswith("Gemma") else 0.0  # their norms add one to the weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            part = name.split(".")[-2]
            if name.endswith("bias"):
                weight.copy_(0.1 * noise)
            elif weight.dim() == 1:  # norms: near one, but not exactly
                peaked = 1.5 if part in ("q_norm", "k_norm") else 1.0
                weight.copy_(peaked * (1 + 0.1 * noise) - offset)
            elif weight is model.get_input_embeddings().weight:
                weight.copy_(noise * (family.tied_gain / weight.shape[1] ** 0.5 if tied else 1.0))
            else:
                weight.copy_(noise * _gain(name) / weight.shape[-1] ** 0.5)


def _gain(name: str) -> float:
    part = name.split(".")[-2]
    if part in ("lm_head", "embed_out"):
        return 4.0
    attention = (
        "q_proj",
        "k_proj",
        "qkv_proj",
        "query_key_value",
        "o_proj",
        "dense",
        "out_proj",
        "Wqkv",
    )
    return 1.5 if part in attention else 1.0
