"""Sampling noise follows the stream, not the cache, whose positions come again every stride."""

from pathlib import Path

import pytest

from tests.conftest import ModelFactory
from tests.engine import Generated, Policy, greedy_params, running_engine
from tests.judge import random_tokens
from tests.tiny_models import TinyLlama

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
