"""One run of one arm under the load of a scenario; a row of raw results comes back."""

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from benchmarks.peers import llama_cpp, models
from benchmarks.peers.llama_cpp import LlamaServer
from benchmarks.quality.isolate import isolated
from benchmarks.serving import bench_serve, load, peers
from benchmarks.serving.arrivals import Log, percentile, spread, summary
from benchmarks.serving.load import Client, LoadError, words
from benchmarks.serving.spec import Arm, Scenario
from benchmarks.serving.watch import Watch
from examples.serving import Server

KEPT_GAPS = 2  # streams whose gaps are kept one by one
Row = dict[str, Any]


def client_of(arm: Arm, scenario: Scenario) -> Client:
    """Truncating leaves what the policy keeps at least, and generates until the context is full."""
    schedule = scenario.schedule
    if arm.llama is not None:
        return Client(dialect=llama_cpp.dialect(arm.llama, scenario))
    if arm.client == "truncate":
        return Client(keep=schedule.capacity - schedule.stride, chunk=schedule.stride)
    if arm.client == "recompute":
        return Client(keep=schedule.capacity, chunk=1)
    return Client()


def prompts_of(scenario: Scenario, streams: int, repetition: int) -> list[list[int]]:
    """The same for all arms, new ones for every repetition: nothing is found in a cache."""
    return [words(scenario.prompt, scenario.name, repetition, n) for n in range(streams)]


@contextmanager
def bar(total: int, what: str) -> Iterator[Any]:
    with tqdm(total=total, desc=what, unit="tok", mininterval=2.0, leave=False) as shown:
        yield shown.update


def endless(
    arm: Arm, scenario: Scenario, servers: Mapping[str, Server], streams: int, repetition: int
) -> Row:
    """Streams without end, cut off after ``tokens`` tokens or ``seconds`` seconds."""
    prompts = prompts_of(scenario, streams, repetition)
    assert arm.server_name is not None
    server = servers[arm.server_name]
    with (
        bar(streams * scenario.tokens, f"{scenario.name} {arm.name} x{streams}") as shown,
        Watch(server) as watch,
    ):
        logs = asyncio.run(
            load.streams(
                server.url,
                client_of(arm, scenario),
                prompts,
                scenario.tokens,
                scenario.seconds,
                shown,
            )
        )
    row = {**row_of(logs, scenario, arm), **watch.row(_tokens(logs))}
    if isinstance(server, LlamaServer):
        long = words(8 * scenario.schedule.capacity, scenario.name, "long")
        return {**row, "computed_per_token": None, "long_prompt": server.answer_to(long)}
    if arm.server is not None and arm.server.plugin:
        check_evictions(logs, scenario, watch.grown["evictions"])
    return {**row, **pages_over_time(watch)}


def check_evictions(logs: Sequence[Log], scenario: Scenario, made: float) -> None:
    """Correctness before speed: the server must have evicted what the schedule says.

    The last token of a stream is delivered, not computed; and the last eviction of a stream that
    was cut off may be counted before or after.

    Raises:
        LoadError: it has not, so whatever was timed is not the policy.
    """
    schedule = scenario.schedule
    scheduled = sum(schedule.evictions(log.prompt + len(log.arrivals) - 1) for log in logs)
    if abs(made - scheduled) > len(logs):
        raise LoadError(f"{made:.0f} evictions counted by the server, {scheduled} scheduled")


def transformers(arm: Arm, scenario: Scenario, dtype: str, streams: int, repetition: int) -> Row:
    """A peer in plain transformers, in a process of its own."""
    prompts = prompts_of(scenario, streams, repetition)
    capacity = scenario.schedule.capacity
    results = isolated(
        peers.run,
        arm.transformers,
        str(models.checkpoint(scenario.model)),
        dtype,
        scenario.sinks,
        capacity,
        prompts,
        scenario.tokens,
        scenario.seconds,
    )
    next(results)
    logs = [Log(**log) for log in next(results)["logs"]]
    results.close()
    return row_of(logs, scenario, arm)


def row_of(logs: Sequence[Log], scenario: Scenario, arm: Arm) -> Row:
    """Figures of the streams, and a few of them token by token."""
    evicts = arm.server is not None and arm.server.plugin
    row = summary(logs, scenario.schedule, evicts=evicts)
    row["kept"] = [
        {
            "prompt": log.prompt,
            "restarts": log.restarts if len(log.restarts) < len(log.arrivals) // 2 else "all",
            "first_token_us": round(1e6 * (log.arrivals[0] - log.started)),
            "gaps_us": [round(1e6 * gap) for gap in log.gaps],
        }
        for log in logs[:KEPT_GAPS]
        if log.arrivals
    ]
    return row


def pages_over_time(watch: Watch) -> Row:
    """Pages held by tokens delivered so far."""
    return {
        "held": [
            [sample["generated"], sample["pages"], sample["running"]] for sample in watch.samples
        ]
    }


def _tokens(logs: Sequence[Log]) -> int:
    return sum(len(log.arrivals) for log in logs)


def prompts(
    arm: Arm, scenario: Scenario, servers: Mapping[str, Server], streams: int, repetition: int
) -> Row:
    """Long prompts streaming in, by `vllm bench serve`."""
    assert arm.server is not None
    server = servers[arm.server.name]
    words_ = bench_serve.arguments(
        server,
        prompt=scenario.prompt,
        tokens=scenario.tokens,
        requests=streams,
        rate=0.0,
        seed=repetition,
    )
    with Watch(server) as watch:
        found = asyncio.run(bench_serve.run(words_))
    return {
        "tokens": found["total_output_tokens"],
        "seconds": found["duration"],
        "prompt_tokens_per_second": found["total_input_tokens"] / found["duration"],
        "first_token": spread(found["ttfts"]),
        "gaps": spread([gap for gaps in found["itls"] for gap in gaps]),
        **watch.row(found["total_output_tokens"]),
    }


def conversations(
    arm: Arm, scenario: Scenario, servers: Mapping[str, Server], streams: int, repetition: int
) -> Row:
    """Conversations that resend their history, whole or cut to what fits."""
    assert arm.server is not None
    server = servers[arm.server.name]
    keep = scenario.schedule.capacity - scenario.tokens if arm.client == "truncate" else None
    with (
        bar(
            streams * scenario.turns * scenario.tokens, f"{scenario.name} {arm.name} x{streams}"
        ) as shown,
        Watch(server) as watch,
    ):
        began = time.perf_counter()
        turns = asyncio.run(
            load.conversations(
                server.url,
                streams,
                load.Talk(
                    (scenario.name, repetition),
                    scenario.turns,
                    scenario.prompt,
                    scenario.tokens,
                    keep,
                ),
                shown,
            )
        )
        seconds = time.perf_counter() - began
    late = [turn for turn in turns if turn.turn >= scenario.turns // 2]
    delivered = len(turns) * scenario.tokens
    return {
        "tokens": delivered,
        "seconds": seconds,
        "tokens_per_second": delivered / seconds,
        "first_token": spread([turn.first_token for turn in late]),
        "computed_over_new": sum(turn.prompt - turn.cached + scenario.tokens for turn in late)
        / sum(turn.new for turn in late),
        "turns": [dataclasses.asdict(turn) for turn in turns if turn.conversation == 0],
        **watch.row(delivered),
    }


def mixed(
    background: str, scenario: Scenario, server: Server, streams: int, repetition: int
) -> Row:
    """Short requests by `vllm bench serve` beside ``streams`` streams of the driver.

    ``background`` is `endless`, or `ordinary`: as many clients, each with one request after the
    other that ends before the first eviction.
    """
    return asyncio.run(_mixed(background, scenario, server, streams, repetition))


async def _mixed(
    background: str, scenario: Scenario, server: Server, streams: int, repetition: int
) -> Row:
    capacity = scenario.schedule.capacity
    prompts_ = prompts_of(scenario, streams, repetition)
    arrivals: list[tuple[float, int]] = []

    def arrived(tokens: int) -> None:
        arrivals.append((time.perf_counter(), tokens))

    words_ = bench_serve.arguments(
        server,
        prompt=scenario.short_prompt,
        tokens=scenario.short_tokens,
        requests=scenario.short_requests,
        rate=scenario.rate,
        seed=repetition,
    )
    async with bench_serve.started(words_) as generator, load.connection() as http:
        jobs: list[Coroutine[Any, Any, object]]
        if background == "endless":
            jobs = [
                load.stream(http, server.url, Client(), p, scenario.tokens, load.NO_LIMIT, arrived)
                for p in prompts_
            ]
        else:
            jobs = [
                _ordinary(http, server.url, p, capacity - scenario.prompt, arrived)
                for p in prompts_
            ]
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            # Streams are past their first eviction before anything is measured.
            while sum(n for _, n in arrivals) < 1.5 * capacity * streams:
                await asyncio.sleep(0.1)
                _raise_failures(tasks)
            with Watch(server) as watch:
                found = await generator.run()
            _raise_failures(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    begin = min(found["start_times"])
    end = begin + found["duration"]
    behind = sum(n for when, n in arrivals if begin <= when <= end)
    return {
        "background": background,
        "seconds": found["duration"],
        "short_tokens": found["total_output_tokens"],
        "background_tokens": behind,
        "tokens_per_second": (behind + found["total_output_tokens"]) / found["duration"],
        "first_token": spread(found["ttfts"]),
        "first_token_us": [round(1e6 * t) for t in found["ttfts"]],
        "first_token_p95": percentile(found["ttfts"], 95),
        "evictions": watch.grown["evictions"],
        "preemptions": watch.grown["preemptions"],
    }


def _raise_failures(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        if task.done():
            error = task.exception()
            raise error or LoadError("a stream of the background ended before the measurement")


async def _ordinary(http: Any, url: str, prompt: Sequence[int], tokens: int, arrived: Any) -> None:
    """Requests of ``tokens`` tokens, one after the other, until cancelled.

    The first is shorter by a share that differs between clients, so that they do not all begin
    their requests in the same step.
    """
    share = 1 + prompt[-1] % tokens
    while True:
        log = Log(prompt=len(prompt), started=time.perf_counter())
        await load.complete(http, url, prompt, share, log, load.NO_LIMIT, arrived)
        share = tokens


def warm_up(server: Server, arm: Arm, scenario: Scenario) -> None:
    """A few tokens behind a prompt of the scenario; a server that evicts does so twice."""
    schedule = scenario.schedule
    evicts = arm.llama is not None or (arm.server is not None and arm.server.plugin)
    length = schedule.capacity - 1 if evicts else min(scenario.prompt, schedule.capacity - 8)
    tokens = 2 * schedule.stride if evicts else 8
    prompt = words(length, scenario.name, "warm-up")
    # An arm whose client truncates shares its server with one that does not.
    client = Client(dialect=client_of(arm, scenario).dialect)
    asyncio.run(load.streams(server.url, client, [prompt], tokens, 0.0, lambda _: None))
