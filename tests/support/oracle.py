"""Token-by-token StreamingLLM for Llama checkpoints in plain torch: the judge of the engine.

It keeps the *un-rotated* keys of every cached token and, at every step, numbers all cached tokens
by cache position ``0..n-1``, rotates keys and query with those numbers, and attends over all of
them. Nothing is paged, chunked, shared or re-rotated, and nothing of ``sink_vllm`` is imported:
the eviction rule is written here a second time, from its definition: *when the cache holds
``C = S + W + g`` tokens and one more must be computed, drop the ``g`` oldest tokens that are not
among the first ``S`` of the stream*.

Tokens that are known, of a prompt or forced, are computed together up to the next eviction: dense
causal attention, which is the same as one after the other (``at_once=1``) and takes a fraction of
the time. ``tests/end_to_end/test_oracle.py`` compares the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.support.oracle_llama import Llama

Adjust = Callable[[torch.Tensor, "Stream"], torch.Tensor]


@dataclass(slots=True)
class Stream:
    """One stream while it runs: what is cached, what was generated, what is due."""

    tokens: list[int]  # the whole stream: prompt, then generated tokens
    prompt_len: int
    num_tokens: int
    forced: Sequence[int] | None = None
    computed: int = 0
    cached: list[int] = field(default_factory=list)  # stream positions, in cache order
    evictions: int = 0
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def known(self) -> list[int]:
        """Tokens that can be computed: all but what the model must choose first."""
        return [*self.tokens[: self.prompt_len], *self.forced] if self.forced else self.tokens

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.prompt_len + self.num_tokens

    def cached_prompt_tokens(self) -> list[int]:
        return [self.tokens[p] for p in self.cached if p < self.prompt_len]

    def cached_output_tokens(self) -> list[int]:
        return [self.tokens[p] for p in self.cached if p >= self.prompt_len]


@dataclass(frozen=True, slots=True)
class OracleResult:
    """What one stream generated."""

    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token in ``tokens``, before any adjustment of the logits."""
    gaps: list[float]
    """Logit of each token minus the best logit of the other tokens; negative if it was forced."""
    evictions: int
    """Evictions while streaming; with ``truncate`` those a streamed prompt would have had too."""


class Oracle:
    """StreamingLLM with sink tokens ``S``, window ``W`` and stride ``g`` on one checkpoint."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.llama = Llama(folder, dtype)

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        S: int,
        W: int,
        g: int,
        num_tokens: int,
        *,
        forced: Sequence[Sequence[int]] | None = None,
        adjust: Adjust | None = None,
        truncate: bool = False,
        at_once: int | None = None,
    ) -> list[OracleResult]:
        """Generate ``num_tokens`` greedy tokens for each prompt.

        Args:
            prompts: token ids, one list per stream; the streams do not see each other.
            forced: take these tokens instead of the best ones (teacher forcing).
            adjust: changes the logits ``[vocab]`` of a stream before its token is chosen.
            truncate: leave the tokens a streamed prompt would have evicted out of the prompt.
            at_once: most tokens of a stream in one pass of the model; ``None``: what is known.
        """
        capacity = S + W + g
        skipped = [0 for _ in prompts]
        if truncate:
            skipped = [-(-max(len(prompt) - capacity, 0) // g) for prompt in prompts]
            prompts = [
                [*prompt[:S], *prompt[S + e * g :]]
                for prompt, e in zip(prompts, skipped, strict=True)
            ]
        streams = [
            Stream(
                tokens=list(prompt),
                prompt_len=len(prompt),
                num_tokens=num_tokens,
                forced=None if forced is None else forced[i],
            )
            for i, prompt in enumerate(prompts)
        ]
        active = streams
        cache = self.llama.new_cache(len(active), capacity)
        while active:
            chunks: list[list[int]] = []
            for row, stream in enumerate(active):
                if len(stream.cached) == capacity:
                    cache.drop(row, S, S + g)
                    del stream.cached[S : S + g]
                    stream.evictions += 1
                room = min(capacity - len(stream.cached), at_once or capacity)
                last = stream.prompt_len + num_tokens - 1  # its logits nobody asks for
                chunks.append(stream.known[stream.computed : min(stream.computed + room, last)])
            sampling = [
                (row, column)
                for row, (stream, chunk) in enumerate(zip(active, chunks, strict=True))
                for column in range(len(chunk))
                if stream.computed + column + 1 >= stream.prompt_len
            ]
            logits = self.llama.step(chunks, cache, sampling)
            choices = iter(_choices(logits, adjust))
            for stream, chunk in zip(active, chunks, strict=True):
                for _ in chunk:
                    stream.cached.append(stream.computed)
                    stream.computed += 1
                    if stream.computed == len(stream.tokens):
                        _choose(stream, next(choices), adjust)
            left = [row for row, stream in enumerate(active) if not stream.done]
            if len(left) < len(active):
                active = [active[row] for row in left]
                cache = cache.select(left)
        return [
            OracleResult(s.output, s.logprobs, s.gaps, s.evictions + e)
            for s, e in zip(streams, skipped, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Logits:
    """Raw logits ``[vocab]``, their log-sum-exp, and the two best of them where that is all."""

    raw: torch.Tensor
    total: float
    best: tuple[list[float], list[int]] | None


def _choices(logits: torch.Tensor, adjust: Adjust | None) -> list[_Logits]:
    """What ``_choose`` needs of each row, computed for all rows together."""
    if not len(logits):
        return []
    totals = logits.logsumexp(-1).tolist()
    if adjust is not None:
        return [_Logits(row, total, None) for row, total in zip(logits, totals, strict=True)]
    best = zip(*(two.tolist() for two in logits.topk(2)), strict=True)
    return [_Logits(*one) for one in zip(logits, totals, best, strict=True)]


def _choose(stream: Stream, of: _Logits, adjust: Adjust | None) -> None:
    """Append the next token of ``stream``."""
    adjusted = of.raw if adjust is None else adjust(of.raw.clone(), stream)
    values, indices = of.best or (two.tolist() for two in adjusted.topk(2))
    token = indices[0]
    if stream.forced is not None:
        token = stream.forced[len(stream.tokens) - stream.prompt_len]
    logit, runner_up = float(adjusted[token]), values[1] if token == indices[0] else values[0]
    stream.tokens.append(token)
    stream.logprobs.append(float(of.raw[token]) - of.total)
    stream.gaps.append(logit - runner_up)


def penalties(repetition: float = 1.0, frequency: float = 0.0, presence: float = 0.0) -> Adjust:
    """vLLM's penalty formulas, over the tokens that are in the cache."""

    def adjust(logits: torch.Tensor, stream: Stream) -> torch.Tensor:
        prompt, output = stream.cached_prompt_tokens(), stream.cached_output_tokens()
        seen = torch.tensor(sorted({*prompt, *output}))
        repeated = logits[seen]
        logits[seen] = torch.where(repeated > 0, repeated / repetition, repeated * repetition)
        counts = torch.bincount(
            torch.tensor(output, dtype=torch.long), minlength=logits.shape[0]
        ).to(logits.dtype)
        return logits - frequency * counts - presence * (counts > 0)

    return adjust
