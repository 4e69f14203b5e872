"""Question: how large should the pool be, for conversations that come back now and then?

    python -m benchmarks.sessions [--conversations 64] [--turns 6] [--factors 1 1.25 1.5 2]

Turns arrive at random times (a Poisson process of `--rate` per second, the same times in every arm)
at a real `vllm serve --kv-policy sink` with the repository's model; a turn belongs to a
conversation that has none in progress. Arms: servers whose pool is `--factors` times the pages
that all conversations hold at most; and per server `chat`, where a turn resends the whole history,
and `streams`, where it is an append to a stored stream.

Concluded per arm, without the first turn of a conversation: tokens computed over tokens that are
new (1 would be a pool that loses nothing, but for pages that were not full), the time to the first
token from when a turn arrived (median, 99th percentile), and preemptions.

The policy needs no page beyond 1.0 to run all conversations at once; what a larger pool buys is
that idle ones still have their pages. Not to be concluded: absolute times, which are those of a
tiny model that computes a lost page in milliseconds.
"""

import argparse
import json
import queue
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.common import Results, default_name
from benchmarks.rows import Rows
from benchmarks.service import BLOCK, SCHEDULE, Api, Arm, ChatArm, StreamArm, questions, serve
from sink_vllm.policy.schedule import pages_per_stream

GENERATED = 16  # tokens of an answer
KINDS: dict[str, type[ChatArm] | type[StreamArm]] = {"chat": ChatArm, "streams": StreamArm}
_PREEMPTIONS = "vllm:num_preemptions_total"


def arrivals(rate: float, count: int) -> Iterator[float]:
    """Seconds from the beginning at which turns arrive."""
    chosen, at = random.Random(7), 0.0
    for _ in range(count):
        at += chosen.expovariate(rate)
        yield at


class Conversation:
    """Turns of one conversation, one at a time."""

    def __init__(self, number: int, arm: Arm, texts: list[str]) -> None:
        self.number, self._arm, self._texts = number, arm, texts
        self._turn, self._known = 0, 0

    def turn(self, due: float) -> dict[str, Any]:
        """One turn that arrived at ``due`` (of ``time.perf_counter``)."""
        waited = time.perf_counter() - due
        found = self._arm.turn(self._texts[self._turn])
        row = {
            "conversation": self.number,
            "turn": self._turn,
            "first_s": waited + found["ttft_s"],
            "computed_tokens": found["computed_tokens"],
            "new_tokens": found["prompt_tokens"] - self._known,
        }
        self._turn += 1
        self._known = found["prompt_tokens"] + found["output_tokens"]
        return row


def run(api: Api, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All turns, each of a conversation that is idle then."""
    idle: queue.Queue[Conversation] = queue.Queue()
    everyone = list(range(args.conversations))
    random.Random(3).shuffle(everyone)
    others = 1000 * list(KINDS).index(kind)  # no page of the other kind is found in the cache
    for number in everyone:
        texts = questions(args.turns, args.words, seed=100 + number + others)
        idle.put(Conversation(number, KINDS[kind](api, GENERATED), texts))
    rows: list[dict[str, Any]] = []
    chosen = random.Random(5)

    def one(due: float) -> None:
        # Not the one that has been idle longest: people come back when they like.
        waiting = [idle.get()]
        while len(waiting) < args.conversations:
            try:
                waiting.append(idle.get_nowait())
            except queue.Empty:
                break
        conversation = waiting.pop(chosen.randrange(len(waiting)))
        for other in waiting:
            idle.put(other)
        rows.append(conversation.turn(due))
        if rows[-1]["turn"] + 1 < args.turns:
            idle.put(conversation)

    jobs: list[Future[None]] = []
    started = time.perf_counter()
    with ThreadPoolExecutor(args.conversations) as pool:
        for at in arrivals(args.rate, args.conversations * args.turns):
            time.sleep(max(started + at - time.perf_counter(), 0))
            jobs.append(pool.submit(one, started + at))
        for job in jobs:
            job.result()
    return rows


def conclude(rows: list[dict[str, Any]], preemptions: float) -> dict[str, Any]:
    """Of the turns behind the first of their conversation."""
    later = [row for row in rows if row["turn"]]
    first = [row["first_s"] for row in later]
    return {
        "turns": len(later),
        "computed_over_new": sum(row["computed_tokens"] for row in later)
        / sum(row["new_tokens"] for row in later),
        "first_s_p50": statistics.median(first),
        "first_s_p99": statistics.quantiles(first, n=100)[98],
        "preemptions": int(preemptions),
    }


def measure(rows: Rows, factor: float, args: argparse.Namespace) -> dict[str, Any]:
    """All kinds of conversation on one server."""
    pages = round(factor * args.conversations * pages_per_stream(SCHEDULE, BLOCK))
    summary: dict[str, Any] = {}
    with serve(pages, args.conversations, "--sink-streams", str(args.conversations)) as server:
        server.wait(lambda _seconds: None)
        for kind in args.kinds:
            before = server.metrics().total(_PREEMPTIONS)
            found = run(Api(server), kind, args)
            preempted = server.metrics().total(_PREEMPTIONS) - before
            for row in found:
                rows.add(kind=kind, factor=factor, **row)
            summary[kind] = conclude(found, preempted)
            print(f"pool × {factor}: {kind} {json.dumps(summary[kind])}", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6, help="of every conversation")
    parser.add_argument("--words", type=int, default=25, help="of a question; a word is 3 tokens")
    parser.add_argument("--rate", type=float, default=3.0, help="turns per second")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--name", default=default_name("sessions"))
    args = parser.parse_args()
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    with results.rows("turns.jsonl") as rows:
        summary = {str(factor): measure(rows, factor, args) for factor in args.factors}
    results.summary(summary)


if __name__ == "__main__":
    main()
