"""A stream never loses its pages to others once it has evicted. Where an operator takes them, it
goes on from its survivors, and its client notices nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import RequestOutput

from sink_vllm.server.lengths import FRONT_MAX
from tests.conftest import ModelFactory
from tests.support.engine import (
    Engine,
    Generated,
    Policy,
    check_all_free,
    greedy_params,
    running_engine,
)
from tests.support.judge import TOLERANCE, judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.preemptions import watch_preemptions
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(layers=2, max_positions=256)
NUM_TOKENS = 400  # ten evictions of the shortest prompt
PROMPTS = [random_tokens(length, length) for length in (20, 70, 100, 110, 120, 128)]


def room(policy: Policy) -> int:
    """Pages of a pool for two streams, and a few more."""
    return 2 * (-(-policy.capacity // 32) + -(-policy.S // 32)) + 4


@dataclass(slots=True)
class Life:
    """One request: what it generated, and what it was recomputed from after each preemption."""

    prompt: list[int]
    restarts: list[tuple[int, list[int]]] = field(default_factory=list)
    """Tokens generated before the preemption, and the token list that survived it."""
    result: Generated | None = None
    generated: int = 0

    def segments(self) -> list[tuple[list[int], int, int]]:
        """``(prompt, first, last)``: outputs ``[first, last)`` continue this prompt."""
        starts = [(0, self.prompt), *self.restarts]
        ends = [first for first, _ in self.restarts] + [NUM_TOKENS]
        return [(prompt, first, last) for (first, prompt), last in zip(starts, ends, strict=True)]


def live(
    engine: Engine,
    prompts: list[list[int]],
    reset_every: int = 0,
    max_tokens: Callable[[list[int]], int] | None = None,
) -> list[Life]:
    """Run all prompts and record every preemption.

    Args:
        reset_every: steps after which an operator resets the prefix cache, running requests
            included, as weight updates do; 0 for never.
        max_tokens: what each client asks for, which hangs up after ``NUM_TOKENS``.
    """
    lives = [Life(prompt) for prompt in prompts]

    def record(request: Any) -> None:
        life = lives[int(request.request_id.split("-")[0])]
        life.restarts.append((life.generated, list(request._all_token_ids)))

    watch_preemptions(engine.scheduler, after=record)
    llm = engine.llm.llm_engine
    for index, prompt in enumerate(prompts):
        params = greedy_params(max_tokens(prompt) if max_tokens else NUM_TOKENS)
        llm.add_request(str(index), {"prompt_token_ids": prompt}, params)
    steps = 0
    while llm.has_unfinished_requests():
        steps += 1
        if reset_every and steps % reset_every == 0:
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.step():
            assert isinstance(output, RequestOutput)
            life = lives[int(output.request_id)]
            life.result = Generated.of(output)
            life.generated = len(life.result.tokens)
            if max_tokens and life.generated == NUM_TOKENS:
                llm.abort_request([output.request_id])
    return lives


@pytest.mark.parametrize("policy", [Policy(4, 92, 32), Policy(40, 56, 32)], ids=str)
def test_streams_continue_from_their_survivors(policy: Policy, tiny_llama: ModelFactory) -> None:
    """Between preemptions tokens are the oracle's, which starts from the survivors as a prompt."""
    folder = tiny_llama(SHAPE)
    with running_engine(folder, policy, num_gpu_blocks_override=room(policy)) as engine:
        lives = live(engine, PROMPTS, reset_every=150)
        check_all_free(engine)

    check_lives(Oracle(folder), policy, lives)


@pytest.mark.parametrize("caching", [False, True], ids=["no cache", "prefix cache"])
@pytest.mark.parametrize("policy", [Policy(4, 92, 32), Policy(32, 64, 32)], ids=str)
def test_what_fits_runs_and_the_others_wait(
    policy: Policy, caching: bool, tiny_llama: ModelFactory
) -> None:
    """A pool for exactly two streams and six that want it: two run at a time, in lockstep, nobody
    is preempted or computed twice, and every text is that of the stream alone."""
    folder = tiny_llama(SHAPE)
    pages = room(policy) - 4
    scheduled = 0
    with running_engine(
        folder, policy, num_gpu_blocks_override=pages + 1, enable_prefix_caching=caching
    ) as engine:
        schedule = engine.scheduler.schedule

        def counting_schedule(*args: Any) -> Any:
            nonlocal scheduled
            output = schedule(*args)
            scheduled += output.total_num_scheduled_tokens
            assert len(engine.scheduler.running) <= 2
            return output

        engine.scheduler.schedule = counting_schedule
        lives = live(engine, PROMPTS)
        check_all_free(engine)

    assert [life.restarts for life in lives] == [[]] * len(PROMPTS)
    assert scheduled == sum(map(len, PROMPTS)) + len(PROMPTS) * (NUM_TOKENS - 1)
    results = [life.result for life in lives if life.result is not None]
    assert judge(Oracle(folder), policy, PROMPTS, results).least_evictions >= 10


def test_guests_give_way_once_and_lose_nothing(tiny_llama: ModelFactory) -> None:
    """Requests without max_tokens are admitted as by vLLM, more than fit when they last. Who has
    not evicted gives way, is computed again exactly, and then has its share to the end."""
    folder, policy = tiny_llama(SHAPE), Policy(4, 92, 32)
    endless = FRONT_MAX  # what vLLM's handlers fill in when a client names none
    with running_engine(folder, policy, num_gpu_blocks_override=room(policy)) as engine:
        most = 0

        def count() -> None:
            nonlocal most
            most = max(most, len(engine.scheduler.running))

        engine.after_step.append(count)
        lives = live(engine, PROMPTS, max_tokens=lambda prompt: endless - len(prompt))
        check_all_free(engine)

    restarts = [len(life.restarts) for life in lives]
    assert most > 2
    assert max(restarts) == 1
    for life in lives:
        assert life.result is not None
        for _, tokens in life.restarts:
            assert tokens == [*life.prompt, *life.result.tokens][: len(tokens)]  # nothing evicted
    results = [life.result for life in lives if life.result is not None]
    assert judge(Oracle(folder), policy, PROMPTS, results).least_evictions >= 10


def check_lives(oracle: Oracle, policy: Policy, lives: Sequence[Life]) -> None:
    """Assert that some were preempted after evictions, and all were finished as they should."""
    evicted_before = [
        life for life in lives for n, tokens in life.restarts if len(life.prompt) + n > len(tokens)
    ]
    assert len(evicted_before) >= 3
    for life in lives:
        assert life.result is not None
        assert len(life.result.tokens) == NUM_TOKENS
        assert life.result.finish_reason == "length"
        for prompt, first, last in life.segments():
            if first == last:  # preempted again before it generated anything
                continue
            (truth,) = oracle.run(
                [prompt],
                policy.S,
                policy.W,
                policy.g,
                last - first,
                forced=[life.result.tokens[first:last]],
            )
            logprobs = life.result.logprobs[first:last]
            differences = (abs(a - b) for a, b in zip(truth.logprobs, logprobs, strict=True))
            assert min(truth.gaps) > -TOLERANCE  # greedy, up to ties
            assert max(differences) <= TOLERANCE
