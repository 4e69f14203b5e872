"""Question: what do the page moves of one step cost, by sink tokens, layers, pages and streams?

    python -m benchmarks.micro_page_moves [--sinks 4 40] [--layers 12] [--streams 1 16 64]

Layers of the repository's model (4 KV heads of 32, blocks of 32), streams in lockstep, so that all
of them evict in the same step. Sinks fill `S // 32` pages, which are rotated as a whole, and
`S % 32` slots of one more, whose other slots are copied. With `--reanchored` as many window pages
per stream are rotated in place as well. `S = 0` moves nothing: a plain window has no head pages.

Every stream has its own sink pages, so none is found in a cache by luck. ``floor`` is the time of
one ``memcpy`` of all pages that are written, the least anything can do. Median and 95th percentile
over the repeats; each repeat moves other pages, since real pages are not in the processor's
caches either. ``cpu`` is the median of the processor time: on a machine with other work to do it is
the one to look at, with ``--threads 1``.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from benchmarks.common import Results, default_name
from benchmarks.gpu.pages import moves_of_one_eviction
from benchmarks.paged_layers import PagedLayers
from sink_vllm.policy.plan import PageMove
from sink_vllm.worker.moves.mover import PageMover

BLOCK = 32
KV_HEADS, HEAD_SIZE = 4, 32
BLOCKS = 4096


def moves_of(sinks: int, reanchored: int, streams: int, take: Callable[[], int]) -> list[PageMove]:
    """The moves of a step in which ``streams`` streams evict; ``take`` returns a fresh page."""
    moves = []
    for _ in range(streams):
        moves += moves_of_one_eviction(BLOCK, sinks, take)
        delta = BLOCK * random.randint(1, 40)
        for _ in range(reanchored):
            page = take()
            moves.append(PageMove(page, page, 0, BLOCK, -delta))
    return moves


def milliseconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - begin) * 1e3, (time.process_time() - cpu_begin) * 1e3


def measure(
    layers: int, sinks: int, reanchored: int, streams: Sequence[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row per number of streams; milliseconds."""
    dtype = getattr(torch, options.dtype)
    paged = PagedLayers(
        layers=layers,
        kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        block_size=BLOCK,
        blocks=BLOCKS,
        dtype=dtype,
        layout=KVCacheLayout.LBHNC,
    )
    for module in paged.modules:
        module.kv_cache.normal_()
    mover = PageMover(paged.attention_layers, BLOCK)
    page_bytes = 2 * KV_HEADS * BLOCK * HEAD_SIZE * dtype.itemsize * layers
    for number in streams:
        times, floors = [], []
        moves, written = [], 0
        for _ in range(options.repeats):
            free = random.sample(range(1, BLOCKS), BLOCKS - 1)
            moves = moves_of(sinks, reanchored, number, free.pop)
            written = len({move.dst for move in moves}) * page_bytes
            source = torch.ones(written // 8, dtype=torch.int64)
            target = torch.zeros_like(source)
            floors.append(milliseconds_of(lambda s=source, t=target: t.copy_(s)))  # type: ignore[misc]
            times.append(milliseconds_of(lambda m=moves: mover.run(m)))  # type: ignore[misc]
        wall, cpu = zip(*times, strict=True)
        wall_floor, cpu_floor = zip(*floors, strict=True)
        yield {
            "layers": layers,
            "sinks": sinks,
            "reanchored": reanchored,
            "streams": number,
            "moves": len(moves),
            "min": min(wall),
            "median": median(wall),
            "p95": quantiles(wall, n=20)[-1],
            "cpu": median(cpu),
            "floor": median(wall_floor),
            "floor_cpu": median(cpu_floor),
            "mb_written": written / 1e6,
        }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sinks", type=int, nargs="+", default=[4, 40])
    parser.add_argument("--layers", type=int, nargs="+", default=[12])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--reanchored", type=int, nargs="+", default=[0, 6], help="window pages")
    parser.add_argument("--name", default=default_name("micro_page_moves"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.name, vars(options))
    columns: list[str] = []
    found = []
    with results.rows("moves.jsonl") as rows:
        for arm in itertools.product(options.layers, options.sinks, options.reanchored):
            for row in measure(*arm, options.streams, options):
                if not columns:
                    columns = list(row)
                    print("  ".join(f"{name:>9}" for name in columns))
                rows.add(**row)
                found.append(row)
                print("  ".join(f"{value:>9.4g}" for value in row.values()), flush=True)
    results.summary({"rows": found})


if __name__ == "__main__":
    main()
