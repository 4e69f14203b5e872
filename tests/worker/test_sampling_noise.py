"""Sampling noise follows the stream, not the cache, whose positions come again every stride."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ModelFactory
from tests.support.engine import Engine, Generated, Policy, greedy_params, running_engine
from tests.support.judge import random_tokens
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

FLAT = TinyLlama(max_positions=256, logit_scale=0.0)
POLICY = Policy(4, 60, 32)  # C = 96
PROMPT = random_tokens(20, 0)


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory) -> Path:
    """All its tokens are equally likely: what is sampled is a function of the noise alone."""
    return tiny_llama(FLAT)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of one engine."""

    alone: list[int]
    """Of a stream that outgrows the cache."""
    in_chunks: list[list[int]]
    """Of prompts below and beyond the capacity, all with one seed."""


@pytest.fixture(scope="module")
def sampled(model: Path) -> Sampled:
    """In steps of at most 512 tokens."""
    with running_engine(model, POLICY, max_num_batched_tokens=512) as engine:
        return Sampled(one_stream(engine, evictions=4), in_chunks(engine))


def one_stream(engine: Engine, evictions: int) -> list[int]:
    (output,) = engine.generate([PROMPT], greedy_params(230, temperature=1.0, seed=11))
    assert Generated.of(output).evictions >= evictions
    return list(output.outputs[0].token_ids)


def in_chunks(engine: Engine) -> list[list[int]]:
    prompts = [random_tokens(length, length) for length in (30, 150, 400)]
    params = greedy_params(20, temperature=1.0, seed=7)
    outputs = engine.generate(prompts, [params, params, params])
    assert [Generated.of(output).evictions for output in outputs][1:] == [3, 11]
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_noise_is_stock_noise_and_never_repeats(model: Path, sampled: Sampled) -> None:
    """A seeded stream draws what stock vLLM draws without evictions, and no stride repeats."""
    tokens = sampled.alone

    with running_engine(model, None, max_model_len=256) as stock:
        assert tokens == one_stream(stock, evictions=0)
    repeats = sum(a == b for a, b in zip(tokens, tokens[POLICY.g :], strict=False))
    assert repeats <= 8  # 198 pairs of 300 equally likely tokens: 0.7 expected


def test_seeds_of_prompts_in_chunks(model: Path, sampled: Sampled) -> None:
    """A seeded prompt that is computed in chunks, by budget or by evictions, leaves the engine
    alive and draws for its outputs alone, whatever the chunks and whoever else is in the batch."""
    with running_engine(model, POLICY, max_num_batched_tokens=64) as engine:
        found = in_chunks(engine)

    assert found == sampled.in_chunks
    # All tokens are equally likely, so equal seeds draw equal tokens after any prompt.
    assert found[0] == found[1] == found[2]
