"""Question: what is an eviction beside the attention it keeps short, and beside its alternative?

One decode step of an 8B model's attention (32 layers, 32 query heads on 8 KV heads of 128) over
``capacity`` cached tokens per stream, by xformers' memory-efficient attention and by torch's:

- ``attention``: over keys that are cached rotated, as vLLM's pages are;
- ``rotate at read``: over keys that are cached unrotated and rotated to their cache positions
  anew in every step, which is how StreamingLLM was published (arXiv 2309.17453, section 3.2).
  vLLM's own rotary kernel does it here.

Page moves are the third way: rotate the sink tokens once per stride; ``benchmarks.gpu.evictions``
times them. Keys and values are dense here, so ``attention`` is a lower bound for paged kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import median_milliseconds
from benchmarks.gpu.pages import Shape, rotary_of

QUERIES_PER_HEAD = 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query ``[streams, 1, kv_heads, group, size]``, keys and values ``[streams, tokens, kv_heads,
group, size]`` (expanded, not copied) to what the query has the shape of."""


def by_xformers(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """xformers' memory-efficient attention; it chooses the kernel.

    Raises:
        NotImplementedError: it has no kernel for the device.
        ImportError: it is not installed.
    """
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, keys, values)


def by_torch(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` of torch, with grouped queries."""
    attended = torch.nn.functional.scaled_dot_product_attention(
        query[:, 0], keys[..., 0, :].transpose(1, 2), values[..., 0, :].transpose(1, 2)
    )
    return attended.unsqueeze(1)


ATTENTIONS: dict[str, Attend] = {"xformers": by_xformers, "torch": by_torch}


class DecodeStep:
    """Attention of all layers for one token of each stream."""

    def __init__(
        self, shape: Shape, streams: int, capacity: int, device: torch.device, seed: int = 0
    ) -> None:
        noise = torch.Generator(device).manual_seed(seed)
        heads, size = shape.kv_heads, shape.head_size

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=noise, device=device).to(shape.dtype)

        self.query = normal(streams, 1, heads, QUERIES_PER_HEAD, size)
        # Every layer has its own: if all shared one, the second-level cache would hold it.
        self.unrotated = [normal(streams, capacity, heads, size) for _ in range(shape.layers)]
        self.values = [normal(streams, capacity, heads, size) for _ in range(shape.layers)]
        self.positions = torch.arange(capacity, device=device).repeat(streams)
        self._rotary = rotary_of(shape, device)
        self.rotated = [self._rotate(keys) for keys in self.unrotated]

    def _rotate(self, keys: Tensor) -> Tensor:
        """A copy of keys at their cache positions."""
        rows = keys.flatten(2).flatten(0, 1).clone()
        rotated, _ = self._rotary(self.positions, rows)
        return rotated.view(keys.shape)

    def attention(self, attend: Attend) -> list[Tensor]:
        return [self._attend(attend, *one) for one in zip(self.rotated, self.values, strict=True)]

    def rotate_at_read(self, attend: Attend) -> list[Tensor]:
        return [
            self._attend(attend, self._rotate(keys), values)
            for keys, values in zip(self.unrotated, self.values, strict=True)
        ]

    def _attend(self, attend: Attend, keys: Tensor, values: Tensor) -> Tensor:
        grouped = (*keys.shape[:3], QUERIES_PER_HEAD, keys.shape[3])
        return attend(
            self.query, keys.unsqueeze(3).expand(grouped), values.unsqueeze(3).expand(grouped)
        )


def measure(
    device: torch.device,
    *,
    streams: Sequence[int],
    repeats: int,
    capacities: Sequence[int] = (512, 4096),
) -> Iterator[dict[str, Any]]:
    """One row per capacity, number of streams and attention.

    An attention that cannot run here gives one row that says why.
    """
    for capacity in capacities:
        for count in streams:
            step = DecodeStep(Shape(), count, capacity, device)
            for name, attend in ATTENTIONS.items():
                yield {
                    "what": "attention",
                    "by": name,
                    "capacity": capacity,
                    "streams": count,
                    **_compare(step, attend, device, repeats),
                }
            del step  # the next one wants the memory


@torch.inference_mode()
def _compare(
    step: DecodeStep, attend: Attend, device: torch.device, repeats: int
) -> dict[str, float | str]:
    try:
        step.attention(attend)
    except ImportError as error:
        return {"cannot": str(error)}
    except NotImplementedError as error:
        return {"cannot": f"no kernel: {' '.join(str(error).split())}"}
    cached = median_milliseconds(lambda: step.attention(attend), device, repeats)
    read = median_milliseconds(lambda: step.rotate_at_read(attend), device, repeats)
    return {"attention_ms": cached, "rotate_at_read_ms": read, "ratio": read / cached}
