"""A compact Llama that trains fast on a CPU and exports exactly to ``LlamaForCausalLM``.

It differs from the transformers class only in layout: query, key and value projections are one
matrix, as are gate and up, which makes fewer and larger matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from .tokens import BOS_ID, EOS_ID, VOCABULARY

CONTEXT = 256
"""Training length in tokens, BOS included."""
HEADS, HEAD_DIM = 4, 32
ROPE_THETA = 10000.0
QUERY_CHUNK = 128


def make_config(layers: int = 12) -> LlamaConfig:
    """The exported model's configuration (about 2.5 million weights with 12 layers)."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="bfloat16",
    )


def rope_tables() -> tuple[Tensor, Tensor]:
    """Cosine and sine tables ``[positions, head_dim]`` in the half-rotation layout."""
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
    frequencies = 1.0 / ROPE_THETA**exponents
    angles = torch.outer(torch.arange(CONTEXT, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on ``[batch, heads, positions, head_dim]``.

    Written out because the fused CPU kernel's backward pass takes half of a training step at
    this size; compiled, this form is 1.6 times as fast over the whole step. Cutting the queries
    in chunks skips most of the products above the diagonal.
    """
    length, outputs = q.shape[2], []
    q = q * q.shape[-1] ** -0.5
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        mask = torch.full((end - start, end), -torch.inf, device=q.device).triu(start + 1)
        scores = (q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)).float() + mask
        outputs.append(scores.softmax(dim=-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(outputs, dim=2)


class Block(nn.Module):
    """One pre-norm decoder layer on hidden states ``[batch, positions, hidden]``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.norm1 = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = _rotate(q, cos, sin).to(v.dtype)
        k = _rotate(k, cos, sin).to(v.dtype)
        mixed = causal_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class CompactLlama(nn.Module):
    """Decoder with tied embeddings; :meth:`forward` returns the mean loss in nats per token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        cos, sin = rope_tables()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        residual_scale = (2 * config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Smaller residual writes keep the activations of a deep stack at unit scale.
                scale = residual_scale if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=config.initializer_range * scale)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of ``targets[b, t]`` given ``inputs[b, :t + 1]``, both ``[batch, positions]``."""
        x = self.embed(inputs)
        length = inputs.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def export(self) -> dict[str, Tensor]:
        """The weights under the names of ``LlamaForCausalLM`` (the tied head is left out)."""
        state = {
            "model.embed_tokens.weight": self.embed.weight,
            "model.norm.weight": self.norm.weight,
        }
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            prefix = f"model.layers.{index}."
            q, k, v = block.qkv.weight.chunk(3)
            gate, up = block.gate_up.weight.chunk(2)
            state |= {
                prefix + "input_layernorm.weight": block.norm1.weight,
                prefix + "self_attn.q_proj.weight": q,
                prefix + "self_attn.k_proj.weight": k,
                prefix + "self_attn.v_proj.weight": v,
                prefix + "self_attn.o_proj.weight": block.out.weight,
                prefix + "post_attention_layernorm.weight": block.norm2.weight,
                prefix + "mlp.gate_proj.weight": gate,
                prefix + "mlp.up_proj.weight": up,
                prefix + "mlp.down_proj.weight": block.down.weight,
            }
        return {name: weight.detach().float().contiguous() for name, weight in state.items()}
