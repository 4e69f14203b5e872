"""Question: what does it cost to go on with idle streams whose pages the block pool has reused?

    python -m benchmarks.hibernation [--streams 64] [--turns 20] [--pages-for 8]

`/v1/streams` of real servers with the repository's model. In every arm the same streams take
turns, one after the other: an append of `--new` random tokens and `--generated` greedy ones. The
arms, each a server of its own: `large`, a pool in which no page is ever lost; `off`, a pool for
`--pages-for` streams; `host`, the same with `--sink-host-gib` for all; `disk`, the same with host
memory for four streams, and files.

Concluded per arm, without the first turn of a stream: tokens computed over tokens that are new
(appended and generated; aim: at most 1.1 with a tier), the median time to the first token, what
appends went on from, and how many answers are those of `large`, token for token. A page that is not
full is computed again in every arm, so `large` is the least that can be. Not to be concluded: the
speed of a disk, as files stay in the machine's page cache; and what a larger model would gain, for
which computing costs more, and copying, too.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.rows import Rows
from benchmarks.service import BLOCK, GREEDY, SCHEDULE, Api, serve
from sink_vllm.policy.schedule import pages_per_stream

_TOKENS = 200  # of the vocabulary
PAGE_BYTES = 2**20
"""More than a page of the model has, in all layers."""
ARMS = ("large", "off", "host", "disk")


def turn(api: Api, stream_id: str, tokens: list[int], generated: int) -> dict[str, Any]:
    """One append: its account, its tokens, and seconds to the first of them."""
    body = {
        "tokens": tokens,
        "generate": {**GREEDY, "max_tokens": generated},
        "return_token_ids": True,
    }
    started, first = time.perf_counter(), 0.0
    last: dict[str, Any] = {}
    for event in api.events(f"/v1/streams/{stream_id}/append", body):
        first = first or time.perf_counter() - started
        last = event
    return {**last["usage"], "token_ids": last["token_ids"], "first_s": first}


def flags(arm: str, streams: int, folder: str) -> list[str]:
    pages = pages_per_stream(SCHEDULE, BLOCK)
    gib = PAGE_BYTES / 2**30
    if arm == "host":
        return ["--sink-host-gib", str(6 * streams * pages * gib)]
    if arm == "disk":
        disk = ["--sink-disk", folder, "--sink-disk-gib", "16"]
        return ["--sink-host-gib", str(4 * pages * gib), *disk]
    return []


def run(rows: Rows, arm: str, args: argparse.Namespace) -> list[dict[str, Any]]:
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
            api = Api(server)
            ids = [api.json("/v1/streams", {})["id"] for _ in range(args.streams)]
            for number in range(args.turns):
                for stream, stream_id in enumerate(ids):
                    tokens = chosen.choices(range(1, _TOKENS), k=args.new)
                    row = turn(api, stream_id, tokens, args.generated)
                    made.append({"arm": arm, "turn": number, "stream": stream, **row})
                    rows.add(**made[-1])
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
        "answers": len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--pages-for", type=int, default=8, help="streams")
    parser.add_argument("--new", type=int, default=192, help="tokens of an append")
    parser.add_argument("--generated", type=int, default=64, help="tokens behind it")
    parser.add_argument("--name", default=default_name("hibernation"))
    args = parser.parse_args()
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    summary: dict[str, Any] = {}
    with results.rows("turns.jsonl") as rows:
        large = run(rows, ARMS[0], args)
        summary[ARMS[0]] = conclude(large, large)
        for arm in ARMS[1:]:
            summary[arm] = conclude(run(rows, arm, args), large)
    results.summary(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
