"""Question: does an append cost the same at any age of its stream, and what does an idle one cost?

    python -m benchmarks.stored_streams [--positions 10000 1000000] [--rounds 20] [--idle 10000]

A real `vllm serve --kv-policy sink` with the repository's model and `/v1/streams`.

- `flat`: one stream for each position, filled by appends of up to `--fill` tokens. Then the streams
  take turns: one append of 64 tokens and 16 generated, timed at the client from request to answer.
  Concluded: median time at each position over that at the first one (aim: at most 1.05), computed
  prompt tokens, and what every process holds before and after.
- `idle`: `--idle` streams that have evicted more than twice, then random ones are gone on with.
  Concluded: bytes of the API server per stream. The rows have the time to go on with one, by what
  it went on from (`resumed_from`: most of them have lost their pages).

Every token is really appended, so filling takes as long as computing them. Not to be concluded:
absolute speed, which is that of a tiny model.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.rows import Rows
from benchmarks.service import BLOCK, GREEDY, SCHEDULE, Api, serve
from examples.serving import Server
from sink_vllm.policy.schedule import pages_per_stream

NEW, GENERATED = 64, 16  # tokens of a turn
_TOKENS = 200  # of the vocabulary


class Filler:
    """Appends random tokens to stored streams."""

    def __init__(self, api: Api, seed: int = 1) -> None:
        self.api, self._random = api, random.Random(seed)

    def create(self, position: int, piece: int) -> str:
        """A stream of so many tokens, appended by at most ``piece`` at a time."""
        stream_id: str = self.api.json("/v1/streams", {})["id"]
        for begin in range(0, position, piece):
            self.append(stream_id, min(piece, position - begin), 0)
        return stream_id

    def append(self, stream_id: str, new: int, generated: int) -> dict[str, Any]:
        """The account of one append, and its ``seconds`` at the client."""
        body: dict[str, Any] = {"tokens": self._random.choices(range(1, _TOKENS), k=new)}
        if generated:
            body["generate"] = {**GREEDY, "max_tokens": generated}
        started = time.perf_counter()
        answer = self.api.json(f"/v1/streams/{stream_id}/append", body)
        return {**answer["usage"], "seconds": time.perf_counter() - started}


def flat(rows: Rows, server: Server, positions: list[int], rounds: int, piece: int) -> Any:
    """Streams of different ages take turns."""
    filler = Filler(Api(server))
    streams = {position: filler.create(position, piece) for position in positions}
    for stream_id in streams.values():
        filler.append(stream_id, NEW, GENERATED)
    before = server.rss()
    seconds: dict[int, list[float]] = {position: [] for position in positions}
    for round_ in range(rounds):
        for position, stream_id in streams.items():
            row = filler.append(stream_id, NEW, GENERATED)
            rows.add(arm="flat", round=round_, position=position, **row)
            seconds[position].append(row["seconds"])
    medians = {position: statistics.median(found) for position, found in seconds.items()}
    first = medians[positions[0]]
    return {
        "median_s": medians,
        "ratio_to_first": {position: median / first for position, median in medians.items()},
        "rss_before": before,
        "rss_after": server.rss(),
    }


def idle(rows: Rows, server: Server, count: int, resumed: int) -> Any:
    """Many streams that nobody appends to, and random ones that somebody goes on with."""
    filler = Filler(Api(server), 2)
    length = SCHEDULE.capacity + 3 * SCHEDULE.stride
    before = next(iter(server.rss().values()))
    ids = []
    for number in range(count):
        ids.append(filler.create(length, length))
        if number % 1000 == 0:
            print(f"{number:>9,} streams", flush=True)
    held = next(iter(server.rss().values())) - before
    chosen = random.Random(3)
    for _ in range(resumed):
        row = filler.append(chosen.choice(ids), NEW, GENERATED)
        rows.add(arm="idle", **row)
    return {"bytes_per_stream": held / count, "streams": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fill", type=int, default=10**5, help="most tokens of one append")
    parser.add_argument("--idle", type=int, default=10**4, help="streams; 0 leaves the arm out")
    parser.add_argument("--resumed", type=int, default=100)
    parser.add_argument("--name", default=default_name("stored_streams"))
    args = parser.parse_args()
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    pages = 4 * len(args.positions) * pages_per_stream(SCHEDULE, BLOCK)
    more = ("--sink-streams", str(args.idle + len(args.positions)))
    summary: dict[str, Any] = {}
    with results.rows("appends.jsonl") as rows, serve(pages, 8, *more) as server:
        server.wait(lambda _seconds: None)
        summary["flat"] = flat(rows, server, args.positions, args.rounds, args.fill)
        if args.idle:
            summary["idle"] = idle(rows, server, args.idle, args.resumed)
    results.summary(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
