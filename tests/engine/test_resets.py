"""Clearing the cache of a busy engine: what sleep, pause and weight updates do to streams.

vLLM preempts all that runs and drops every cached page. A stream that had evicted goes on from its
survivors, as after any preemption; one that had not goes on as if nothing had happened; and a
resent conversation that only waits for its turn loses nothing but time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import RequestOutput

from tests.conftest import ModelFactory
from tests.support.engine import (
    Engine,
    Generated,
    Policy,
    check_all_free,
    greedy_params,
    running_engine,
)
from tests.support.judge import TOLERANCE, random_tokens
from tests.support.oracle import Oracle
from tests.support.preemptions import watch_preemptions
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(layers=2, max_positions=512)
POLICY = Policy(4, 92, 32)  # C = 128
STREAMS, RESENDS = 32, 8
LENGTH, JUDGED = 150, 40  # tokens of a stream; of each answer, after the reset


@pytest.fixture(scope="module")
def engine(tiny_llama: ModelFactory) -> Iterator[Engine]:
    with running_engine(
        tiny_llama(SHAPE),
        POLICY,
        enable_prefix_caching=True,
        max_num_seqs=STREAMS + RESENDS,
        # All streams and one resent conversation fill a step; the other seven wait.
        max_num_batched_tokens=STREAMS + 64,
        num_gpu_blocks_override=400,
    ) as engine:
        yield engine
        check_all_free(engine)


@pytest.fixture(scope="module")
def oracle(tiny_llama: ModelFactory) -> Oracle:
    return Oracle(tiny_llama(SHAPE))


def reset(engine: Engine) -> None:
    assert engine.llm.reset_prefix_cache(reset_running_requests=True)


def sleep(engine: Engine) -> None:
    """All that ``sleep(level=1, mode="keep")`` does beside moving memory, which CPUs cannot."""
    engine.core.pause_scheduler(mode="keep", clear_cache=True)
    assert engine.core.is_scheduler_paused()
    assert engine.llm.llm_engine.step() == []
    engine.core.resume_scheduler()


@dataclass(slots=True)
class Answer:
    """One request: where it began, and where it began again when it lost its pages."""

    prompt: list[int]
    begin: list[int] = field(default_factory=list)
    """The token list it was last (re)computed from."""
    first: int = 0
    """Tokens generated before that."""
    result: Generated | None = None

    @property
    def generated(self) -> list[int]:
        return self.result.tokens if self.result is not None else []


class Crowd:
    """Endless streams and resent conversations on one engine, step by step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._llm = engine.llm.llm_engine
        self.answers: dict[str, Answer] = {}
        self._unwatch: Callable[[], None] = lambda: None

    def __enter__(self) -> "Crowd":
        self._unwatch = watch_preemptions(self._engine.scheduler, after=self._record)
        return self

    def __exit__(self, *_error: object) -> None:
        self._llm.abort_request(list(self.answers), internal=False)  # if something went wrong
        self._unwatch()

    def _record(self, request: Any) -> None:
        answer = self.answers[request.request_id.split("-")[0]]
        pending = self._engine.scheduler.recycler.streams[request.request_id].pending
        answer.begin = [*request._all_token_ids, *pending]
        answer.first = len(answer.generated)

    def add(self, name: str, prompt: list[int], num_tokens: int) -> None:
        self.answers[name] = Answer(prompt, begin=prompt)
        self._llm.add_request(name, {"prompt_token_ids": prompt}, greedy_params(num_tokens))

    def step(self) -> None:
        for output in self._llm.step():
            assert isinstance(output, RequestOutput)
            self.answers[output.request_id].result = Generated.of(output)

    def finish(self) -> None:
        while self._llm.has_unfinished_requests():
            self.step()


@pytest.mark.parametrize("clear", [reset, sleep])
def test_a_busy_engine_survives_the_loss_of_its_cache(
    engine: Engine, oracle: Oracle, clear: Callable[[Engine], None]
) -> None:
    """32 endless streams, 8 resent conversations of which most wait: nothing raises,
    and every token afterwards is that of its stream, or of its survivors."""
    conversations = [random_tokens(200 + 30 * i, 50 + i) for i in range(RESENDS)]
    turns = engine.greedy(conversations, 20)
    resent = [
        [*conversation, *turn.tokens, *random_tokens(100, i)]
        for i, (conversation, turn) in enumerate(zip(conversations, turns, strict=True))
    ]
    with Crowd(engine) as crowd:
        for i in range(STREAMS):
            # Half of them have not evicted when it happens.
            prompt = random_tokens(3 + i if i % 2 else 60 + 7 * i, i)
            crowd.add(f"stream{i}", prompt, LENGTH)
        while min(len(crowd.answers[f"stream{i}"].generated) for i in range(STREAMS)) < 12:
            crowd.step()
        for i, prompt in enumerate(resent):
            crowd.add(f"resent{i}", prompt, JUDGED)
        crowd.step()
        assert len(engine.scheduler.waiting) >= 5

        clear(engine)

        crowd.finish()
        check_all_free(engine)

    answers = list(crowd.answers.values())
    survivors = [a for a in answers if a.begin != [*a.prompt, *a.generated[: a.first]]]
    assert 5 <= len(survivors) < STREAMS  # the others did not lose a token
    assert sum(a.begin == a.prompt for a in answers) >= 5  # of those that waited
    expected = oracle.run(
        [answer.begin for answer in answers],
        POLICY.S,
        POLICY.W,
        POLICY.g,
        JUDGED,
        forced=[answer.generated[answer.first : answer.first + JUDGED] for answer in answers],
    )
    for name, answer, truth in zip(crowd.answers, answers, expected, strict=True):
        assert answer.result is not None
        assert answer.result.finish_reason == "length", name
        logprobs = answer.result.logprobs[answer.first : answer.first + JUDGED]
        assert min(truth.gaps) > -TOLERANCE, name  # greedy, up to ties
        worst = max(abs(a - b) for a, b in zip(truth.logprobs, logprobs, strict=True))
        assert worst <= TOLERANCE, (name, worst)
