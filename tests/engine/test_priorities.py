"""Priorities and places keep their meaning although streams never end by length."""

import pytest

from tests.conftest import ModelFactory
from tests.support.engine import Generated, Policy, check_all_free, greedy_params, running_engine
from tests.support.judge import random_tokens
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

POLICY = Policy(5, 59, 32)  # C = 96


def test_priorities_decide_who_runs_first(tiny_llama: ModelFactory) -> None:
    """With one place, requests run in the order of their priorities, each to its end."""
    prompts = [random_tokens(length, length) for length in (7, 96, 250)]
    with running_engine(
        tiny_llama(TinyLlama(max_positions=256)),
        POLICY,
        max_num_seqs=1,
        scheduling_policy="priority",
    ) as engine:
        running: list[str] = []
        engine.after_step.append(
            lambda: running.extend(request.request_id for request in engine.scheduler.running)
        )
        outputs = engine.generate(prompts, greedy_params(200), priority=[2, 0, 1])
        check_all_free(engine)

    order = [request_id for i, request_id in enumerate(running) if request_id not in running[:i]]
    assert [request_id.split("-")[0] for request_id in order] == [
        outputs[i].request_id for i in (1, 2, 0)
    ]
    assert all(Generated.of(output).evictions >= 3 for output in outputs)
