"""A stream that loses its pages goes on from its survivors, and its client notices nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import RequestOutput

from tests.conftest import ModelFactory
from tests.engine import Engine, Generated, Policy, check_all_free, greedy_params, running_engine
from tests.judge import TOLERANCE, random_tokens
from tests.oracle import Oracle
from tests.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(layers=2, max_positions=256)
NUM_TOKENS = 500


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


def live(engine: Engine, prompts: list[list[int]]) -> list[Life]:
    """Run all prompts and record every preemption."""
    lives = [Life(prompt) for prompt in prompts]
    preempt = engine.scheduler._preempt_request

    def recording_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        preempt(request, *args, **kwargs)
        life = lives[int(request.request_id.split("-")[0])]
        life.restarts.append((life.generated, list(request._all_token_ids)))

    engine.scheduler._preempt_request = recording_preempt
    llm = engine.llm.llm_engine
    for index, prompt in enumerate(prompts):
        llm.add_request(str(index), {"prompt_token_ids": prompt}, greedy_params(NUM_TOKENS))
    while llm.has_unfinished_requests():
        for output in llm.step():
            assert isinstance(output, RequestOutput)
            life = lives[int(output.request_id)]
            life.result = Generated.of(output)
            life.generated = len(life.result.tokens)
    return lives


@pytest.mark.parametrize("policy", [Policy(4, 92, 32), Policy(40, 56, 32)], ids=str)
def test_preempted_streams_continue_from_their_survivors(
    policy: Policy, tiny_llama: ModelFactory
) -> None:
    """Between preemptions tokens are the oracle's, which starts from the survivors as a prompt."""
    folder = tiny_llama(SHAPE)
    prompts = [random_tokens(length, length) for length in (20, 70, 100, 110, 120, 128)]
    pages = -(-policy.capacity // 32) + -(-policy.S // 32)
    with running_engine(folder, policy, num_gpu_blocks_override=2 * pages + 4) as engine:
        lives = live(engine, prompts)
        check_all_free(engine)

    check_lives(Oracle(folder), policy, lives)


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
