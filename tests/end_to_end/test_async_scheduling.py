"""Asynchronous scheduling, vLLM's default on GPUs, gives the streams of the synchronous one."""

from collections.abc import Iterator

import pytest
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.conftest import ModelFactory
from tests.support.engine import (
    Engine,
    Policy,
    asynchronous_scheduling,
    check_all_free,
    greedy_params,
    running_engine,
)
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle, penalties
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(max_positions=320, layers=2)
POLICY = Policy(5, 91, 32)  # C = 128
PROMPTS = [random_tokens(length, length) for length in (3, 127, 128, 129, 200, 500)]


@pytest.fixture(scope="module")
def engine(tiny_llama: ModelFactory) -> Iterator[Engine]:
    with (
        asynchronous_scheduling(),
        running_engine(
            tiny_llama(SHAPE),
            POLICY,
            max_num_batched_tokens=100,
            enable_prefix_caching=True,
            async_scheduling=True,
        ) as engine,
    ):
        assert isinstance(engine.scheduler, AsyncScheduler)
        assert engine.core.batch_queue is not None
        yield engine
        check_all_free(engine)


@pytest.fixture(scope="module")
def oracle(tiny_llama: ModelFactory) -> Oracle:
    return Oracle(tiny_llama(SHAPE))


def test_async_streams_equal_the_oracle(engine: Engine, oracle: Oracle) -> None:
    """Six streams, dozens of evictions, re-anchorings: the same tokens as the synchronous engine.

    A stream drains before it evicts: nothing is in flight while its pages move.
    """
    results = engine.greedy(PROMPTS, 1_380)

    verdict = judge(oracle, POLICY, PROMPTS, results)
    print(verdict)
    assert verdict.least_evictions >= 40
    assert verdict.least_reanchorings >= 2


@pytest.mark.parametrize("max_tokens", [1, 2, 31, 32, 33, 100])
def test_async_max_tokens_is_exact(engine: Engine, max_tokens: int) -> None:
    """No token too many although the next one is scheduled before the last one is known."""
    results = engine.greedy(PROMPTS, max_tokens)

    assert [len(result.tokens) for result in results] == [max_tokens] * len(PROMPTS)
    assert {result.finish_reason for result in results} == {"length"}


def test_async_penalties_and_stop_tokens(engine: Engine, oracle: Oracle) -> None:
    """Penalties see the drained stream; a stop token late in the stream ends it exactly."""
    strengths = {"repetition": 1.3, "frequency": 0.2}
    results = engine.greedy(PROMPTS, 400, repetition_penalty=1.3, frequency_penalty=0.2)
    judge(oracle, POLICY, PROMPTS, results, adjust=penalties(**strengths))
    (free,) = engine.greedy(PROMPTS[:1], 400)
    index = next(i for i in range(200, 400) if free.tokens[i] not in free.tokens[:i])

    (stopped,) = engine.greedy(PROMPTS[:1], 400, stop_token_ids=[free.tokens[index]])

    assert stopped.tokens == free.tokens[: index + 1]


def test_async_repetitions_are_found_across_evictions(engine: Engine) -> None:
    """The token that completes the pattern is the last one, although another is in flight."""
    detection = RepetitionDetectionParams(max_pattern_size=64, min_pattern_size=64, min_count=5)

    results = engine.greedy(PROMPTS, 500, allowed_token_ids=[97], repetition_detection=detection)

    assert [len(result.tokens) for result in results] == [320] * len(PROMPTS)
    assert {result.stop_reason for result in results} == {"repetition_detected"}


def test_async_seeds(engine: Engine) -> None:
    """A seeded stream is the same alone and in a batch."""
    params = greedy_params(300, temperature=1.0, seed=3)
    (alone,) = engine.generate(PROMPTS[:1], params)

    together = engine.generate(PROMPTS, params)

    assert alone.outputs[0].token_ids == together[0].outputs[0].token_ids
