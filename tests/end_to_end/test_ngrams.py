"""Speculation with n-grams: drafts that come from the cache change nothing but the time.

On V1; ``tests/worker/test_v2_runner.py`` has V2. Engines run in processes of their own: what looks
n-grams up, numba, has a module that vLLM's next start on a CPU in the same process stumbles over.
"""

from dataclasses import replace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.conftest import ModelFactory
from tests.support.engine import Policy
from tests.support.judge import judge, random_tokens
from tests.support.judge_stored import judge_turns
from tests.support.oracle import Oracle, penalties
from tests.support.runner_job import Batch, Ran, run_job
from tests.support.tiny_models import VOCAB_SIZE, TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(max_positions=256, layers=2)
POLICY = Policy(4, 60, 32)  # C = 96
C = POLICY.capacity
STREAMS = 5  # that fit into the pool
PROMPTS = [random_tokens(length, length) for length in (3, 95, 96, 97, 250)]
GUESTS = [random_tokens(10, 40 + index) for index in range(7)]
SHORT = [random_tokens(length, length) for length in (3, 20, 40)]
RESENT = random_tokens(65, 8)
MIN_TOKENS = 130
NGRAMS: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,  # texts of random models repeat little more than single tokens
    "prompt_lookup_max": 3,
}
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": STREAMS * 4 + 1,  # and vLLM's null block
    "speculative_config": NGRAMS,
    "watch": False,
}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
EVEN = list(range(0, VOCAB_SIZE, 2))


def batch(prompts: list[list[int]], max_tokens: int, **params: Any) -> Batch:
    return Batch(prompts, [GREEDY | {"max_tokens": max_tokens} | params] * len(prompts))


BELOW = batch(SHORT, C + 1 - 40)  # the last of the longest with exactly C tokens cached
BATCHES = {
    "streams": batch(PROMPTS, 505),
    "guests": Batch(
        [PROMPTS[3], *GUESTS],
        [GREEDY | {"max_tokens": 200}, *[GREEDY | {"max_tokens": C - 10}] * len(GUESTS)],
    ),
    "penalties": batch(PROMPTS[:3], 120, repetition_penalty=1.05, frequency_penalty=-0.3),
    "32 tokens": batch(PROMPTS[:3], 32),
    "33 tokens": batch(PROMPTS[:3], 33),
    "min_tokens": batch(PROMPTS[:3], 200, min_tokens=MIN_TOKENS, stop_token_ids=EVEN),
    "below capacity": BELOW,
    "sent": batch([RESENT], 50, frequency_penalty=-0.3),
    "resent": batch([RESENT], 50, frequency_penalty=-0.3),
}
NUMBER = {name: number for number, name in enumerate(BATCHES)}
FORGOTTEN = 2
"""Before this turn of stored streams their pages are lost."""
STORED = [
    replace(
        batch([random_tokens(new, new + index) for index in range(2)], count),
        stored=True,
        forget=turn == FORGOTTEN,
    )
    for turn, (new, count) in enumerate([(201, 60), (33, 90), (5, 50), (12, 70)])
]


@pytest.fixture(scope="module")
def ran(tiny_llama: ModelFactory) -> Ran:
    ran = run_job(tiny_llama(SHAPE), [*BATCHES.values(), *STORED], POLICY, V1, **ENGINE)
    assert (ran.runner, ran.scheduler) == ("StreamingLLMCPUModelRunner", "StreamingLLMScheduler")
    return ran


@pytest.fixture(scope="module")
def oracle(tiny_llama: ModelFactory) -> Oracle:
    return Oracle(tiny_llama(SHAPE))


def test_streams_equal_the_oracle(ran: Ran, oracle: Oracle) -> None:
    """Through evictions with drafts pending, cut at the capacity, accepted and not."""
    results, drafts = ran.batches[NUMBER["streams"]], ran.drafts[NUMBER["streams"]]

    verdict = judge(oracle, POLICY, PROMPTS, results)
    print(verdict, drafts)
    assert verdict.least_evictions >= 10
    assert verdict.least_reanchorings >= 1
    assert drafts.pending >= 30
    assert drafts.accepted >= 100
    assert drafts.verified >= 2 * drafts.accepted
    assert min(len(set(result.tokens)) for result in results) >= 80
    assert ran.num_poisoned > 0


def test_guests_give_way_and_are_computed_again(ran: Ran, oracle: Oracle) -> None:
    """Pages run short while drafts are made: nobody's text changes, whoever is preempted."""
    results, drafts = ran.batches[NUMBER["guests"]], ran.drafts[NUMBER["guests"]]

    assert drafts.preemptions >= 1
    assert judge(oracle, POLICY, [PROMPTS[3]], results[:1]).least_evictions >= 6
    judge(oracle, POLICY, GUESTS, results[1:])


def test_stored_streams_equal_the_oracle(ran: Ran, oracle: Oracle) -> None:
    """Appends go on from the cache, then from survivors, then from the cache, with drafts."""
    first = len(BATCHES)
    answers, told, drafts = ran.batches[first:], ran.told[first:], ran.drafts[first:]

    verdicts = judge_turns(oracle, POLICY, STORED, answers, told)
    print(*verdicts, drafts, sep="\n")
    resumed = [[one.resumed_from for one in turn] for turn in told]
    assert resumed == [[None] * 2, ["cache"] * 2, ["survivors"] * 2, ["cache"] * 2]
    assert all(one.evictions >= 10 for one in answers[-1])
    assert all(one.accepted >= 5 for one in drafts)
    assert sum(one.pending for one in drafts) >= 5
    assert min(len({*one.tokens}) for turn in answers for one in turn) >= 10


def test_penalties_see_what_is_accepted(ran: Ran, oracle: Oracle) -> None:
    """Of drafts that are verified together, each with those before it."""
    adjust = penalties(repetition=1.05, frequency=-0.3)

    results = ran.batches[NUMBER["penalties"]]

    assert judge(oracle, POLICY, PROMPTS[:3], results, adjust=adjust).least_evictions >= 1
    assert ran.drafts[NUMBER["penalties"]].accepted > 0


def test_limits_count_tokens(ran: Ran) -> None:
    """``max_tokens`` is exact, though a step may bring several; ``min_tokens`` forbids drafts."""
    for wanted in (32, 33):
        results = ran.batches[NUMBER[f"{wanted} tokens"]]
        assert [len(one.tokens) for one in results] == [wanted] * 3
    for one in ran.batches[NUMBER["min_tokens"]]:
        *tokens, last = one.tokens
        assert one.evictions >= 1
        assert (one.finish_reason, last % 2) == ("stop", 0)
        assert len(tokens) >= MIN_TOKENS
        assert all(token % 2 for token in tokens)


def test_a_prompt_that_is_cached_but_for_its_last_token(ran: Ran) -> None:
    """vLLM would compute it with padding in place of drafts."""
    (sent,), (resent,) = ran.batches[NUMBER["sent"]], ran.batches[NUMBER["resent"]]

    assert resent.cached_tokens == 64
    assert resent.tokens == sent.tokens
    assert resent.evictions == 1


def test_below_capacity_nothing_differs_from_stock(ran: Ran, tiny_llama: ModelFactory) -> None:
    """The same tokens, and bit for bit the same log-probabilities, from the same drafts."""
    stock = run_job(tiny_llama(SHAPE), [BELOW], None, V1, max_model_len=C + 1, **ENGINE)

    assert (stock.runner, stock.scheduler) == ("CPUModelRunner", "Scheduler")
    assert ran.drafts[NUMBER["below capacity"]].accepted > 0
    assert ran.batches[NUMBER["below capacity"]] == stock.batches[0]


def test_asynchronous_scheduling_is_refused_by_vllm(tiny_llama: ModelFactory) -> None:
    """These drafts are made on the host; ``ngram_gpu`` on V2 is the one that may run ahead."""
    arguments = EngineArgs(
        str(tiny_llama(SHAPE)),
        additional_config=POLICY.additional_config(),
        async_scheduling=True,
        speculative_config=NGRAMS,
    )

    with pytest.raises(ValueError, match=r"[Aa]sync scheduling is (only|not) supported "):
        arguments.create_engine_config()
