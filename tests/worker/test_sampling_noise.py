"""Sampling noise follows the stream, not the cache, whose positions come again every stride."""

from pathlib import Path

import pytest

from tests.conftest import ModelFactory
from tests.support.engine import Generated, Policy, greedy_params, running_engine
from tests.support.judge import random_tokens
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

FLAT = TinyLlama(max_positions=256, logit_scale=0.0)
POLICY = Policy(4, 60, 32)  # C = 96
PROMPT = random_tokens(20, 0)


def tokens_from_noise(model: Path, policy: Policy | None) -> list[int]:
    """Tokens sampled when all are equally likely: a function of the noise alone."""
    with running_engine(model, policy, max_model_len=None if policy else 256) as engine:
        params = greedy_params(230, temperature=1.0, seed=11)
        (output,) = engine.generate([PROMPT], params)
    if policy:
        assert Generated.of(output).evictions >= 4
    return list(output.outputs[0].token_ids)


def test_noise_is_stock_noise_and_never_repeats(tiny_llama: ModelFactory) -> None:
    """A seeded stream draws what stock vLLM draws without evictions, and no stride repeats."""
    model = tiny_llama(FLAT)

    tokens = tokens_from_noise(model, POLICY)

    assert tokens == tokens_from_noise(model, None)
    repeats = sum(a == b for a, b in zip(tokens, tokens[POLICY.g :], strict=False))
    assert repeats <= 8  # 198 pairs of 300 equally likely tokens: 0.7 expected


def test_seeds_of_prompts_in_chunks(tiny_llama: ModelFactory) -> None:
    """A seeded prompt that is computed in chunks, by budget or by evictions, leaves the engine
    alive and draws for its outputs alone, whatever the chunks and whoever else is in the batch."""
    model = tiny_llama(FLAT)
    prompts = [random_tokens(length, length) for length in (30, 150, 400)]
    found = []
    for budget in (64, 512):
        with running_engine(model, POLICY, max_num_batched_tokens=budget) as engine:
            params = greedy_params(20, temperature=1.0, seed=7)
            outputs = engine.generate(prompts, [params, params, params])
        assert [Generated.of(output).evictions for output in outputs][1:] == [3, 11]
        found.append([list(output.outputs[0].token_ids) for output in outputs])

    assert found[0] == found[1]
    # All tokens are equally likely, so equal seeds draw equal tokens after any prompt.
    assert found[0][0] == found[0][1] == found[0][2]
