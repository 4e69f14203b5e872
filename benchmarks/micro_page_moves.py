"""Question: what do the page moves of one step cost, against what the memory allows?

    python -m benchmarks.micro_page_moves [--repeats 200] [--threads 2]

The shape of the repository's model (12 layers, 4 KV heads of 32, bfloat16, blocks of 32), streams
in lockstep, so that all of them evict in the same step. Arms:

- ``S=4``: per stream one page copied without its first 4 slots, and 4 sink tokens rotated;
- ``S=40``: one page of sinks rotated, one page copied, and 8 sink tokens rotated;
- ``S=4, re-anchored``: the arm ``S=4`` plus 6 window pages rotated in place;
- ``S=0`` moves nothing: a plain window has no head pages.

Every stream has its own sink page, so none is found in a cache by luck. ``floor`` is the time of
one ``memcpy`` of all pages that are written, the least anything can do. Median and 95th percentile
over the repeats; each repeat moves other pages, since real pages are not in the processor's
caches either. ``cpu`` is the median of the processor time: on a machine with other work to do it is
the one to look at, with ``--threads 1``.
"""

import argparse
import random
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from benchmarks.paged_layers import PagedLayers
from sink_vllm.plan import PageMove
from sink_vllm.worker.page_moves import PageMover

BLOCK = 32
STREAMS = (1, 16, 64)
WINDOW_PAGES = 6


def moves_of(arm: str, streams: int, take: Callable[[], int]) -> list[PageMove]:
    """The moves of a step in which ``streams`` streams evict; ``take`` returns a fresh page."""
    moves = []
    for _ in range(streams):
        delta = 64 * random.randint(1, 20)
        if arm == "S=40":
            moves.append(PageMove(take(), take(), 0, BLOCK, delta))
        border = 8 if arm == "S=40" else 4
        head = take()
        moves.append(PageMove(take(), head, border, BLOCK, 0))
        moves.append(PageMove(take(), head, 0, border, delta))
        if arm == "S=4, re-anchored":
            for _ in range(WINDOW_PAGES):
                page = take()
                moves.append(PageMove(page, page, 0, BLOCK, -delta))
    return moves


def milliseconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - begin) * 1e3, (time.process_time() - cpu_begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks = 4096
    paged = PagedLayers(
        layers=12,
        kv_heads=4,
        head_size=32,
        block_size=BLOCK,
        blocks=blocks,
        dtype=torch.bfloat16,
        layout=KVCacheLayout.LBHNC,
    )
    for module in paged.modules:
        module.kv_cache.normal_()
    mover = PageMover(paged.attention_layers, BLOCK)
    page_bytes = 2 * 4 * BLOCK * 32 * 2 * 12

    print(f"{args.threads} threads, {args.repeats} repeats, milliseconds")
    print(
        f"{'arm':18} {'streams':>7} {'moves':>6} {'min':>8} {'median':>8} {'p95':>8} {'cpu':>8} "
        f"{'floor':>8} {'cpu':>8}  MB written"
    )
    for arm in ("S=4", "S=40", "S=4, re-anchored"):
        for streams in STREAMS:
            times, floors = [], []
            written = 0
            for _ in range(args.repeats):
                free = random.sample(range(1, blocks), blocks - 1)
                moves = moves_of(arm, streams, free.pop)
                written = len({move.dst for move in moves}) * page_bytes
                source = torch.ones(written // 8, dtype=torch.int64)
                target = torch.zeros_like(source)
                floors.append(milliseconds_of(lambda s=source, t=target: t.copy_(s)))  # type: ignore[misc]
                times.append(milliseconds_of(lambda m=moves: mover.run(m)))  # type: ignore[misc]
            wall, cpu = zip(*times, strict=True)
            wall_floor, cpu_floor = zip(*floors, strict=True)
            print(
                f"{arm:18} {streams:7d} {len(moves):6d} {min(wall):8.3f} {median(wall):8.3f} "
                f"{quantiles(wall, n=20)[-1]:8.3f} {median(cpu):8.3f} {median(wall_floor):8.3f} "
                f"{median(cpu_floor):8.3f}  {written / 1e6:.1f}"
            )


if __name__ == "__main__":
    main()
