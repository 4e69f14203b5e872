"""``--sink-prompt truncate``: a long prompt is resumed where it was streamed, else cut."""

from dataclasses import replace

import pytest

from tests.conftest import ModelFactory
from tests.support.engine import Generated, Policy, check_all_free, running_engine
from tests.support.judge import judge, random_tokens
from tests.support.oracle import Oracle
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=2, max_positions=256, seed=1)


@pytest.mark.parametrize("S", [4, 40])
def test_a_conversation_goes_on_where_it_was_streamed_and_is_cut_elsewhere(
    S: int, tiny_llama: ModelFactory
) -> None:
    """Cached pages know of evicted text, so they are used where there are any."""
    truncate = Policy(S, 128 - 32 - S, 32, "truncate")
    stream = replace(truncate, prompt="stream")
    folder = tiny_llama(SHAPE)
    oracle = Oracle(folder)
    conversation = random_tokens(60, 1)
    with running_engine(folder, truncate, enable_prefix_caching=True) as engine:

        def answer(policy: Policy) -> Generated:
            """The answer to the conversation, by the schedule of ``policy``, twice the same."""
            (first,) = engine.greedy([conversation], 170)
            verdict = judge(oracle, policy, [conversation], [first])
            assert verdict.least_evictions >= 4
            (again,) = engine.greedy([conversation], 40)
            assert again.tokens == first.tokens[:40]
            return first

        for turn in range(3):
            streamed = answer(stream)
            assert streamed.cached_tokens > (truncate.capacity if turn else -1)
            conversation = conversation + streamed.tokens + random_tokens(25, turn)
        engine.llm.reset_prefix_cache()
        for turn in range(3, 6):  # what was cut once is not taken for streamed
            cut = answer(truncate)
            assert cut.cached_tokens <= truncate.capacity
            conversation = conversation + cut.tokens + random_tokens(25, turn)
        check_all_free(engine)
