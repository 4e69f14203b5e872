"""Heads split over two workers: pages are moved and rotated in each of them alike."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ModelFactory
from tests.judge import random_tokens
from tests.oracle import Oracle
from tests.tiny_models import TinyLlama
from tests.tp_engine import ENVIRONMENT

S, W, G = 5, 27, 32


@pytest.mark.slow  # two workers on two cores, a minute
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for each of two workers")
def test_two_workers_equal_the_oracle(tiny_llama: ModelFactory) -> None:
    """Two tensor-parallel workers make the oracle's tokens, evictions and re-anchoring included."""
    model = tiny_llama(TinyLlama())
    prompts = [random_tokens(length, length) for length in (20, 64, 65, 170)]
    job = {
        "model": str(model),
        "policy": {
            "kv_policy": "sink",
            "sink_tokens": S,
            "sink_window": W,
            "sink_stride": G,
        },
        "prompts": prompts,
        "num_tokens": 300,
    }

    done = subprocess.run(
        [sys.executable, "-m", "tests.tp_engine"],
        input=json.dumps(job),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    streams = json.loads(done.stdout.splitlines()[-1])
    wanted = Oracle(model).run(prompts, S, W, G, 300)
    assert [stream["tokens"] for stream in streams] == [one.tokens for one in wanted]
    reports = [stream["report"]["streaming_llm"] for stream in streams]
    assert all(report["evictions"] >= 8 for report in reports)
    assert any(report["rope_reanchorings"] for report in reports)
