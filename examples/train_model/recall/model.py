"""A small Granite 4: transformers' class, its layers Mamba2 or attention as asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AttentionInterface, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from sink_vllm.policy.schedule import Schedule

from .attention import streaming_attention
from .task import BOS, VOCABULARY

SCHEDULE = Schedule(sink_tokens=4, window=60, stride=64)
"""Pages of 64 tokens, because one must hold a state; so the least cache is one of 128."""
SMALL = Schedule(sink_tokens=4, window=4, stride=8)
"""Of the first part of a training."""
HIDDEN, HEADS, HEAD_SIZE = 64, 2, 32
STATE_HEADS, STATE_SIZE = 4, 32
THETA = 1000.0
WEIGHTS = 76_000
"""Of every model, about: MLPs take what the other parts leave."""
STEP = 0.1
LONGEST, SHORTEST = 10_000, 100
"""What a state is at first: how much of a token it takes, and within how many tokens it forgets,
from head to head. With transformers' own first weights it forgets within one or two, and nothing
that was told long before can be learned."""


def make_config(layers: Sequence[str], weights: int = WEIGHTS) -> GraniteMoeHybridConfig:
    """The configuration of about so many weights.

    Args:
        layers: ``mamba`` or ``attention`` for every layer.
    """
    mamba = HIDDEN * (4 * HIDDEN + 2 * STATE_SIZE + STATE_HEADS) + 2 * HIDDEN * HIDDEN
    mixers = {"mamba": mamba, "attention": 4 * HIDDEN * HEADS * HEAD_SIZE}
    left = weights - HIDDEN * VOCABULARY - sum(mixers[layer] for layer in layers)
    return GraniteMoeHybridConfig(
        architectures=["GraniteMoeHybridForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        shared_intermediate_size=round(left / (3 * HIDDEN * len(layers) * 8)) * 8,
        num_hidden_layers=len(layers),
        layer_types=list(layers),
        num_local_experts=0,
        num_experts_per_tok=0,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        attention_multiplier=HEAD_SIZE**-0.5,
        position_embedding_type="rope",
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        max_position_embeddings=2 * SCHEDULE.capacity,
        mamba_expand=2,
        mamba_n_heads=STATE_HEADS,
        mamba_d_head=2 * HIDDEN // STATE_HEADS,
        mamba_d_state=STATE_SIZE,
        mamba_chunk_size=64,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )


def make_model(config: GraniteMoeHybridConfig) -> GraniteMoeHybridForCausalLM:
    """The model with new weights. Its attention forgets as ``limit`` says next."""
    model = GraniteMoeHybridForCausalLM(config)
    horizons = torch.logspace(math.log10(LONGEST), math.log10(SHORTEST), STATE_HEADS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight.fill_(math.log(math.expm1(STEP)))  # the inverse of softplus
            elif name.endswith("A_log"):
                weight.copy_(-(STEP * horizons).log())
            elif weight.dim() == 2:
                torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


def load_model(folder: Path) -> GraniteMoeHybridForCausalLM:
    """A trained model, its attention as in training."""
    model = GraniteMoeHybridForCausalLM.from_pretrained(folder)
    limit(model, SCHEDULE)
    return model.eval()


def limit(model: GraniteMoeHybridForCausalLM, schedule: Schedule) -> None:
    """Let attention see what a cache of this schedule holds, from now on."""
    name = f"streaming-{schedule.capacity}"
    AttentionInterface.register(name, streaming_attention(schedule, THETA))
    model.set_attn_implementation(name)
