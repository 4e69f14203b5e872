"""Until the first eviction, and always with the policy off, vLLM behaves like stock vLLM."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tests.conftest import ModelFactory
from tests.support.engine import Generated, Policy, greedy_params, running_engine
from tests.support.judge import random_tokens
from tests.support.paths import ROOT
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.engine

SHAPE = TinyLlama(heads=4, kv_heads=2, layers=3, max_positions=384)
POLICY = Policy(5, 155, 32)  # C = 192
PROMPTS = [random_tokens(length, length) for length in (1, 33, 64, 100, 128)]
NUM_TOKENS = 65  # the last of the longest request is sampled with exactly C tokens cached
ENGINE: dict[str, Any] = {"max_num_batched_tokens": 100, "enable_prefix_caching": True}

STOCK = """
import json, sys
from pathlib import Path
from tests.support.engine import greedy_params, running_engine
from tests.end_to_end.test_below_capacity import ENGINE, NUM_TOKENS, PROMPTS
with running_engine(Path(sys.argv[1]), None, guarded=False, max_model_len=193, **ENGINE) as engine:
    import vllm.plugins
    assert not any(name.startswith("sink_vllm") for name in sys.modules), "not stock"
    results = engine.greedy(PROMPTS, NUM_TOKENS) + engine.greedy(PROMPTS[::-1], NUM_TOKENS)
Path(sys.argv[2]).write_text(json.dumps([[r.tokens, r.logprobs] for r in results]))
"""


def as_lists(results: list[Generated]) -> list[Any]:
    return [[result.tokens, result.logprobs] for result in results]


@pytest.fixture(scope="module")
def stock(tiny_llama: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Tokens and log-probabilities of vLLM in a process that never loads the plugin."""
    answer = tmp_path_factory.mktemp("stock") / "answer.json"
    subprocess.run(
        [sys.executable, "-c", STOCK, str(tiny_llama(SHAPE)), str(answer)],
        check=True,
        env=os.environ | {"VLLM_PLUGINS": "", "PYTHONPATH": os.getcwd()},
        cwd=ROOT,
    )
    result: list[Any] = json.loads(answer.read_text())
    return result


def test_below_capacity_nothing_differs_from_stock(
    tiny_llama: ModelFactory, stock: list[Any]
) -> None:
    """Invariant 2: same tokens and bit for bit the same log-probabilities up to ``C`` tokens."""
    with running_engine(tiny_llama(SHAPE), POLICY, **ENGINE) as engine:
        results = engine.greedy(PROMPTS, NUM_TOKENS) + engine.greedy(PROMPTS[::-1], NUM_TOKENS)
        beyond = engine.greedy([PROMPTS[-1]], NUM_TOKENS + 1)

    assert as_lists(results) == stock
    assert not any(result.evictions for result in results)
    assert beyond[0].evictions == 1  # one token more and the policy acts


@pytest.mark.parametrize("config", [{}, {"kv_policy": "full"}], ids=["absent", "full"])
def test_with_the_policy_off_nothing_differs_from_stock(
    config: dict[str, Any], tiny_llama: ModelFactory, stock: list[Any]
) -> None:
    """Invariant 2: vLLM's own classes run, give the same output and keep their length limit."""
    with running_engine(
        tiny_llama(SHAPE), None, additional_config=config, max_model_len=193, **ENGINE
    ) as engine:
        assert type(engine.scheduler) is Scheduler
        assert type(engine.manager) is FullAttentionManager
        assert type(engine.runner) is CPUModelRunner
        results = engine.greedy(PROMPTS, NUM_TOKENS) + engine.greedy(PROMPTS[::-1], NUM_TOKENS)
        with pytest.raises(VLLMValidationError, match="193"):
            engine.generate([random_tokens(200, 0)], greedy_params(1))
        (capped,) = engine.greedy([PROMPTS[-1]], 400)

    assert as_lists(results) == stock
    assert (len(capped.tokens), capped.finish_reason) == (193 - 128, "length")
