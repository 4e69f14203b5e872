"""Question: what does one eviction cost on a GPU, against the bandwidth of its memory?

Keys and values of an 8B model: 32 layers, 8 KV heads of 128, pages of 16 tokens. One eviction
rewrites a stream's head pages: with S=4 a page is copied and 4 sink tokens are rotated into it,
with S=1024 sink tokens 64 pages are rotated. ``floor_ms`` is the time in which the same bytes are
read and written once at the bandwidth of a large copy, measured on the same device.
"""

import random
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from benchmarks.gpu.clock import bytes_per_millisecond, milliseconds
from benchmarks.gpu.pages import DTYPES, Shape, attention_layers, moves_of_one_eviction
from sink_vllm.worker.moves.mover import PageMover

SINKS = (4, 1024)


def measure(
    device: torch.device,
    *,
    streams: Sequence[int],
    repeats: int,
    dtypes: Sequence[str] = tuple(DTYPES),
    layouts: Sequence[str] = ("LBNHC", "LBHNC"),
) -> Iterator[dict[str, Any]]:
    """One row per dtype, layout, number of sink tokens and of streams that evict in one step.

    Args:
        layouts: names of ``KVCacheLayout``.
    """
    bandwidth = bytes_per_millisecond(device, max(repeats // 10, 3))
    yield {"what": "bandwidth", "GB/s": bandwidth / 1e6}
    for dtype in dtypes:
        shape = Shape(dtype=DTYPES[dtype])
        block = shape.block_size
        blocks = 1 + 2 * max(streams) * (-(-max(SINKS) // block) + 1)
        for layout in layouts:
            layers = attention_layers(shape, device, blocks, KVCacheLayout[layout])
            mover = PageMover(layers, block)
            for sinks in SINKS:
                for count in streams:
                    times, pages = _times(mover, blocks, sinks, count, repeats, device)
                    written = pages * shape.page_bytes * shape.layers
                    floor, cost = 2 * written / bandwidth, median(times)
                    yield {
                        "what": "eviction",
                        "dtype": dtype,
                        "layout": layout,
                        "sinks": sinks,
                        "streams": count,
                        "written_mb": written / 1e6,
                        "median_ms": cost,
                        "floor_ms": floor,
                        "ratio": cost / floor,
                        "times_ms": times,
                    }
            del layers, mover  # the next layout wants the memory


def _times(
    mover: PageMover, blocks: int, sinks: int, streams: int, repeats: int, device: torch.device
) -> tuple[list[float], int]:
    """Milliseconds of each repeat, other pages every time, and pages written by one."""
    times, written = [], 0
    for _ in range(repeats + 1):
        take = iter(random.sample(range(1, blocks), blocks - 1)).__next__
        moves = [
            move
            for _ in range(streams)
            for move in moves_of_one_eviction(mover.block_size, sinks, take)
        ]
        written = len({move.dst for move in moves})
        times.append(milliseconds(lambda moves=moves: mover.run(moves), device))  # type: ignore[misc]
    return times[1:], written
