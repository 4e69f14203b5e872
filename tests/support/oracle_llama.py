"""The Llama forward of the oracle: dense, with un-rotated keys in the cache."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


@dataclass(slots=True)
class Cache:
    """Un-rotated keys and values ``[layers, streams, kv_heads, capacity, head_size]``."""

    keys: torch.Tensor
    values: torch.Tensor
    lengths: list[int]

    def drop(self, row: int, begin: int, end: int) -> None:
        """Remove cache positions ``[begin, end)`` of stream ``row``; later ones move down."""
        length = self.lengths[row]
        kept = length - (end - begin)
        for tensor in (self.keys, self.values):
            tensor[:, row, :, begin:kept] = tensor[:, row, :, end:length].clone()
        self.lengths[row] = kept

    def select(self, rows: Sequence[int]) -> "Cache":
        """The cache of the streams ``rows`` only."""
        index = torch.tensor(rows, dtype=torch.long)
        return Cache(
            self.keys.index_select(1, index),
            self.values.index_select(1, index),
            [self.lengths[row] for row in rows],
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor


class Llama:
    """A Llama checkpoint folder (MHA or GQA, tied or untied, default or llama3 RoPE)."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        config = json.loads((folder / "config.json").read_text())
        _check_supported(config)
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= {name: w.to(dtype) for name, w in load_file(file).items()}
        self.dtype = dtype
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_size: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps: float = config["rms_norm_eps"]
        self.embedding = weights["model.embed_tokens.weight"]
        tied = config["tie_word_embeddings"]
        self.lm_head = self.embedding if tied else weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = [
            _layer(weights, f"model.layers.{i}.") for i in range(config["num_hidden_layers"])
        ]
        self.inverse_frequencies = _inverse_frequencies(config, self.head_size)

    def new_cache(self, streams: int, capacity: int) -> Cache:
        """An empty cache for ``streams`` streams of at most ``capacity`` tokens."""
        shape = (len(self.layers), streams, self.kv_heads, capacity, self.head_size)
        zeros = torch.zeros(shape, dtype=self.dtype)
        return Cache(zeros, zeros.clone(), [0] * streams)

    def step(
        self, tokens: Sequence[Sequence[int]], cache: Cache, sampling: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Append tokens to every stream; logits ``[len(sampling), vocab]``.

        Args:
            tokens: of every stream, at least one; a token sees those before it and itself.
            sampling: stream, and which of its ``tokens`` the logits are wanted of.
        """
        given = [torch.tensor(one) for one in tokens]
        ids = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        counts = torch.tensor([len(one) for one in tokens])
        at = torch.tensor(cache.lengths)[:, None] + torch.arange(ids.shape[1])
        rows, columns = (torch.arange(ids.shape[1]) < counts[:, None]).nonzero(as_tuple=True)
        written = at[rows, columns]
        cache.lengths = [n + len(one) for n, one in zip(cache.lengths, tokens, strict=True)]
        longest = max(cache.lengths)
        cos, sin = self._rotation(longest)
        # [streams, kv heads, query heads per kv head × tokens, cache positions]
        outside = (torch.arange(longest) > at[:, :, None])[:, None]
        outside = outside.repeat(1, 1, self.heads // self.kv_heads, 1)
        turn = at.clamp(max=longest - 1)  # what is beyond is padding
        of_queries = cos[turn][:, :, None], sin[turn][:, :, None]
        x = self.embedding[ids]
        for index, layer in enumerate(self.layers):
            normed = F.rms_norm(x, (x.shape[-1],), layer.attention_norm, self.eps)
            qkv = (normed @ layer.qkv.T).unflatten(-1, (-1, self.head_size))
            query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            cache.keys[index, rows, :, written] = key[rows, columns]
            cache.values[index, rows, :, written] = value[rows, columns]
            query = _rotate(query, *of_queries).transpose(1, 2)
            query = query.reshape(len(ids), self.kv_heads, -1, self.head_size)
            keys = _rotate(cache.keys[index, :, :, :longest], cos, sin)
            scores = query @ keys.transpose(-1, -2) / math.sqrt(self.head_size)
            shares = torch.softmax(scores.masked_fill(outside, -torch.inf), dim=-1)
            attended = shares @ cache.values[index, :, :, :longest]
            attended = attended.view(len(ids), self.heads, -1, self.head_size)
            x = x + attended.transpose(1, 2).flatten(2) @ layer.out.T
            normed = F.rms_norm(x, (x.shape[-1],), layer.mlp_norm, self.eps)
            gate, up = (normed @ layer.gate_up.T).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ layer.down.T
        x = x[[row for row, _ in sampling], [column for _, column in sampling]]
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.eps) @ self.lm_head.T

    def _rotation(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[length, head_size]`` of cache positions ``0..length-1``."""
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs ``(i, i + head_size / 2)`` of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _check_supported(config: dict[str, Any]) -> None:
    if config["model_type"] != "llama" or config["attention_bias"] or config["mlp_bias"]:
        raise ValueError(f"the oracle knows Llama without biases only, not {config}")


def _layer(weights: dict[str, torch.Tensor], prefix: str) -> _Layer:
    def of(*names: str) -> torch.Tensor:
        return torch.cat([weights[f"{prefix}{name}.weight"] for name in names])

    return _Layer(
        qkv=of("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=of("self_attn.o_proj"),
        gate_up=of("mlp.gate_proj", "mlp.up_proj"),
        down=of("mlp.down_proj"),
        attention_norm=of("input_layernorm"),
        mlp_norm=of("post_attention_layernorm"),
    )


def _inverse_frequencies(config: dict[str, Any], head_size: int) -> torch.Tensor:
    """Radians per position of each pair, with llama3's slow-down of the low frequencies."""
    rope = config["rope_parameters"]
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = rope["rope_theta"] ** -exponents
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] != "llama3":
        raise ValueError(f"the oracle knows default and llama3 RoPE only, not {rope}")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * share + frequencies / rope["factor"] * (1 - share)
