"""Question: is anything lost, or any token wrong, when a server with stored streams is killed?

    python -m benchmarks.restart [--streams 32] [--kills 20] [--seed 1] [--flags "--sink-disk …"]

A real `vllm serve --kv-policy sink --sink-streams-db PATH` with the repository's model. All streams
are appended to at once, turn after turn; at a random moment every process of the server is killed
(SIGKILL). It is started again, each client asks again for the turn it has no answer to, under the
same `Idempotency-Key`, and goes on. That, as often as there are kills.

- `lost`: streams that are gone. `misplaced`: streams that are neither as they were before the turn
  that was killed nor as they are after it.
- `wrong`: first answers after a restart that differ from an uninterrupted run of the same tokens;
  for a stream that went on from its survivors, of those and what was appended since.

Rows: one for each stream and kill. Not to be concluded: speed.
"""

import argparse
import json
import os
import random
import shlex
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Results, default_name
from benchmarks.service import BLOCK, GREEDY, NAME, SCHEDULE, serve
from examples.serving import Server, stop_on_terminate
from sink_vllm.policy.schedule import pages_per_stream

NEW, GENERATED = 48, 24  # tokens of a turn
_TOKENS = 200  # of the vocabulary


@dataclass
class Stream:
    """What a client knows of its stream."""

    id: str
    random: random.Random
    chain: list[int] = field(default_factory=list)
    """Tokens since the cache was last built anew."""
    length: int = 0
    new: list[int] = field(default_factory=list)
    """Of the turn that has not been answered."""
    key: str = ""
    resumed_from: str | None = None

    def ask(self, http: httpx.Client) -> list[int]:
        """A new turn, or the one that has not been answered; what it generated."""
        if not self.new:
            self.new = self.random.choices(range(1, _TOKENS), k=NEW)
            self.key = str(uuid.uuid4())
        body = {"tokens": self.new, "generate": {**GREEDY, "max_tokens": GENERATED}}
        answer = http.post(
            f"/v1/streams/{self.id}/append",
            json={**body, "return_token_ids": True},
            headers={"Idempotency-Key": self.key},
        )
        answer.raise_for_status()
        account = answer.json()
        self.resumed_from = account["usage"]["resumed_from"]
        if self.resumed_from == "survivors":
            kept = SCHEDULE.cached_positions(len(self.chain))
            self.chain = [self.chain[position] for position in kept]
        generated: list[int] = account["token_ids"]
        self.chain += [*self.new, *generated]
        self.length += len(self.new) + len(generated)
        self.new = []
        return generated


def uninterrupted(http: httpx.Client, stream: Stream, generated: list[int]) -> bool:
    """Whether one prompt that no page is cached of gives the same."""
    prompt = stream.chain[: len(stream.chain) - len(generated)]
    body = {"model": NAME, "prompt": prompt, "max_tokens": len(generated), **GREEDY}
    more = {"return_token_ids": True, "cache_salt": str(uuid.uuid4())}
    answer = http.post("/v1/completions", json={**body, **more})
    answer.raise_for_status()
    same: bool = answer.json()["choices"][0]["token_ids"] == generated
    return same


def resume(http: httpx.Client, stream: Stream) -> dict[str, Any]:
    """Go on after a kill, and say how."""
    answer = http.get(f"/v1/streams/{stream.id}")
    if answer.status_code != httpx.codes.OK:
        return {"lost": True, "status": answer.status_code, "said": answer.text}
    position, before, asked = answer.json()["position"], stream.length, bool(stream.new)
    done = position != before
    misplaced = done and not (asked and position == before + NEW + GENERATED)
    repeated = stream.ask(http) if done and asked else None
    generated = stream.ask(http)
    return {
        "lost": False,
        "misplaced": misplaced,
        "mid_turn": asked,
        "answer_lost": repeated is not None,
        "resumed_from": stream.resumed_from,
        "wrong": not uninterrupted(http, stream, generated),
        "position": stream.length,
    }


def until_killed(server: Server, http: httpx.Client, streams: list[Stream], seconds: float) -> int:
    """All streams go on; turns that were answered."""
    killed, turns = threading.Event(), Counter[str]()

    def go_on(stream: Stream) -> None:
        while not killed.is_set():
            try:
                stream.ask(http)
            except (httpx.TransportError, httpx.HTTPStatusError):
                if killed.wait(5):
                    return
                raise
            turns[stream.id] += 1

    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(go_on, stream) for stream in streams]
        time.sleep(seconds)
        processes = server.processes()
        killed.set()
        os.killpg(processes[0].pid, signal.SIGKILL)
        for one in running:
            one.result()
    return sum(turns.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most-seconds", type=float, default=10, help="from start to kill")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flags", default="", help="more of vllm serve, in one string")
    parser.add_argument("--name", default=default_name("restart"))
    args = parser.parse_args()
    stop_on_terminate()
    results = Results(args.name, vars(args) | {"schedule": str(SCHEDULE), "block_size": BLOCK})
    chance = random.Random(args.seed)
    pages = (args.streams + 4) * pages_per_stream(SCHEDULE, BLOCK)
    found: Counter[str] = Counter()
    streams: list[Stream] = []
    with tempfile.TemporaryDirectory() as folder, results.rows("streams.jsonl") as rows:
        flags = ["--sink-streams-db", str(Path(folder, "streams.db")), *shlex.split(args.flags)]
        for kill in range(args.kills + 1):
            with serve(2 * pages, args.streams, *flags) as server:
                server.wait(lambda _seconds: None)
                limits = httpx.Limits(max_keepalive_connections=0)
                http = httpx.Client(base_url=server.url, timeout=600, limits=limits)
                for stream in streams:
                    row = resume(http, stream)
                    rows.add(kill=kill, stream=stream.id, **row)
                    found["resumed"] += 1
                    found[f"from {row.get('resumed_from')}"] += 1
                    names = ("lost", "misplaced", "wrong", "mid_turn", "answer_lost")
                    found.update(name for name in names if row.get(name))
                for number in range(0 if streams else args.streams):
                    stream_id = http.post("/v1/streams", json={}).raise_for_status().json()["id"]
                    streams.append(Stream(stream_id, random.Random(f"{args.seed} {number}")))
                if kill < args.kills:
                    seconds = chance.uniform(0, args.most_seconds)
                    found["turns"] += until_killed(server, http, streams, seconds)
                    print(f"kill {kill + 1} after {seconds:.2f} s: {dict(found)}", flush=True)
    summary = {name: found[name] for name in ("lost", "misplaced", "wrong")} | dict(found)
    results.summary(summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
