"""Question: what does one eviction cost on a GPU, against the bandwidth of its memory?

    python -m benchmarks.gpu_page_moves                 on the machine with the GPU
    python -m benchmarks.gpu_page_moves --device cpu    smoke test, says nothing about GPUs

Keys and values of an 8B model: 32 layers, 8 KV heads of 128, bfloat16, pages of 16 tokens. One
eviction rewrites a stream's head pages: with S=4 a page is copied and 4 sink tokens are rotated
into it, with S=1024 sink tokens 64 pages are rotated. ``floor`` is the time in which the same
bytes are read and written once at the bandwidth of a large copy, measured on the same device.
Median over the repeats; each waits for the device, so launching the kernels is included.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.worker.utils import allocate_kv_cache

from sink_vllm.plan import PageMove
from sink_vllm.worker.layers import AttentionLayer
from sink_vllm.worker.page_moves import PageMover
from sink_vllm.worker.rotation import Rotation

SINKS = (4, 1024)
DTYPES = {"bfloat16": torch.bfloat16, "fp8": torch.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Keys and values of a model: those of an 8B model, unless a test wants less."""

    layers: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    """Of the cache: bytes stand for fp8, as in vLLM."""

    @property
    def page_bytes(self) -> int:
        return 2 * self.kv_heads * self.block_size * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Backend:
    """All that page moves ask of an attention backend."""

    name: str = "FLASH_ATTN"

    def get_name(self) -> str:
        return self.name


def attention_layers(
    shape: Shape, device: torch.device, blocks: int, layout: KVCacheLayout
) -> list[AttentionLayer]:
    """Layers with pages in one buffer of vLLM's, laid out as GPU backends ask for."""
    current_platform.import_kernels()
    table = torch.bfloat16 if shape.dtype == torch.uint8 else shape.dtype
    with set_current_vllm_config(VllmConfig()):
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        rotary = get_rope(
            shape.head_size, 131072, is_neox_style=True, rope_parameters=rope, dtype=table
        )
    spec = FullAttentionSpec(
        block_size=shape.block_size,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        dtype=shape.dtype,
    )
    names = [f"model.layers.{i}.self_attn.attn" for i in range(shape.layers)]
    layer_stride, block_stride, *_ = compute_layout_strides(spec, blocks, shape.layers, layout)
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=spec.page_size_bytes * blocks * shape.layers,
                layers=names,
                layer_stride=layer_stride,
                block_stride=block_stride,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )
    views = allocate_kv_cache(config, device, layout, None)
    rotation = Rotation(rotary.to(device), names[0])
    known: dict[str, Any] = {
        "num_kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "head_size_v": shape.head_size,
        "attn_backend": Backend(),
        "kv_cache_dtype": "fp8" if shape.dtype == torch.uint8 else "auto",
    }
    return [
        AttentionLayer(name, cast(Any, SimpleNamespace(kv_cache=views[name], **known)), rotation)
        for name in names
    ]


def moves_of_one_eviction(block: int, sink_tokens: int, take: Callable[[], int]) -> list[PageMove]:
    """Moves of one stream that evicts; ``take`` returns a fresh page."""
    moves = []
    delta = block * random.randint(1, 4000)
    for begin in range(0, sink_tokens, block):
        head, sinks = take(), min(block, sink_tokens - begin)
        moves.append(PageMove(take(), head, 0, sinks, delta))
        if sinks < block:
            moves.append(PageMove(take(), head, sinks, block, 0))
    return moves


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return (time.perf_counter() - begin) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_millisecond(device: torch.device, repeats: int) -> float:
    """Bytes read plus bytes written, of one large copy."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [milliseconds(lambda: target.copy_(source), device) for _ in range(repeats)]
    return 2 * size / median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the KV cache")
    parser.add_argument("--layout", default="LBNHC", choices=[one.name for one in KVCacheLayout])
    args = parser.parse_args()
    device = torch.device(args.device)
    shape = Shape(dtype=DTYPES[args.dtype])
    block = shape.block_size
    blocks = 1 + 2 * max(args.streams) * (-(-max(SINKS) // block) + 1)
    mover = PageMover(attention_layers(shape, device, blocks, KVCacheLayout[args.layout]), block)
    bandwidth = bytes_per_millisecond(device, max(args.repeats // 10, 3))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    what = f"{name}, {args.layout}, {args.dtype}, {args.repeats} repeats"
    print(f"{what}, copy at {bandwidth / 1e6:.0f} GB/s")
    print(f"{'S':>5} {'streams':>7} {'MB written':>10} {'ms':>8} {'floor':>8}  ratio")
    for sinks in SINKS:
        for streams in args.streams:
            times, written = [], 0
            for _ in range(args.repeats):
                take = iter(random.sample(range(1, blocks), blocks - 1)).__next__
                moves = [
                    m for _ in range(streams) for m in moves_of_one_eviction(block, sinks, take)
                ]
                written = len({move.dst for move in moves}) * shape.page_bytes * shape.layers
                times.append(milliseconds(lambda m=moves: mover.run(m), device))  # type: ignore[misc]
            floor, cost = 2 * written / bandwidth, median(times)
            print(
                f"{sinks:5d} {streams:7d} {written / 1e6:10.1f} {cost:8.3f} {floor:8.3f}  "
                f"{cost / floor:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
