"""Attention in training as the cache will have it: sink tokens, window, cache positions.

The schedule is the policy's own (``sink_vllm.policy.schedule``): a query sees what is cached when
its token is computed, and sink tokens at the distance that they have in the cache. A model that is
trained so loses nothing when it is served with ``--kv-policy sink``, and cannot learn to rely on
anything else either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sink_vllm.policy.schedule import Schedule

Attention = Callable[..., tuple[Tensor, None]]


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` ``[…, head_dim]`` rotated further by ``angles`` ``[…, head_dim / 2]``, in halves."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def streaming_attention(schedule: Schedule, theta: float) -> Attention:
    """The attention function of a layer, as transformers calls it.

    It takes queries, keys and values ``[batch, heads, positions, head_dim]``, rotated by stream
    positions, of a stream from its first token on, and returns ``[batch, positions, heads,
    head_dim]``. Behind the capacity there must be whole strides.
    """
    sinks, stride, capacity = schedule.sink_tokens, schedule.stride, schedule.capacity
    window = schedule.window

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        length, size = q.shape[2], q.shape[3]
        q = q * scaling
        head = min(length, capacity)
        unseen = torch.full((head, head), -torch.inf).triu(1)
        scores = q[:, :, :head] @ k[:, :, :head].transpose(-1, -2) + unseen
        parts = [scores.softmax(-1) @ v[:, :, :head]]
        strides = (length - head) // stride
        if length != head + strides * stride:
            raise ValueError(f"{length} positions are not {capacity} and strides of {stride}")
        if strides:
            # Queries between two evictions see the same keys, up to their own.
            later = q[:, :, capacity:].unflatten(2, (strides, stride))
            keys, values = (
                x[:, :, sinks + stride :].unfold(2, window + stride, stride).transpose(-1, -2)
                for x in (k, v)
            )
            unseen = torch.full((stride, window + stride), -torch.inf).triu(window + 1)
            near = later @ keys.transpose(-1, -2) + unseen
            evicted = stride * torch.arange(1.0, strides + 1)
            frequencies = theta ** (-torch.arange(0.0, size, 2) / size)
            closer = rotated(later, -torch.outer(evicted, frequencies)[:, None])
            far = closer @ k[:, :, None, :sinks].transpose(-1, -2)
            weights = torch.cat([far, near], dim=-1).softmax(-1)
            mixed = weights[..., :sinks] @ v[:, :, None, :sinks] + weights[..., sinks:] @ values
            parts.append(mixed.flatten(2, 3))
        return torch.cat(parts, dim=2).transpose(1, 2), None

    return attend
