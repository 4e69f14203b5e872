"""vLLM's V2 model runner, the default on GPUs, gives the streams of the V1 runner.

One engine per way of scheduling, each in a process of its own (see
``tests/support/runner_engine.py``). Its kernels are interpreted, at some 60 tokens per second, so
streams are short and the cache is small. What both runners must do for CUDA graphs, never to move
the buffers a model reads, is tested on both of them here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ModelFactory
from tests.models import test_models as models
from tests.support.engine import Policy, running_engine
from tests.support.families import FAMILIES
from tests.support.families_hybrid import HYBRIDS
from tests.support.family import Family, write_family
from tests.support.judge import differences, judge, judge_rounded, random_tokens
from tests.support.judge_stored import judge_turns
from tests.support.oracle import Oracle
from tests.support.oracle_hf import HFOracle
from tests.support.positions_seen import PositionsSeen, watch_positions
from tests.support.runner_job import INTERPRETED_V2, Batch, Ran, run_job
from tests.support.tiny_models import EOS, TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(max_positions=128, layers=2)
POLICY = Policy(5, 27, 32)  # C = 64
TABLE_ROWS = 4 * POLICY.capacity  # what a table of 128 rows is lengthened to
PROMPTS = [random_tokens(length, length) for length in (20, 64, 65, 170)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "max_tokens": 150}
SEEDED: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": 7, "max_tokens": 100}
MIN_TOKENS = 70
# Ends a stream as soon as it may end.
EAGER_TO_STOP: dict[str, Any] = GREEDY | {
    "ignore_eos": False,
    "logit_bias": {EOS: 100.0},
    "min_tokens": MIN_TOKENS,
}


NOISE_LENGTHS = [20, 30, 100]
BATCHES = [
    Batch(PROMPTS, [GREEDY] * len(PROMPTS)),
    Batch(PROMPTS[:3], [SEEDED, EAGER_TO_STOP, EAGER_TO_STOP]),
    Batch(PROMPTS[:1], [SEEDED]),
    Batch([random_tokens(length, 1) for length in NOISE_LENGTHS], [SEEDED] * 3, flat=True),
]


def run_v2(model: Path, batches: Sequence[Batch], policy: Policy = POLICY, **job: Any) -> Ran:
    """Run batches on the V2 runner, interpreted, in a process of its own."""
    return run_job(model, batches, policy, INTERPRETED_V2, **job)


def run_family(folder: Path, family: Family, batches: Sequence[Batch], **engine: Any) -> Ran:
    """The same of a row of the table of models."""
    job = {**family.engine, **engine, "torch_convolutions": family.torch_convolutions}
    return run_v2(folder, batches, family.policy, watch=False, **job)


@pytest.fixture(scope="module")
def sync(tiny_llama: ModelFactory) -> Ran:
    return run_v2(tiny_llama(SHAPE), BATCHES)


@pytest.fixture(scope="module")
def oracle(tiny_llama: ModelFactory) -> Oracle:
    return Oracle(tiny_llama(SHAPE))


def test_v2_streams_equal_the_oracle(sync: Ran, oracle: Oracle) -> None:
    """Prompts below, at and beyond the capacity, evictions in prefill and decode, re-anchoring."""
    assert sync.runner == "StreamingLLMCPUModelRunnerV2"
    assert sync.scheduler == "StreamingLLMScheduler"

    verdict = judge(oracle, POLICY, PROMPTS, sync.batches[0])

    print(verdict)
    assert verdict.least_evictions >= 4
    assert sync.batches[0][3].reanchorings >= 1
    assert sync.num_poisoned > 0


def test_v2_async_streams_equal_the_oracle(tiny_llama: ModelFactory, oracle: Oracle) -> None:
    """With asynchronous scheduling a stream drains before it evicts, on this runner too."""
    prompts, params = PROMPTS[1::2], GREEDY | {"max_tokens": 110}
    batch = Batch(prompts, [params] * len(prompts))
    ran = run_v2(tiny_llama(SHAPE), [batch], async_scheduling=True)
    assert ran.runner == "StreamingLLMCPUModelRunnerV2"
    assert ran.scheduler == "StreamingLLMAsyncScheduler"

    verdict = judge(oracle, POLICY, prompts, ran.batches[0])

    assert verdict.least_evictions >= 3
    assert ran.batches[0][1].reanchorings >= 1


def ngrams(method: str) -> dict[str, Any]:
    """Speculation on single tokens: texts of random models repeat little else."""
    return {
        "method": method,
        "num_speculative_tokens": 2,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    }


@pytest.mark.parametrize(
    ("method", "asynchronous", "num_tokens"),
    [
        ("ngram_gpu", True, 50),
        pytest.param("ngram_gpu", True, 500, marks=pytest.mark.slow),
        pytest.param("ngram", False, 500, marks=pytest.mark.slow),
    ],
)
def test_v2_ngrams_equal_the_oracle(
    method: str, asynchronous: bool, num_tokens: int, tiny_llama: ModelFactory, oracle: Oracle
) -> None:
    """Drafts stay on the device, in the place of the request, and outlive its evictions there."""
    long = num_tokens >= 500
    prompts = PROMPTS[1::2] if long else PROMPTS[1:2]
    batch = Batch(prompts, [GREEDY | {"max_tokens": num_tokens}] * len(prompts))

    ran = run_v2(
        tiny_llama(SHAPE),
        [batch],
        watch=False,
        async_scheduling=asynchronous,
        speculative_config=ngrams(method),
    )

    results, drafts = ran.batches[0], ran.drafts[0]
    verdict = judge(oracle, POLICY, prompts, results)
    distinct = [len(set(result.tokens)) for result in results]
    print(verdict, drafts, distinct)
    kind = "Async" if asynchronous else ""
    assert ran.runner == "StreamingLLMCPUModelRunnerV2"
    assert ran.scheduler == f"StreamingLLM{kind}Scheduler"
    assert verdict.least_evictions >= (15 if long else 1)
    assert verdict.least_reanchorings >= long
    assert drafts.pending >= (15 if long else 1)
    assert drafts.accepted >= (50 if long else 3)
    assert min(distinct) >= (100 if long else 20)


STORED = [
    Batch([random_tokens(150, 31), random_tokens(120, 32)], [GREEDY | {"max_tokens": 30}] * 2),
    Batch([random_tokens(80, 33), random_tokens(45, 34)], [GREEDY | {"max_tokens": 60}] * 2),
    Batch([random_tokens(70, 35), random_tokens(92, 36)], [GREEDY | {"max_tokens": 50}] * 2),
    Batch([random_tokens(9, 37), random_tokens(2, 38)], [GREEDY | {"max_tokens": 20}] * 2),
]
FORGOTTEN = 2
"""Before this turn their pages are gone."""


def test_v2_stored_streams_equal_the_oracle(tiny_llama: ModelFactory, oracle: Oracle) -> None:
    """Appends go on from the cache, then from survivors, then from the cache again."""
    turns = [
        replace(turn, stored=True, forget=number == FORGOTTEN) for number, turn in enumerate(STORED)
    ]

    ran = run_v2(tiny_llama(SHAPE), turns, enable_prefix_caching=True)

    verdicts = judge_turns(oracle, POLICY, turns, ran.batches, ran.told)
    print(*verdicts, sep="\n")
    assert ran.runner == "StreamingLLMCPUModelRunnerV2"
    resumed = [[one.resumed_from for one in turn] for turn in ran.told]
    assert resumed == [[None] * 2, ["cache"] * 2, ["survivors"] * 2, ["cache"] * 2]
    assert all(one.evictions >= 5 for one in ran.batches[-1])
    assert max(one.reanchorings for one in ran.batches[1]) >= 1


def test_v2_noise_is_a_function_of_the_stream_position(sync: Ran) -> None:
    """Streams with one seed draw the same noise at the same stream positions, evicted or not.

    With cache positions it would repeat every ``g`` tokens.
    """
    streams = sync.batches[3]
    assert all(stream.evictions >= 2 for stream in streams)

    at = [
        dict(enumerate(stream.tokens, start=length))
        for length, stream in zip(NOISE_LENGTHS, streams, strict=True)
    ]

    for one, other in ((0, 1), (1, 2)):
        shared = at[one].keys() & at[other].keys()
        assert len(shared) >= 20
        assert all(at[one][position] == at[other][position] for position in shared)
    tokens = streams[0].tokens
    repeated = sum(a == b for a, b in zip(tokens, tokens[POLICY.g :], strict=False))
    assert repeated <= 5


def test_v2_seeded_streams_are_reproducible(sync: Ran) -> None:
    """A seeded stream is the same in a batch and alone."""
    in_batch, (alone,) = sync.batches[1][0], sync.batches[2]
    assert alone.evictions >= 1

    assert in_batch.tokens == alone.tokens
    assert in_batch.tokens != sync.batches[0][0].tokens[: len(alone.tokens)]  # not greedy


def test_v2_min_tokens_counts_evicted_tokens(sync: Ran) -> None:
    """A stream that wants to stop does so right after ``min_tokens``, evicted outputs included."""
    for stream in sync.batches[1][1:]:
        assert stream.evictions >= 2
        assert stream.finish_reason == "stop"
        assert len(stream.tokens) == MIN_TOKENS + 1
        assert stream.tokens[-1] == EOS


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_v2_family_streams_exactly(family: Family, tmp_path: Path) -> None:
    """What every family is held to on V1 (``tests.models.test_models``), on this runner."""
    folder = write_family(tmp_path, family)
    batch = Batch(models.PROMPTS, [GREEDY | {"max_tokens": family.tokens}] * 2)

    ran = run_family(folder, family, [batch])

    verdict = models.judge_family(family, HFOracle(folder), ran.batches[0])
    print(family.name, verdict)
    assert ran.runner == "StreamingLLMCPUModelRunnerV2"
    models.check(family, verdict, ran.batches[0], ran.model, ran.still)


@pytest.mark.parametrize("family", [models.case_of(one, engine=False) for one in HYBRIDS])
def test_v2_goes_on_from_cached_states(family: Family, tmp_path: Path) -> None:
    """Recurrent layers with a prefix cache, steps that run ahead and chunks smaller than a page:
    streams whose states are copied at every page end, and one that is sent again and goes on from
    such a copy."""
    capacity, folder = family.policy.capacity, write_family(tmp_path, family)
    sent, more = random_tokens(2 * capacity + 10, 1), random_tokens(40, 2)
    prompts = [[sent, random_tokens(20, 3)], [sent + more, random_tokens(30, 4)]]
    params = GREEDY | {"max_tokens": capacity - 18}

    batches = [Batch(one, [params] * 2) for one in prompts]
    ran = run_family(
        folder,
        family,
        batches,
        async_scheduling=True,
        enable_prefix_caching=True,
        max_num_batched_tokens=48,
    )

    assert ran.runner == "StreamingLLMCPUModelRunnerV2"
    assert ran.scheduler == "StreamingLLMAsyncScheduler"
    oracle = HFOracle(folder)
    (begun, _), (resumed, other) = ran.batches
    assert begun.evictions >= 3
    assert other.evictions >= 1
    assert (begun.cached_tokens, other.cached_tokens) == (0, 0)
    assert capacity < resumed.cached_tokens < len(sent)
    if family.dtype == "float32":
        for one, results in zip(prompts, ran.batches, strict=True):
            print(family.name, judge(oracle, family.policy, one, results))
    else:
        whole = differences(oracle, family.policy, prompts[0], ran.batches[0])
        print(judge_rounded(oracle, family.policy, prompts[1], ran.batches[1], whole))


def test_v2_self_test_goes_through_the_graphs_of_decode_steps(sync: Ran) -> None:
    """Every second step of it may replay one, so offsets are proved to reach both kinds of graph.

    Nothing is captured on a CPU; that V2 would replay one here is its own decision.
    """
    steps = sync.self_test_graphs

    assert len(steps) >= 8
    assert steps == [False, True] * (len(steps) // 2)


def test_v2_model_reads_one_buffer(sync: Ran) -> None:
    """Positions and rotary table stay where they were at start-up; rope positions go on."""
    check_addresses(sync.positions)


def test_v1_model_reads_one_buffer(tiny_llama: ModelFactory, oracle: Oracle) -> None:
    """The same on the V1 runner."""
    with running_engine(tiny_llama(SHAPE), POLICY, max_num_batched_tokens=100) as engine:
        buffer = engine.runner.positions.data_ptr()
        seen = watch_positions(engine.runner)
        results = engine.greedy(PROMPTS, 150)

        assert engine.runner.positions.data_ptr() == buffer
        assert seen.addresses == [buffer]
    judge(oracle, POLICY, PROMPTS, results)
    check_addresses(seen)


def check_addresses(seen: PositionsSeen) -> None:
    assert seen.passes > 100
    assert len(seen.addresses) == 1
    assert len(seen.tables) == 1
    # Far beyond the capacity, and never beyond the table.
    assert TABLE_ROWS - POLICY.g <= seen.largest < TABLE_ROWS
