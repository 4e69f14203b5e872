"""Pages that the pool has reused come back from host memory: as if it had never lost them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sink_vllm.policy.plan import StepPlan
from tests.conftest import ModelFactory
from tests.support.engine import (
    BLOCK_SIZE,
    Engine,
    Generated,
    Policy,
    asynchronous_scheduling,
    check_all_free,
    running_engine,
)
from tests.support.families import FAMILIES
from tests.support.family import write_family
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256, seed=1)
HOST = 0.05  # GiB


@dataclass(slots=True)
class Talk:
    """A conversation, sent again with every turn."""

    number: int
    tokens: list[int] = field(default_factory=list)
    answers: list[Generated] = field(default_factory=list)

    def turn(self, engine: Engine, turn: int, generate: int) -> Generated:
        new = random_tokens(20 + 5 * self.number + 50 * (turn == 0), 100 * self.number + turn)
        self.tokens += new
        (answer,) = engine.greedy([self.tokens], generate)
        self.tokens += answer.tokens
        self.answers.append(answer)
        return answer


@contextmanager
def engine_with(
    folder: Path, policy: Policy, pages: int, host: float, **engine_args: Any
) -> Iterator[Engine]:
    options = policy.additional_config() | {"sink_host_gib": host}
    with running_engine(
        folder,
        policy,
        enable_prefix_caching=True,
        num_gpu_blocks_override=pages,
        max_num_batched_tokens=200,
        additional_config=options,
        **engine_args,
    ) as engine:
        yield engine
        check_all_free(engine)
        if engine.scheduler.hibernation is not None:
            engine.scheduler.hibernation.slots.check()


def conversations(engine: Engine, count: int, turns: int, generate: int = 35) -> list[Talk]:
    """Turn by turn, one conversation after the other: each is idle while the others talk."""
    talks = [Talk(number) for number in range(count)]
    for turn in range(turns):
        for talk in talks:
            talk.turn(engine, turn, generate)
    return talks


def pages_of_one(policy: Policy) -> int:
    return -(-policy.capacity // BLOCK_SIZE) + -(-policy.S // BLOCK_SIZE) + 2


@pytest.mark.parametrize(
    "policy", [Policy(4, 92, 32), Policy(40, 88, 64), Policy(0, 96, 32)], ids=str
)
def test_conversations_equal_those_that_never_lost_a_page(
    policy: Policy, tiny_llama: ModelFactory
) -> None:
    """Six conversations on pages for one: the tokens, and the tokens computed, of a large pool."""
    folder = tiny_llama(SHAPE)
    with engine_with(folder, policy, 400, 0) as engine:
        wanted = conversations(engine, 5, 5)
    with engine_with(folder, policy, pages_of_one(policy), HOST) as engine:
        talks = conversations(engine, 5, 5)
        hibernation = engine.scheduler.hibernation
        assert hibernation.loaded > 40
    for talk, one in zip(talks, wanted, strict=True):
        assert [a.tokens for a in talk.answers] == [a.tokens for a in one.answers]
        assert [a.cached_tokens for a in talk.answers] == [a.cached_tokens for a in one.answers]
        assert len(talk.tokens) > 2 * policy.capacity
        assert talk.answers[-1].evictions > 3
        assert len({tuple(answer.tokens) for answer in talk.answers}) == len(talk.answers)
    judge(Oracle(folder), policy, [talks[0].tokens[: -len(talks[0].answers[-1].tokens)]], talks[0].answers[-1:])
