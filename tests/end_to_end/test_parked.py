"""Going on with a stream from what is held of it: its last tokens, and hashes for all before.

Each turn sends what ``/v1/streams`` sends. While the pages are cached the answers are those of the
whole stream; when they are gone, those of a dense prompt of the survivors.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from sink_vllm.policy.parked import Chain
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.held import KEPT
from tests.conftest import ModelFactory
from tests.support.engine import (
    BLOCK_SIZE,
    Engine,
    Generated,
    Policy,
    asynchronous_scheduling,
    check_all_free,
    greedy_params,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.judge_stored import judge_chain
from tests.support.oracle import Oracle
from tests.support.remembered import Remembered, append, schedule_of
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256, seed=1)
POLICIES = [Policy(4, 92, 32), Policy(40, 88, 64), Policy(0, 96, 32), Policy(33, 61, 32)]
TURNS = 10


@dataclass(frozen=True, slots=True)
class Setup:
    policy: Policy
    engine: Engine
    oracle: Oracle

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.policy)

    def streams(self, count: int) -> list[Remembered]:
        return [Remembered(self.schedule) for _ in range(count)]

    def append(
        self, streams: list[Remembered], new: list[list[int]], num_tokens: int
    ) -> tuple[list[Generated], list[Chain]]:
        """One turn of each, in one batch."""
        params = [greedy_params(num_tokens) for _ in streams]
        return append(self.engine, streams, new, params)


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def setup(request: pytest.FixtureRequest, tiny_llama: ModelFactory) -> Iterator[Setup]:
    folder = tiny_llama(SHAPE)
    with running_engine(
        folder, request.param, enable_prefix_caching=True, max_num_batched_tokens=200
    ) as engine:
        yield Setup(request.param, engine, Oracle(folder))
        check_all_free(engine)


def test_every_turn_equals_a_stream_from_the_first_token(setup: Setup) -> None:
    """Ten turns, past several re-anchorings, of prompts that stay short: the oracle's tokens."""
    streams = setup.streams(3)
    most = setup.policy.capacity + KEPT * setup.policy.g + BLOCK_SIZE
    resumed = 0
    for turn in range(TURNS):
        new = [random_tokens(15 + 20 * i, 100 * turn + i) for i in range(3)]
        if turn == 4:
            new[1] = random_tokens(700, 5)  # many evictions in one prompt
        before = [list(one.all) for one in streams]
        missing = [one.held.missing for one in streams]
        answers, chains = setup.append(streams, new, 60)
        prompts = [[*old, *more] for old, more in zip(before, new, strict=True)]
        judge(setup.oracle, setup.policy, prompts, answers)
        for stream, gap, chain, answer, prompt in zip(
            streams, missing, chains, answers, prompts, strict=True
        ):
            assert chain.base == 0
            assert len(stream.held.tokens) <= most
            if gap:
                assert chain.resumed_from == "cache"
                assert len(prompt) - answer.cached_tokens <= (
                    len(new[streams.index(stream)]) + 1 + BLOCK_SIZE + setup.policy.g
                )
                resumed += 1
    assert resumed > TURNS
    assert min(len(one.all) for one in streams) > 3 * setup.policy.capacity
    assert max(answer.reanchorings for answer in answers) >= 2


def test_without_pages_a_stream_goes_on_from_its_survivors(setup: Setup) -> None:
    """The pages are gone: a dense prompt of the survivors; then its pages are found again."""
    (stream,) = streams = setup.streams(1)
    while stream.held.missing == 0:
        setup.append(streams, [random_tokens(70, len(stream.all))], 50)
    for round_ in range(3):
        position = stream.held.position
        survivors = [stream.all[p] for p in setup.schedule.cached_positions(position)]
        new = random_tokens(5, round_)
        setup.engine.llm.reset_prefix_cache()
        answers, chains = setup.append(streams, [new], 40)
        evicted = setup.schedule.evicted(position)
        assert (chains[0].resumed_from, chains[0].base) == ("survivors", evicted)
        judge_chain(setup.oracle, setup.policy, [*survivors, *new], answers[0], evicted)
        assert answers[0].evicted_tokens == setup.schedule.evicted(stream.held.position - 1)

        # What follows is exact again, with regard to that.
        chain_tokens = [*survivors, *new, *answers[0].tokens]
        resumed = 0
        for turn in range(6):
            new = random_tokens(30, 10 * round_ + turn)
            chain_tokens += new
            answers, chains = setup.append(streams, [new], 30)
            judge_chain(setup.oracle, setup.policy, chain_tokens, answers[0], evicted)
            chain_tokens += answers[0].tokens
            assert chains[0].base == evicted
            assert chains[0].resumed_from in ("cache", None)
            resumed += chains[0].resumed_from == "cache"
        assert resumed >= 4


def test_a_turn_can_be_taken_back(setup: Setup) -> None:
    """A turn that failed leaves the stream as it was: what was held before goes on as before."""
    (stream,) = streams = setup.streams(1)
    while stream.held.missing == 0:
        setup.append(streams, [random_tokens(70, 7 + len(stream.all))], 50)
    before, text = stream.held.copy(), list(stream.all)
    setup.append(streams, [random_tokens(400, 1)], 90)
    stream.held, stream.all = before, list(text)
    new = random_tokens(12, 2)
    answers, chains = setup.append(streams, [new], 80)
    judge(setup.oracle, setup.policy, [[*text, *new]], answers)
    assert chains[0].resumed_from == "cache"


def test_what_is_sent_does_not_grow(setup: Setup) -> None:
    """The prompt of an append at 20 capacities is not longer than the bound at 5."""
    (stream,) = streams = setup.streams(1)
    bound = setup.policy.capacity + KEPT * setup.policy.g + BLOCK_SIZE
    while len(stream.all) < 20 * setup.policy.capacity:
        setup.append(streams, [random_tokens(300, len(stream.all))], 20)
        assert len(stream.held.tokens) <= bound
        assert stream.held.tokens[: setup.policy.S] == array("i", stream.all[: setup.policy.S])
        assert stream.held.tokens[-50:] == array("i", stream.all[-50:])
        assert len(stream.held.chain.anchors) <= 8


def test_with_asynchronous_scheduling(tiny_llama: ModelFactory) -> None:
    """The front end is told what goes with the tokens it has: a step ahead changes nothing."""
    folder, policy = tiny_llama(SHAPE), POLICIES[0]
    with (
        asynchronous_scheduling(),
        running_engine(
            folder,
            policy,
            enable_prefix_caching=True,
            max_num_batched_tokens=200,
            async_scheduling=True,
        ) as engine,
    ):
        assert isinstance(engine.scheduler, AsyncScheduler)
        setup = Setup(policy, engine, Oracle(folder))
        streams = setup.streams(2)
        for turn in range(6):
            new = [random_tokens(30 + 20 * i, 900 + 10 * turn + i) for i in range(2)]
            before, gaps = [list(one.all) for one in streams], [one.held.missing for one in streams]
            answers, chains = setup.append(streams, new, 50)
            prompts = [[*old, *more] for old, more in zip(before, new, strict=True)]
            judge(setup.oracle, policy, prompts, answers)
            for gap, chain in zip(gaps, chains, strict=True):
                assert chain.base == 0
                assert not gap or chain.resumed_from == "cache"
        assert min(gaps) > 0
        check_all_free(engine)
