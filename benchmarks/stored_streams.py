"""Question: does an append cost the same at any age of its stream, and what does an idle one cost?

    python -m benchmarks.stored_streams [--positions 10000 10000000] [--rounds 20] [--idle 10000]

A real `vllm serve --kv-policy sink` with the repository's model and `/v1/streams`.

- `flat`: one stream for each position, filled by appends of up to `--fill` tokens. Then the streams
  take turns: one append of 64 tokens and 16 generated, timed at the client from request to answer.
  Concluded: median time at each position over that at the first one (aim: at most 1.05), the same
  of the engine core's longest step (`benchmarks/step_times.py`) and the longest of all, computed
  prompt tokens, what every process holds before and after (aim: within 1%), and, from the database
  the server leaves, the bytes of the message that an append at each position is for the engine.
- `idle`: 10 streams that have evicted more than twice, then `--idle` of them. Random ones are gone
  on with, first while there are 10 and then while there are all, and all are listed.
  Concluded: bytes of the API server per stream, time to list a page of 100, and to go on from
  the survivors (most have lost their pages) with all and with 10 streams.

A plot of a run: `python -m benchmarks.stored_streams_figure benchmarks/results/RUN`.

Every token is really appended, so filling takes as long as computing them. Not to be concluded:
absolute speed, which is that of a tiny model.
"""

import argparse
import json
import random
import sqlite3
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from benchmarks.common import Results, default_name
from benchmarks.rows import Rows
from benchmarks.service import BLOCK, ENVIRONMENT, GREEDY, SCHEDULE, Api, serve
from benchmarks.step_times import Steps, observing
from examples.serving import Server, stop_on_terminate
from sink_vllm.policy.parked import KEY
from sink_vllm.policy.schedule import pages_per_stream
from sink_vllm.server.streams.archive import Archive

NEW, GENERATED = 64, 16  # tokens of a turn
FEW = 10  # streams
API_KEY = "a-key"  # streams are listed by key
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
            if begin // piece % 10 == 9:
                print(f"{begin + piece:>12,} of {position:,} tokens", flush=True)
        return stream_id

    def append(self, stream_id: str, new: int, generated: int) -> dict[str, Any]:
        """The account of one append, and its ``seconds`` at the client."""
        body: dict[str, Any] = {"tokens": self._random.choices(range(1, _TOKENS), k=new)}
        if generated:
            body["generate"] = {**GREEDY, "max_tokens": generated}
        started = time.perf_counter()
        answer = self.api.json(f"/v1/streams/{stream_id}/append", body)
        return {**answer["usage"], "seconds": time.perf_counter() - started}


def flat(
    rows: Rows, server: Server, steps: Steps, positions: list[int], rounds: int, piece: int
) -> Any:
    """Streams of different ages take turns."""
    filler = Filler(Api(server, API_KEY))
    streams = {position: filler.create(position, piece) for position in positions}
    for stream_id in streams.values():
        filler.append(stream_id, NEW, GENERATED)
    before = server.rss()
    seconds: dict[int, list[float]] = {position: [] for position in positions}
    longest: dict[int, list[float]] = {position: [] for position in positions}
    for round_ in range(rounds):
        for position, stream_id in streams.items():
            began = time.perf_counter()
            row = filler.append(stream_id, NEW, GENERATED)
            noted = steps.since(began)
            row |= {"steps": len(noted), "longest_step_s": max(noted)}
            rows.add(arm="flat", round=round_, position=position, **row)
            seconds[position].append(row["seconds"])
            longest[position].append(row["longest_step_s"])
    return {
        **compared(seconds),
        "longest_step": {**compared(longest), "most_s": {p: max(longest[p]) for p in positions}},
        "rss_before": before,
        "rss_after": server.rss(),
    }


def compared(found: dict[int, list[float]]) -> dict[str, Any]:
    """Medians by position, and over that at the first position."""
    medians = {position: statistics.median(seconds) for position, seconds in found.items()}
    first = next(iter(medians.values()))
    return {
        "median_s": medians,
        "ratio_to_first": {position: median / first for position, median in medians.items()},
    }


def sent(database: Path) -> dict[int, int]:
    """Bytes of the request that an append is, by the position of its stream."""
    with closing(sqlite3.connect(database)) as db:
        ((made_by,),) = db.execute("SELECT made_by FROM streams LIMIT 1")
    archive = Archive(str(database), json.loads(made_by))
    streams, _ = archive.load(time.time())
    archive.close()
    required = {one.name: None for one in msgspec.structs.fields(EngineCoreRequest) if one.required}
    found: dict[int, int] = {}
    for stream, _ in streams:
        parked = stream.held.parked(SCHEDULE).wire()
        params = SamplingParams(temperature=0, max_tokens=GENERATED, extra_args={KEY: parked})
        tokens = [*stream.tokens, *range(NEW)]
        given: dict[str, Any] = {
            "request_id": stream.id,
            "prompt_token_ids": tokens,
            "sampling_params": params,
        }
        message = MsgpackEncoder().encode(EngineCoreRequest(**{**required, **given}))
        found[stream.position] = sum(memoryview(cast(Any, part)).nbytes for part in message)
    return dict(sorted(found.items()))


def idle(rows: Rows, server: Server, count: int, resumed: int) -> Any:
    """Many streams that nobody appends to, and random ones that somebody goes on with."""
    filler = Filler(Api(server, API_KEY), 2)
    length = SCHEDULE.capacity + 3 * SCHEDULE.stride
    chosen = random.Random(3)
    ids: list[str] = []
    seconds: dict[int, float] = {}
    before = held = 0
    for most in sorted({min(FEW, count), count}):
        before = before or next(iter(server.rss().values()))
        while len(ids) < most:
            ids.append(filler.create(length, length))
            if len(ids) % 1000 == 0:
                print(f"{len(ids):>9,} streams", flush=True)
        held = next(iter(server.rss().values())) - before
        # Others take their pages, so that all of them go on from the same.
        others = [filler.create(length, length) for _ in range(2 * FEW)] if most == FEW else []
        found = []
        for _ in range(resumed):
            row = filler.append(chosen.choice(ids), NEW, GENERATED)
            rows.add(arm="idle", streams=most, **row)
            found.append(row["seconds"])
        seconds[most] = statistics.median(found)
        ids += others
    pages = []
    after = ""
    while True:
        started = time.perf_counter()
        page = filler.api.get(f"/v1/streams?limit=100{after}")
        pages.append(time.perf_counter() - started)
        rows.add(arm="list", page=len(pages), seconds=pages[-1])
        if not page["has_more"]:
            break
        after = f"&after={page['data'][-1]['id']}"
    return {
        "bytes_per_stream": held / count,
        "streams": count,
        "median_resume_s": seconds,
        "median_page_s": statistics.median(pages),
        "all_pages_s": sum(pages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fill", type=int, default=10**5, help="most tokens of one append")
    parser.add_argument("--idle", type=int, default=10**4, help="streams; 0 leaves the arm out")
    parser.add_argument("--resumed", type=int, default=100)
    parser.add_argument("--name", default=default_name("stored_streams"))
    args = parser.parse_args()
    stop_on_terminate()
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    pages = 4 * len(args.positions) * pages_per_stream(SCHEDULE, BLOCK)
    more = ["--sink-streams", str(args.idle + 3 * FEW + len(args.positions))]
    more += ["--api-key", API_KEY, "--sink-streams-idle", str(10**6)]
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, results.rows("appends.jsonl") as rows:
        database = Path(folder, "streams.db")
        environment = observing(Path(folder), ENVIRONMENT)
        more_here = [*more, "--sink-streams-db", str(database)]
        with serve(pages, 8, *more_here, environment=environment) as server:
            server.wait(lambda _seconds: None)
            steps = Steps(Path(folder))
            summary["flat"] = flat(rows, server, steps, args.positions, args.rounds, args.fill)
        summary["flat"]["bytes_sent"] = sent(database)
        if args.idle:
            with serve(pages, 8, *more) as server:
                server.wait(lambda _seconds: None)
                summary["idle"] = idle(rows, server, args.idle, args.resumed)
    results.summary(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
