"""xformers says which keys a query may see; the schedule and the engine agree with it."""

import itertools

import pytest

pytest.importorskip("xformers", reason="the extra `xformers` is not installed")

from sink_vllm.policy.schedule import Schedule
from tests.conftest import ModelFactory
from tests.support.engine import Policy, running_engine
from tests.support.judge import TOLERANCE, random_tokens
from tests.support.oracle import Oracle
from tests.support.oracle_dense import DenseOracle, spans_of
from tests.support.tiny_models import LLAMA3_ROPE, TinyLlama


@pytest.mark.parametrize(("S", "W", "g"), [*itertools.product((0, 1, 4, 5), (1, 3, 8), (1, 2, 4))])
def test_keys_a_query_sees(S: int, W: int, g: int) -> None:
    n = S + W + 6 * g
    spans = spans_of(n, S, W, g)
    schedule = Schedule(sink_tokens=S, window=W, stride=g)

    for query in range(n):
        evicted = schedule.evictions(query + 1) * g
        assert spans.seen_by(query) == [*range(min(S, query + 1)), *range(S + evicted, query + 1)]
    assert spans.evictions == schedule.evictions(n) == 5


def test_dense_and_token_by_token_agree(tiny_llama: ModelFactory) -> None:
    """Two judges that share the model's weights and nothing of how a stream is run."""
    folder = tiny_llama(TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=128))
    prompt = random_tokens(150, seed=1)

    one = Oracle(folder).run([prompt], 4, 20, 16, 80)[0]
    text = [*prompt, *one.tokens]
    spans = spans_of(len(text) - 1, 4, 20, 16)
    logprobs = DenseOracle(folder).logprobs(text[:-1], spans)

    assert spans.evictions == one.evictions >= 2
    behind = range(len(prompt) - 1, len(text) - 1)
    assert [float(logprobs[at, text[at + 1]]) for at in behind] == pytest.approx(
        one.logprobs, abs=2e-5
    )


@pytest.mark.engine
def test_engine_sees_what_xformers_allows(tiny_llama: ModelFactory) -> None:
    """Greedy streams of the engine, judged in one dense pass each."""
    rope = LLAMA3_ROPE
    folder = tiny_llama(TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=128, rope=rope))
    policy = Policy(4, 28, 32)
    prompts = [random_tokens(length, seed=length) for length in (5, 150)]

    with running_engine(folder, policy, max_num_batched_tokens=100) as engine:
        generated = engine.greedy(prompts, 500)

    judge = DenseOracle(folder)
    for prompt, result in zip(prompts, generated, strict=True):
        text = [*prompt, *result.tokens]
        spans = spans_of(len(text) - 1, policy.S, policy.W, policy.g)
        logprobs = judge.logprobs(text[:-1], spans)[len(prompt) - 1 :]
        assert spans.evictions == result.evictions >= 10
        assert result.reanchorings >= 1
        for index, token in enumerate(result.tokens):
            assert float(logprobs[index].max() - logprobs[index, token]) <= TOLERANCE
            assert abs(float(logprobs[index, token]) - result.logprobs[index]) <= TOLERANCE
