"""Compares what the engine generated with the oracle, and says how close it was."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.support.engine import Generated, Policy
from tests.support.oracle import Adjust, Oracle
from tests.support.tiny_models import VOCAB_SIZE

TOLERANCE = 1e-4
"""Largest accepted difference of log-probabilities (float32)."""


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Numbers behind a comparison that passed."""

    max_difference: float
    ties: list[tuple[int, int]]
    """``(stream, index)`` of tokens that differ because two logits are equal within tolerance."""
    tokens: int
    least_evictions: int
    least_reanchorings: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, max |dlogprob| {self.max_difference:.1e}, ties {self.ties}, "
            f"evictions >= {self.least_evictions}, re-anchorings >= {self.least_reanchorings}"
        )


def judge(
    oracle: Oracle,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Generated],
    adjust: Adjust | None = None,
) -> Verdict:
    """Assert that ``generated`` is what token-by-token StreamingLLM generates.

    The oracle is led along the engine's tokens. Where each of them is its best choice, that is the
    stream it generates by itself; a token that is not is accepted where, and only where, it is as
    good as the best within tolerance.
    """
    num_tokens = len(generated[0].tokens)
    assert all(len(result.tokens) == num_tokens for result in generated)
    expected = oracle.run(
        prompts,
        policy.S,
        policy.W,
        policy.g,
        num_tokens,
        forced=[result.tokens for result in generated],
        adjust=adjust,
        truncate=policy.prompt == "truncate",
    )
    ties: list[tuple[int, int]] = []
    worst = 0.0
    for stream, (truth, result) in enumerate(zip(expected, generated, strict=True)):
        assert len(result.logprobs) == num_tokens
        for index, gap in enumerate(truth.gaps):
            difference = abs(truth.logprobs[index] - result.logprobs[index])
            where = f"stream {stream} (prompt of {len(prompts[stream])}), token {index}"
            assert gap > -TOLERANCE, f"{where}: token {result.tokens[index]} is worse by {-gap}"
            assert difference <= TOLERANCE, f"{where}: log-probability differs by {difference}"
            if gap < 0:
                ties.append((stream, index))
            worst = max(worst, difference)
        assert result.evictions == truth.evictions, (stream, result.evictions, truth.evictions)
        assert result.evicted_tokens == truth.evictions * policy.g
    return Verdict(
        max_difference=worst,
        ties=ties,
        tokens=num_tokens * len(generated),
        least_evictions=min(truth.evictions for truth in expected),
        least_reanchorings=min(result.reanchorings for result in generated),
    )
