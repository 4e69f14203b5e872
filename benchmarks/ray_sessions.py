"""Question: do conversations stay with the replica that holds their pages, and what if it dies?

    python -m benchmarks.ray_sessions [--conversations 16] [--turns 10] [--name NAME]

Two replicas of the repository's model behind Ray Serve, on a Ray cluster of two nodes on this
machine. Every conversation resends its history with each turn, over the chat API. The arms:

- `session`: consistent hashing of the session id; `prefix`: Ray's prefix-aware router;
  `round-robin`: no affinity, for contrast; `single`: one replica, for the throughput;
- `tokens`: `session`, with the history resent as token ids over the completions API;
- `kill`: `session` again, and the process of one replica is killed by its id in the middle;
- `worker`: `session` again, and the worker below a replica's engine core is killed.

Per turn one row: tokens of the prompt, of it found in the cache of the engine that served it
(reported by the engine), new since the last turn, time, and what failed attempts ended with. What
is concluded, and from what:

- a turn after the first has *landed* on the replica that holds its pages if its engine found the
  prompt of the turn before in its cache, up to two pages at the end (the answer behind it comes
  back as text and may be tokenized differently, and pages are found as a whole);
- recovery: from the kill to the end of the last turn that was in flight then; and to the moment
  when Serve has two healthy replicas again.

Not to be concluded: how fast a replica is. Client, router and both replicas share two cores.
"""

import argparse
import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import ray
from tokenizers import Tokenizer

from benchmarks.common import MODEL, Results, default_name, describe
from examples.processes import family, titled
from examples.ray_serve.client import Conversation, Turn, conversations, http_client
from examples.ray_serve.local import LocalApp, local_cluster, running_app

PORT = 8123
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
PAGE = 32  # tokens; of the CPU engine with this model
COUNTERS = (
    "vllm_prompt_tokens",
    "vllm_generation_tokens",
    "vllm_prefix_cache_queries",
    "vllm_prefix_cache_hits",
    "sink_vllm_evictions",
)
METRICS_DELAY = 15.0  # seconds in which Ray has collected the last numbers

Disturb = Callable[[LocalApp], dict[str, Any]]


@dataclass(slots=True)
class TokenConversation(Conversation):
    """A conversation whose history is resent as the very tokens it consists of."""

    path: ClassVar[str] = "/v1/completions"
    ids: list[int] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.ids += TOKENIZER.encode(message + "\n", add_special_tokens=not self.ids).ids

    def history(self) -> dict[str, Any]:
        return {"prompt": self.ids, "return_token_ids": True}

    def remember(self, text: str, token_ids: list[int]) -> None:
        self.ids += token_ids


@dataclass(slots=True)
class Arm:
    """One load on one deployment."""

    name: str
    turns: list[Turn] = field(default_factory=list)
    seconds: float = 0.0
    event: dict[str, Any] = field(default_factory=dict)
    """What was killed, and when (seconds of the monotonic clock)."""


def previous(turn: Turn, turns: Sequence[Turn]) -> Turn | None:
    """The turn before ``turn`` in its conversation."""
    return next(
        (t for t in turns if t.session == turn.session and t.number == turn.number - 1), None
    )


def has_landed(turn: Turn, before: Turn) -> bool:
    """Whether the engine found the prompt of the turn before, up to two pages at its end."""
    return turn.cached_tokens >= max(before.prompt_tokens - 2 * PAGE, PAGE)


async def load(app: LocalApp, talks: Sequence[Conversation], turns: int, arm: Arm) -> None:
    """All conversations at once, each turn as soon as the one before is answered."""
    started = time.monotonic()
    async with http_client(app.url) as http:

        async def talk(conversation: Conversation) -> None:
            for _ in range(turns):
                arm.turns.append(await conversation.take_turn(http))

        await asyncio.gather(*map(talk, talks))
    arm.seconds = time.monotonic() - started


async def kill_when(half: int, app: LocalApp, arm: Arm, kill: Disturb) -> None:
    """Kill in the middle of the load, then wait until Serve has replaced what died."""
    while len(arm.turns) < half:
        await asyncio.sleep(0.05)
    killed = time.monotonic()
    arm.event = kill(app)
    arm.event["killed"] = killed
    down = 0.0
    while True:
        running = await asyncio.to_thread(app.running)
        if running < 2:
            down = down or time.monotonic() - killed
        elif down:
            break
        await asyncio.sleep(0.2)
    arm.event["seconds_until_serve_noticed"] = down
    arm.event["seconds_until_replaced"] = time.monotonic() - killed


def kill_replica(app: LocalApp) -> dict[str, Any]:
    """SIGKILL the process of the older replica."""
    victim = app.replicas()[0]
    below = family(victim.pid)[1:]
    os.kill(victim.pid, signal.SIGKILL)
    return {"what": "the process of a replica", "children": [p.pid for p in below]}


def kill_worker(app: LocalApp) -> dict[str, Any]:
    """SIGKILL the worker that computes for the older replica."""
    victim = app.replicas()[0]
    (worker,) = titled("Worker", victim.pid)
    os.kill(worker.pid, signal.SIGKILL)
    return {"what": "the worker of a replica", "children": []}


def run_arm(
    app: LocalApp, name: str, options: argparse.Namespace, kill: Disturb | None = None
) -> dict[str, Any]:
    """Run one arm and summarise it; its rows go into the results."""
    arm = Arm(name)
    talks = conversations(options.conversations, prefix=name)
    if name == "tokens":
        talks = [TokenConversation(talk.session, talk.lines) for talk in talks]
    before = app.totals(*COUNTERS)

    async def everything() -> None:
        jobs: list[Awaitable[None]] = [load(app, talks, options.turns, arm)]
        if kill is not None:
            half = options.conversations * options.turns // 2
            jobs.append(kill_when(half, app, arm, kill))
        await asyncio.gather(*jobs)

    asyncio.run(everything())
    time.sleep(METRICS_DELAY)
    summary = summarise(arm, options)
    summary["replicas"] = per_replica(before, app.totals(*COUNTERS))
    with options.results.rows(f"{name}.jsonl") as rows:
        for turn in arm.turns:
            rows.add(**asdict(turn))
    print(name, {key: value for key, value in summary.items() if key != "replicas"}, flush=True)
    return summary


def per_replica(
    before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """What each replica's counters grew by; Ray goes on exporting those of replicas that ended."""
    grown = {
        replica: {
            name: value - before.get(replica, {}).get(name, 0.0) for name, value in values.items()
        }
        for replica, values in after.items()
    }
    return {replica: values for replica, values in grown.items() if any(values.values())}


def summarise(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one arm."""
    later = [(turn, before) for turn in arm.turns if (before := previous(turn, arm.turns))]
    landed = [has_landed(turn, before) for turn, before in later]
    excess = [
        turn.computed_tokens - turn.new_tokens for turn, before in later if has_landed(turn, before)
    ]
    generated = sum(turn.completion_tokens for turn in arm.turns)
    finished = sum(1 for turn in arm.turns if turn.number == options.turns - 1)
    summary: dict[str, Any] = {
        "conversations_finished": f"{finished} of {options.conversations}",
        "turns_after_the_first": len(landed),
        "landed": sum(landed),
        "landed_percent": round(100 * sum(landed) / max(len(landed), 1), 1),
        "computed_tokens": sum(turn.computed_tokens for turn, _ in later),
        "new_tokens": sum(turn.new_tokens for turn, _ in later),
        "computed_minus_new_when_landed": describe(excess) if excess else None,
        "turns_retried": sum(1 for turn in arm.turns if turn.errors),
        "attempts_that_failed": sum(len(turn.errors) for turn in arm.turns),
        "errors": dict(Counter(_kind(error) for turn in arm.turns for error in turn.errors)),
        "longest_turn": max(turn.seconds for turn in arm.turns),
        "first_token": describe([turn.first_token for turn, _ in later]),
        "seconds": arm.seconds,
        "generated_tokens_per_second": generated / arm.seconds,
    }
    if arm.event:
        summary["event"] = aftermath(arm)
    return summary


def _kind(error: str) -> str:
    """An error without what differs from request to request."""
    return re.sub(r"\(Request ID.*|See stack trace.*", "…", error)


def aftermath(arm: Arm) -> dict[str, Any]:
    """Who noticed the kill, and for how long."""
    killed = arm.event["killed"]
    flying = [t for t in arm.turns if t.started < killed < t.started + t.seconds]
    retried = [t for t in arm.turns if t.errors]
    moved = [
        t
        for t in arm.turns
        if (before := previous(t, arm.turns))
        and t.started + t.seconds > killed
        and not has_landed(t, before)
    ]
    return {
        **{key: value for key, value in arm.event.items() if key not in ("killed", "children")},
        "turns_in_flight": len(flying),
        "turns_retried": len(retried),
        "retried_though_not_in_flight": len([t for t in retried if t not in flying]),
        "sessions_retried": sorted({t.session for t in retried}),
        "turns_that_moved": len(moved),
        "sessions_that_moved": sorted({t.session for t in moved}),
        "seconds_until_last_retried_turn_was_answered": max(
            (t.started + t.seconds - killed for t in retried), default=0.0
        ),
        "processes_left_behind": sum(
            1 for pid in arm.event["children"] if os.path.exists(f"/proc/{pid}")
        ),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--name", default=default_name("ray_sessions"))
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "name"}
    options.results = Results(options.name, settings)
    summary: dict[str, Any] = {}
    with local_cluster(nodes=2, cpus_per_node=2) as address:
        ray.init(address=address, log_to_driver=False)
        for routing, replicas, arms in DEPLOYMENTS:
            if not set(arms) & set(options.arms):
                continue
            with running_app(PORT, routing=routing, replicas=replicas) as app:
                for name, kill in arms.items():
                    if name in options.arms:
                        app.wait_for_replicas(replicas)
                        summary[name] = run_arm(app, name, options, kill)
        ray.shutdown()
    options.results.summary(summary)


DEPLOYMENTS: tuple[tuple[str, int, dict[str, Disturb | None]], ...] = (
    ("session", 2, {"session": None, "tokens": None, "kill": kill_replica, "worker": kill_worker}),
    ("round-robin", 2, {"round-robin": None}),
    ("prefix", 2, {"prefix": None}),
    ("session", 1, {"single": None}),
)
ARMS = [name for _, _, arms in DEPLOYMENTS for name in arms]


if __name__ == "__main__":
    main()
