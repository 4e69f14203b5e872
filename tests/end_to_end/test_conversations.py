"""Coming back to a stream: a resent conversation costs its new tokens only, and changes nothing.

Every turn sends all of it again, prompt and answers, as a client of the plain OpenAI API does.
The engine starts from the cached sink pages and the cached window before the longest cached
boundary; the oracle streams every turn from its first token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import ModelFactory
from tests.support.engine import (
    BLOCK_SIZE,
    Engine,
    Generated,
    Policy,
    check_all_free,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256, seed=1)
POLICIES = [Policy(4, 92, 32), Policy(40, 88, 64), Policy(0, 96, 32), Policy(33, 61, 32)]
TURNS = 8
ANSWER, QUESTION = 90, 25  # tokens


@dataclass(frozen=True, slots=True)
class Setup:
    policy: Policy
    engine: Engine
    oracle: Oracle


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def setup(request: pytest.FixtureRequest, tiny_llama: ModelFactory) -> Iterator[Setup]:
    folder = tiny_llama(SHAPE)
    with running_engine(
        folder, request.param, enable_prefix_caching=True, max_num_batched_tokens=200
    ) as engine:
        yield Setup(request.param, engine, Oracle(folder))
        check_all_free(engine)


def test_every_turn_equals_a_stream_from_the_first_token(setup: Setup) -> None:
    """Eight turns, far beyond the capacity: oracle tokens, at the cost of the new tokens."""
    conversations = [random_tokens(length, length) for length in (30, 150, 420)]
    new = 0  # tokens of a turn that no earlier turn has computed
    for turn in range(TURNS):
        answers = setup.engine.greedy(conversations, ANSWER)
        judge(setup.oracle, setup.policy, conversations, answers)
        for conversation, answer in zip(conversations, answers, strict=True):
            # Only whole pages are found, and after a re-anchoring a boundary a stride ago.
            computed = len(conversation) - answer.cached_tokens
            assert turn == 0 or computed <= new + BLOCK_SIZE + setup.policy.g
        conversations = [
            conversation + answer.tokens + random_tokens(QUESTION, 100 * turn + i)
            for i, (conversation, answer) in enumerate(zip(conversations, answers, strict=True))
        ]
        new = QUESTION + 1  # the last token of an answer is not computed

    assert min(map(len, conversations)) > 4 * setup.policy.capacity


def test_branches_of_a_conversation_do_not_mix(setup: Setup) -> None:
    """Two continuations of one long prefix, at once and after each other, and the prefix alone."""
    trunk = random_tokens(500, 1)
    setup.engine.greedy([trunk], 40)
    branches = [trunk + random_tokens(40, 2), trunk + random_tokens(70, 3), trunk[:380]]

    together = setup.engine.greedy(branches, 120)
    again = [setup.engine.greedy([branch], 120)[0] for branch in reversed(branches)][::-1]

    judge(setup.oracle, setup.policy, branches, together)
    judge(setup.oracle, setup.policy, branches, again)
    assert all(result.cached_tokens > setup.policy.capacity for result in again[:2])


def test_a_conversation_survives_a_crowded_cache(setup: Setup) -> None:
    """Others take pages of the conversation between turns, more each time: still its stream."""
    conversation = random_tokens(300, 7)
    for turn in range(4):
        others = [random_tokens(200 + 37 * i, 1000 * turn + i) for i in range(1 + 3 * turn)]
        answers: list[Generated] = setup.engine.greedy([*others, conversation], 64)
        judge(setup.oracle, setup.policy, [*others, conversation], answers)
        conversation = conversation + answers[-1].tokens + random_tokens(9, turn)
