"""Compares what the engine generated with the oracle, and says how close it was."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.support.engine import Generated, Policy
from tests.support.oracle import Adjust, Oracle, OracleResult
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
    before_evictions: float | None = None
    """Largest difference before the first eviction, of a model of fewer bits than the oracle."""

    def __str__(self) -> str:
        before = self.before_evictions
        noise = "" if before is None else f" ({before:.1e} before the first eviction)"
        return (
            f"{self.tokens} tokens, max |dlogprob| {self.max_difference:.1e}{noise}, "
            f"ties {self.ties}, evictions >= {self.least_evictions}, "
            f"re-anchorings >= {self.least_reanchorings}"
        )


def judge_rounded(
    oracle: Oracle,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Generated],
    rounding: Sequence[float] = (),
) -> Verdict:
    """The same for an engine of fewer bits than the oracle: evictions must not add to rounding.

    What rounding does is measured where nothing has been evicted yet, in some hundred tokens, by
    its median and its 90th percentile, which depend on the text: the median of a hundred tokens of
    Qwen3.5 was 0.014 to 0.029 without any eviction. The largest is a matter of chance: there are
    ten times as many tokens afterwards. Twice as much is not let through: without the four sinks,
    or with eight, it would be 2.1 to 3.8 times (Qwen3.5, Qwen3-Next).

    Args:
        oracle: of the checkpoint.
        policy: of the engine.
        prompts: of the streams.
        generated: by the engine.
        rounding: what it did elsewhere (``differences``), for prompts longer than the cache.
    """
    expected = _expected(oracle, policy, prompts, generated)
    before = list(rounding)
    after: list[float] = []
    for prompt, truth, result in zip(prompts, expected, generated, strict=True):
        assert result.evictions == truth.evictions, (result.evictions, truth.evictions)
        found = [abs(a - b) for a, b in zip(truth.logprobs, result.logprobs, strict=True)]
        first = max(policy.capacity + 1 - len(prompt), 0)
        before += found[:first]
        after += found[first:]
    assert len(before) >= 50
    for share in (0.5, 0.9):
        once, later = _quantile(before, share), _quantile(after, share)
        print(f"{share:.0%} of differences below {once:.1e} before evictions, {later:.1e} after")
        assert later <= 2 * once, (share, later, once)
    return Verdict(
        max_difference=max(after),
        ties=[],
        tokens=len(before) + len(after),
        least_evictions=min(truth.evictions for truth in expected),
        least_reanchorings=min(result.reanchorings for result in generated),
        before_evictions=max(before),
    )


def differences(
    oracle: Oracle, policy: Policy, prompts: Sequence[Sequence[int]], generated: Sequence[Generated]
) -> list[float]:
    """Of all log-probabilities of streams from those of the oracle along their tokens."""
    expected = _expected(oracle, policy, prompts, generated)
    return [
        abs(a - b)
        for truth, result in zip(expected, generated, strict=True)
        for a, b in zip(truth.logprobs, result.logprobs, strict=True)
    ]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


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
    expected = _expected(oracle, policy, prompts, generated, adjust)
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


def _expected(
    oracle: Oracle,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Generated],
    adjust: Adjust | None = None,
) -> list[OracleResult]:
    """What the oracle says of the tokens that were generated."""
    num_tokens = len(generated[0].tokens)
    assert all(len(result.tokens) == num_tokens for result in generated)
    return oracle.run(
        prompts,
        policy.S,
        policy.W,
        policy.g,
        num_tokens,
        forced=[result.tokens for result in generated],
        adjust=adjust,
        truncate=policy.prompt == "truncate",
    )
