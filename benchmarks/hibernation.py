"""Question: what does it cost to go on with idle streams whose pages the block pool has reused?

    python -m benchmarks.hibernation [--streams 64] [--turns 20] [--pages-for 8]

`/v1/streams` of real servers with the repository's model. In every arm the same streams take
turns, one after the other: an append of random tokens, `--new` of them on average and between half
a page and twice as many as that less half a page, and `--generated` sampled ones, each turn with a
seed. After a short append most of what a model sees was there before, and at temperature 1 the
tokens show what greedy ones would hide: that it was shown other keys. The arms, each a server of
its own: `large`, a pool in which no page is ever lost; `off`, a pool for `--pages-for` streams;
`host`, the same with `--sink-host-gib` for all; `disk`, the same with host memory for four streams,
and files.

Between two rounds of turns of `disk` the files leave the machine's page cache (`fsync`, then
`posix_fadvise`, which needs no privileges), so that every round reads the disk. A page that is
written after that, the last one or two of a round, may still be in it, so the bytes that the
server's processes read from storage (the kernel counts them) are noted beside the pages they read.

Concluded per arm, without the first turn of a stream: tokens computed over tokens that are new
(appended and generated; aim: at most 1.1 with a tier), the median time to the first token, what
appends went on from, how many answers are those of `large`, token for token, and how many differ
from each other. A page that is not full is computed again in every arm, so `large` is the least
that can be. Of `disk`: bytes that came from storage over bytes of the pages that were read.

Not to be concluded: the speed of other disks (below a virtual machine the host may have the files
in its memory); times of arms against each other, if other work was running beside one of them; and
what a larger model would gain, for which computing costs more, and copying, too.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.rows import Rows, read
from benchmarks.service import BLOCK, SCHEDULE, Api, serve
from examples.serving import Server, stop_on_terminate
from sink_vllm.policy.schedule import pages_per_stream

_TOKENS = 200  # of the vocabulary
PAGE_BYTES = 2**20
"""More than a page of the model has, in all layers."""
ARMS = ("large", "off", "host", "disk")


def turn(api: Api, stream_id: str, tokens: list[int], generated: int, seed: int) -> dict[str, Any]:
    """One append: its account, its tokens, and seconds to the first of them."""
    sampled = {"temperature": 1, "seed": seed, "ignore_eos": True}
    body = {
        "tokens": tokens,
        "generate": {**sampled, "max_tokens": generated},
        "return_token_ids": True,
    }
    started, first = time.perf_counter(), 0.0
    last: dict[str, Any] = {}
    for event in api.events(f"/v1/streams/{stream_id}/append", body):
        first = first or time.perf_counter() - started
        last = event
    return {**last["usage"], "token_ids": last["token_ids"], "first_s": first}


class Storage:
    """Files of pages, and what the server's processes read of them, round after round."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder, self._server = folder, server
        self._flushed: set[Path] = set()
        self._before = self._counted()

    def _counted(self) -> dict[str, int]:
        read = sum(one.io_counters().read_bytes for one in self._server.processes())
        pages = int(self._server.metrics().total("sink_vllm:read_pages_total"))
        return {"storage_bytes": read, "read_pages": pages}

    def round(self) -> dict[str, int]:
        """Read since the last call; then the files leave the page cache, for the next round."""
        now = self._counted()
        grown = {name: now[name] - self._before[name] for name in now}
        sizes = [self._drop(path) for path in self._folder.rglob("*.page")]
        self._before = now
        return {**grown, "files": len(sizes), "page_bytes": max(sizes, default=0)}

    def _drop(self, path: Path) -> int:
        """Bytes of a file, which is on the disk only afterwards."""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if path not in self._flushed:  # what has not been written cannot be dropped
                os.fsync(file.fileno())
                self._flushed.add(path)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return os.fstat(file.fileno()).st_size
        return 0


def flags(arm: str, streams: int, folder: str) -> list[str]:
    pages = pages_per_stream(SCHEDULE, BLOCK)
    gib = PAGE_BYTES / 2**30
    if arm == "host":
        return ["--sink-host-gib", str(6 * streams * pages * gib)]
    if arm == "disk":
        disk = ["--sink-disk", folder, "--sink-disk-gib", "16"]
        return ["--sink-host-gib", str(4 * pages * gib), *disk]
    return []


def run(rows: Rows, rounds: Rows, arm: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All turns of all streams on a server of their own; every row is a turn."""
    chosen = random.Random(1)
    per_stream = pages_per_stream(SCHEDULE, BLOCK) + 1
    pages = per_stream * args.pages_for
    if arm == "large":
        # Every turn leaves pages behind that nobody asks for, and the cache keeps them.
        pages = per_stream * args.streams + args.streams * args.turns * (
            (args.new + args.generated) // BLOCK + 2
        )
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        more = ["--sink-streams", str(args.streams), *flags(arm, args.streams, folder)]
        with serve(pages, 8, *more) as server:
            server.wait(lambda _seconds: None)
            api, storage = Api(server), Storage(Path(folder), server)
            ids = [api.json("/v1/streams", {})["id"] for _ in range(args.streams)]
            for number in range(args.turns):
                started = time.perf_counter()
                for stream, stream_id in enumerate(ids):
                    count = chosen.randint(BLOCK // 2, 2 * args.new - BLOCK // 2)
                    tokens = chosen.choices(range(1, _TOKENS), k=count)
                    row = turn(api, stream_id, tokens, args.generated, len(made))
                    made.append({"arm": arm, "turn": number, "stream": stream, **row})
                    rows.add(**made[-1])
                seconds = time.perf_counter() - started
                rounds.add(arm=arm, turn=number, seconds=seconds, **storage.round())
                print(f"{arm}: {number + 1} of {args.turns} turns, {seconds:.0f} s", flush=True)
    return made


def conclude(rows: list[dict[str, Any]], large: list[dict[str, Any]]) -> dict[str, Any]:
    """What the turns behind the first say, beside the same turns of a pool that loses nothing."""
    pairs = [(row, other) for row, other in zip(rows, large, strict=True) if row["turn"]]
    computed = sum(row["computed_tokens"] + row["generated_tokens"] for row, _ in pairs)
    new = sum(row["appended_tokens"] + row["generated_tokens"] for row, _ in pairs)
    return {
        "computed_over_new": computed / new,
        "median_first_s": statistics.median(row["first_s"] for row, _ in pairs),
        "resumed_from": Counter(str(row["resumed_from"]) for row, _ in pairs),
        "equal_answers": sum(row["token_ids"] == other["token_ids"] for row, other in pairs),
        "distinct_answers": len({tuple(row["token_ids"]) for row, _ in pairs}),
        "answers": len(pairs),
    }


def from_storage(rounds: Sequence[dict[str, Any]]) -> float:
    """Bytes that came from storage over those of the pages read, without the first turn.

    Above 1: the kernel reads whole blocks, and a little of the servers' own files.
    """
    later = [row for row in rounds if row["turn"]]
    pages = sum(row["read_pages"] * row["page_bytes"] for row in later)
    return sum(row["storage_bytes"] for row in later) / pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--pages-for", type=int, default=8, help="streams")
    parser.add_argument("--new", type=int, default=192, help="tokens of an append")
    parser.add_argument("--generated", type=int, default=64, help="tokens behind it")
    parser.add_argument("--name", default=default_name("hibernation"))
    args = parser.parse_args()
    stop_on_terminate()
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    summary: dict[str, Any] = {}
    with results.rows("turns.jsonl") as rows, results.rows("rounds.jsonl") as rounds:
        large: list[dict[str, Any]] = []
        for arm in ARMS:
            made = run(rows, rounds, arm, args)
            large = large or made
            summary[arm] = conclude(made, large)
            print(json.dumps({arm: summary[arm]}), flush=True)
    disk = [row for row in read(results.folder)["rounds.jsonl"] if row["arm"] == "disk"]
    summary["disk"]["storage_over_pages_read"] = from_storage(disk)
    results.summary(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
