"""Peers in plain transformers, one sequence per forward pass: what exists without a server.

- `streaming`: StreamingLLM as published (arXiv 2309.17453, section 3.2): the cache holds keys as
  they were before rotation, is rotated by positions *inside* the cache at every step, and drops one
  token per step, the oldest that is not a sink. Written from the paper for Llama-shaped models.
- `recompute`: sliding window with re-computation, the paper's baseline: the last ``C`` tokens are
  computed anew for each token.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.serving.arrivals import Log


class UnrotatedKeys:
    """Keys before rotation, and values, of one layer and one stream: ``[1, heads, n, head]``."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; everything cached comes back."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def trim(self, sinks: int, most: int) -> None:
        """Drop the oldest tokens that are not sinks, until at most ``most`` are left."""
        if self.keys is None or self.values is None or self.keys.shape[2] <= most:
            return
        first = self.keys.shape[2] - (most - sinks)
        self.keys = torch.cat((self.keys[:, :, :sinks], self.keys[:, :, first:]), dim=2)
        self.values = torch.cat((self.values[:, :, :sinks], self.values[:, :, first:]), dim=2)


class StreamingAttention(nn.Module):
    """Takes the place of a Llama attention module, with its weights."""

    def __init__(self, attention: Any, rotary: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.rotary = rotary
        self.cache = UnrotatedKeys()

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.attention.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        )
        keys, values = self.cache.append(key, value)
        new, total = query.shape[2], keys.shape[2]
        cos, sin = self.rotary(keys, torch.arange(total)[None])
        # Each tensor has positions of its own: the query is at the end of the cache.
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -new:], sin[:, -new:])
        mixed = nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            is_causal=new > 1,  # a prompt begins an empty cache
            scale=self.attention.scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        output = mixed.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.attention.o_proj(output), None


class StreamingModel:
    """A Llama model of transformers whose layers attend to sinks and window."""

    def __init__(self, model: Any, sinks: int, most: int) -> None:
        self.model, self.sinks, self.most = model, sinks, most
        self.layers: list[StreamingAttention] = []
        for layer in model.model.layers:
            layer.self_attn = StreamingAttention(layer.self_attn, model.model.rotary_emb)
            self.layers.append(layer.self_attn)

    def new_stream(self) -> list[UnrotatedKeys]:
        return [UnrotatedKeys() for _ in self.layers]

    @torch.inference_mode()
    def step(self, stream: list[UnrotatedKeys], tokens: Sequence[int]) -> int:
        """Compute ``tokens``, which are a prompt or one token; the most likely next token.

        At most ``most`` tokens are cached while a token is computed, itself included.
        """
        for layer, cache in zip(self.layers, stream, strict=True):
            layer.cache = cache
            if len(tokens) == 1:
                cache.trim(self.sinks, self.most - 1)
        output = self.model(torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


def load(folder: str, dtype: str, max_positions: int) -> Any:
    """The checkpoint, with attention by PyTorch's fused kernel."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        max_position_embeddings=max_positions,
    ).eval()


def run(
    kind: str,
    folder: str,
    dtype: str,
    sinks: int,
    most: int,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Generate until every stream has ``tokens`` tokens or the time is up; one log per stream.

    The streams take turns, one token each: batch 1, any number of streams. The first thing
    yielded is empty and says that the model is ready.
    """
    model = load(folder, dtype, most + 1)
    streaming = StreamingModel(model, sinks, most) if kind == "streaming" else None
    yield {}
    logs = [Log(prompt=len(prompt)) for prompt in prompts]
    histories = [list(prompt) for prompt in prompts]
    caches = [streaming.new_stream() if streaming else [] for _ in prompts]
    for log in logs:
        log.started = time.perf_counter()
    if streaming:
        for log, history, cache in zip(logs, histories, caches, strict=True):
            history[:] = [streaming.step(cache, history)]
            log.arrivals.append(time.perf_counter())
    # As in the load generator: the limit begins behind the prompts.
    until = time.perf_counter() + seconds if seconds else float("inf")
    while len(logs[-1].arrivals) < tokens and time.perf_counter() < until:
        for log, history, cache in zip(logs, histories, caches, strict=True):
            if streaming:
                history[:] = [streaming.step(cache, history)]
            else:
                history[:] = [*history[1 - most :], _recompute(model, history[-most:])]
            log.arrivals.append(time.perf_counter())
    yield {"logs": [asdict(log) for log in logs]}


@torch.inference_mode()
def _recompute(model: Any, window: Sequence[int]) -> int:
    output = model(torch.tensor([list(window)]), use_cache=False, logits_to_keep=1)
    return int(output.logits[0, -1].argmax())
