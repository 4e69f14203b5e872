"""Pages: all accounted for at every step, bounded per stream, and never read once free."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import RequestOutput

from tests.conftest import ModelFactory
from tests.support.engine import (
    BLOCK_SIZE,
    Engine,
    Generated,
    Policy,
    check_all_free,
    greedy_params,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.preemptions import watch_preemptions
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=320, seed=1)
NUM_REQUESTS = 100


def pages_per_stream(policy: Policy) -> int:
    return -(-policy.capacity // BLOCK_SIZE) + -(-policy.S // BLOCK_SIZE)


@dataclass(slots=True)
class Client:
    """One random request: what it asks for, and what it got."""

    prompt: list[int]
    max_tokens: int
    priority: int
    abort_after: int | None
    output: RequestOutput | None = None
    aborted: bool = False


@dataclass(slots=True)
class Crowd:
    """Random clients on an engine whose pool is too small for them."""

    engine: Engine
    clients: list[Client]
    preempted: set[str] = field(default_factory=set)
    evicted_then_preempted: int = 0

    @classmethod
    def of(cls, engine: Engine, seed: int) -> "Crowd":
        rng = random.Random(seed)
        shared = random_tokens(64, seed)
        clients = []
        for index in range(NUM_REQUESTS):
            prompt = random_tokens(rng.randint(1, 400), index)
            if rng.random() < 0.3:
                prompt = shared + prompt
            clients.append(
                Client(
                    prompt=prompt,
                    max_tokens=rng.randint(1, 120),
                    priority=rng.randint(0, 3),
                    abort_after=rng.randint(0, 100) if rng.random() < 0.25 else None,
                )
            )
        crowd = cls(engine, clients)

        def count(request: Any) -> None:
            crowd.preempted.add(request.request_id)
            ledger = engine.scheduler.ledger
            crowd.evicted_then_preempted += ledger.pinned(0, request.request_id) is not None

        watch_preemptions(engine.scheduler, before=count)
        return crowd

    def run(self, seed: int) -> None:
        """Let clients arrive and leave at random until all are served."""
        rng = random.Random(seed)
        llm = self.engine.llm.llm_engine
        waiting = list(enumerate(self.clients))[::-1]
        internal: dict[str, int] = {}
        while waiting or llm.has_unfinished_requests():
            while waiting and rng.random() < 0.4:
                index, client = waiting.pop()
                llm.add_request(
                    str(index),
                    {"prompt_token_ids": client.prompt},
                    greedy_params(client.max_tokens),
                    priority=client.priority,
                )
                internal[str(index)] = 0
            for output in llm.step():
                assert isinstance(output, RequestOutput)
                client = self.clients[int(output.request_id)]
                client.output = output
            for name in list(internal):
                internal[name] += 1
                client = self.clients[int(name)]
                finished = client.output is not None and client.output.finished
                if finished:
                    del internal[name]
                elif client.abort_after is not None and internal[name] > client.abort_after:
                    llm.abort_request([name])
                    client.aborted = True
                    del internal[name]


@pytest.mark.parametrize(
    ("policy", "order", "caching"),
    [
        pytest.param(Policy(4, 92, 32), "fcfs", False, id="four sinks, no cache"),
        pytest.param(Policy(4, 92, 32), "fcfs", True, id="four sinks"),
        pytest.param(Policy(40, 56, 32), "priority", True, id="forty sinks, priorities"),
        pytest.param(Policy(0, 64, 64), "fcfs", False, id="no sinks, no cache"),
    ],
)
def test_no_page_is_lost_in_a_crowd(
    policy: Policy, order: str, caching: bool, tiny_llama: ModelFactory
) -> None:
    """Invariant 5: 100 clients, aborts and preemptions; every step free + held + pinned = all.

    Many more clients, without a model, are in ``test_episodes.py``.
    """
    with running_engine(
        tiny_llama(SHAPE),
        policy,
        max_num_batched_tokens=96,
        enable_prefix_caching=caching,
        scheduling_policy=order,
        num_gpu_blocks_override=3 * pages_per_stream(policy) + 2,
    ) as engine:
        crowd = Crowd.of(engine, seed=len(order))

        crowd.run(seed=7)

        check_all_free(engine)
        assert engine.num_poisoned > 0

    served = [client for client in crowd.clients if not client.aborted]
    assert len(served) < NUM_REQUESTS
    # Guests give way; who has evicted does so to higher priorities only.
    assert len(crowd.preempted) >= 1
    assert order == "priority" or crowd.evicted_then_preempted == 0
    for client in served:
        assert client.output is not None
        result = Generated.of(client.output)
        assert len(result.tokens) == len(result.logprobs) == client.max_tokens
        assert all(-1e6 < logprob <= 0 for logprob in result.logprobs)  # NaN fails both
        assert result.prompt_len == len(client.prompt)
    assert sum(Generated.of(c.output).evictions for c in served if c.output) >= 100


@pytest.fixture(scope="module", params=[Policy(4, 92, 32), Policy(40, 56, 64)], ids=str)
def roomy(
    request: pytest.FixtureRequest, tiny_llama: ModelFactory
) -> Iterator[tuple[Engine, Policy, Path]]:
    folder = tiny_llama(SHAPE)
    with running_engine(folder, request.param, enable_prefix_caching=True) as engine:
        yield engine, request.param, folder


def test_pages_per_stream_are_constant(roomy: tuple[Engine, Policy, Path]) -> None:
    """Invariant 4: after the first eviction a stream never holds more pages than its share."""
    engine, policy, _ = roomy
    held: list[int] = []

    def count() -> None:
        for request_id, blocks in engine.manager.req_to_blocks.items():
            sinks = engine.scheduler.ledger.pinned(0, request_id) or ()
            held.append(len(blocks) + len(sinks))

    engine.after_step.append(count)
    (result,) = engine.greedy([random_tokens(50, 0)], 2_000)
    engine.after_step.remove(count)

    assert result.evictions >= 25
    assert max(held[:500]) == max(held[1_500:]) == max(held) == pages_per_stream(policy)


def test_streams_with_the_same_first_tokens_share_their_sink_pages(
    roomy: tuple[Engine, Policy, Path],
) -> None:
    """Pinned sink pages are one copy for all streams that start alike."""
    engine, policy, folder = roomy
    system = random_tokens(64, 9)
    prompts = [system + random_tokens(60 + 10 * i, i) for i in range(3)]
    engine.greedy(prompts[:1], 1)  # fill the cache
    pinned: list[set[int]] = []

    def collect() -> None:
        ledger = engine.scheduler.ledger
        sinks = [ledger.pinned(0, request.request_id) for request in engine.scheduler.running]
        if len(sinks) == len(prompts) and None not in sinks:
            pinned.append({block.block_id for blocks in sinks for block in blocks})

    engine.after_step.append(collect)
    results = engine.greedy(prompts, 200)
    engine.after_step.remove(collect)

    assert {len(pages) for pages in pinned} == {-(-policy.S // BLOCK_SIZE)}
    judge(Oracle(folder), policy, prompts, results)


def test_poison_reaches_the_model(roomy: tuple[Engine, Policy, Path]) -> None:
    """The negative control: a held page filled with NaN makes the next log-probabilities NaN."""
    engine, _, _ = roomy
    spoil = True

    def poison_a_held_page() -> None:
        nonlocal spoil
        if spoil and (tables := list(engine.manager.req_to_blocks.values())):
            engine._fill({tables[0][1].block_id}, float("nan"))
            spoil = False

    engine.after_step.append(poison_a_held_page)
    (result,) = engine.greedy([random_tokens(80, 3)], 4)
    engine.after_step.remove(poison_a_held_page)

    assert [math.isnan(logprob) for logprob in result.logprobs] == [False, True, True, True]
