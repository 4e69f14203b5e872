"""A whole stream in one dense forward pass: the second judge of the engine.

Nothing is generated, cached or dropped here. Between two evictions all queries see the same sink
tokens and the same first token of the window, so a stream is a row of *spans*: the queries of a
span attend causally, aligned at the bottom right, to the sink tokens and to the window up to
themselves. Which keys that are is said by an attention bias of xformers
(``BlockDiagonalCausalFromBottomRightMask``, one block per span); keys and queries are rotated by
their cache positions within the span.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

from tests.support.oracle_llama import Llama, _rotate


@dataclass(frozen=True, slots=True)
class Spans:
    """Queries and keys of a stream of ``n`` tokens, span after span."""

    query_at: torch.Tensor
    """Cache position of each query ``[n]``; queries are in stream order."""
    keys: torch.Tensor
    """Stream position of each key of each span ``[k]``."""
    key_at: torch.Tensor
    """Its cache position there ``[k]``."""
    bias: torch.Tensor
    """``[n, k]``: 0 where a query sees a key, else minus infinity."""
    evictions: int

    def seen_by(self, query: int) -> list[int]:
        """Stream positions that the query at a stream position sees, itself among them."""
        seen: list[int] = self.keys[self.bias[query] == 0].tolist()
        return seen


def spans_of(n: int, S: int, W: int, g: int) -> Spans:
    """When the cache holds ``S + W + g`` tokens, the ``g`` oldest behind the sinks leave."""
    query_at: list[int] = []
    keys: list[int] = []
    key_at: list[int] = []
    queries_of: list[int] = []
    keys_of: list[int] = []
    begin, end, evictions = 0, S + W + g, 0
    while True:
        end = min(end, n)
        of_span = [*range(min(S, end)), *range(S + evictions * g, end)]
        keys += of_span
        key_at += range(len(of_span))
        query_at += range(len(of_span) - (end - begin), len(of_span))
        queries_of.append(end - begin)
        keys_of.append(len(of_span))
        if end == n:
            break
        begin, end, evictions = end, end + g, evictions + 1
    mask = BlockDiagonalCausalFromBottomRightMask.from_seqlens(queries_of, keys_of)
    return Spans(
        torch.tensor(query_at),
        torch.tensor(keys),
        torch.tensor(key_at),
        mask.materialize((n, len(keys))),
        evictions,
    )


class DenseOracle:
    """Log-probabilities of a text under StreamingLLM, all at once."""

    def __init__(self, folder: Path) -> None:
        self.llama = Llama(folder, torch.float32)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int], spans: Spans) -> torch.Tensor:
        """Of every next token: ``[len(tokens), vocab]``."""
        llama = self.llama
        cos, sin = llama._rotation(int(spans.key_at.max()) + 1)
        of_queries = cos[spans.query_at][:, None], sin[spans.query_at][:, None]
        of_keys = cos[spans.key_at][:, None], sin[spans.key_at][:, None]
        x = llama.embedding[torch.tensor(tokens)]
        for layer in llama.layers:
            normed = F.rms_norm(x, (x.shape[-1],), layer.attention_norm, llama.eps)
            qkv = (normed @ layer.qkv.T).view(len(tokens), -1, llama.head_size)
            query, key, value = qkv.split([llama.heads, llama.kv_heads, llama.kv_heads], dim=1)
            query = _rotate(query, *of_queries)
            key = _rotate(key[spans.keys], *of_keys)
            groups = llama.heads // llama.kv_heads
            key, value = (
                part.repeat_interleave(groups, dim=1) for part in (key, value[spans.keys])
            )
            scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(llama.head_size)
            shares = torch.softmax(scores + spans.bias, dim=-1)
            attended = torch.einsum("hqk,khd->qhd", shares, value)
            x = x + attended.reshape(len(tokens), -1) @ layer.out.T
            normed = F.rms_norm(x, (x.shape[-1],), layer.mlp_norm, llama.eps)
            gate, up = (normed @ layer.gate_up.T).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ layer.down.T
        x = F.rms_norm(x, (x.shape[-1],), llama.norm, llama.eps)
        return torch.log_softmax(x @ llama.lm_head.T, dim=-1)
