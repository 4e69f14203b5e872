"""A model split over two workers: pages are moved and rotated in each of them alike.

Heads are split by tensor parallelism, layers by pipeline parallelism. vLLM's own two executors
start the workers: as child processes, or as actors on the nodes of a Ray cluster.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from operator import ge
from pathlib import Path
from typing import Any

import pytest

from examples.ray_serve.local import local_cluster
from tests.conftest import ModelFactory
from tests.support.judge import random_tokens
from tests.support.oracle import Oracle, OracleResult
from tests.support.tiny_models import TinyLlama
from tests.support.tp_engine import ENVIRONMENT

S, W, G = 5, 27, 32
NUM_TOKENS = 540
PROMPTS = [random_tokens(length, length) for length in (20, 64, 65, 170)]
TENSOR_PARALLEL = {"tensor_parallel_size": 2}
PIPELINE_PARALLEL = {"pipeline_parallel_size": 2}
RAY = {"distributed_executor_backend": "ray"}

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one core for each of two workers"
)


@pytest.fixture(scope="module")
def model(tiny_llama: ModelFactory) -> Path:
    return tiny_llama(TinyLlama())


@pytest.fixture(scope="module")
def expected(model: Path) -> list[OracleResult]:
    return Oracle(model).run(PROMPTS, S, W, G, NUM_TOKENS)


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A cluster of two nodes, so that the two workers are on different ones."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'sink-vllm[ray]')")
    with local_cluster(nodes=2) as address:
        yield address


def run(model: Path, folder: Path, *, address: str = "", **job: Any) -> dict[str, Any]:
    """The result of ``tests.support.tp_engine`` for the model and the policy of this module."""
    policy = {"kv_policy": "sink", "sink_tokens": S, "sink_window": W, "sink_stride": G}
    policy |= job.pop("places", {})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tp_engine", str(folder / "result.json")],
        input=json.dumps(
            {
                "model": str(model),
                "policy": policy,
                "prompts": PROMPTS,
                "num_tokens": NUM_TOKENS,
                **job,
            }
        ),
        env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def check_streams(streams: list[dict[str, Any]], expected: list[OracleResult]) -> None:
    assert [stream["tokens"] for stream in streams] == [one.tokens for one in expected]
    reports = [stream["report"]["streaming_llm"] for stream in streams]
    assert [report["evictions"] for report in reports] == [one.evictions for one in expected]
    assert min(report["evictions"] for report in reports) >= 10
    assert any(report["rope_reanchorings"] for report in reports)


@pytest.mark.slow  # two workers on two cores, more than a minute each
@pytest.mark.parametrize("split", [TENSOR_PARALLEL, PIPELINE_PARALLEL], ids=["TP2", "PP2"])
def test_two_workers_equal_the_oracle(
    model: Path, expected: list[OracleResult], tmp_path: Path, split: dict[str, int]
) -> None:
    """Two child processes make the oracle's tokens, evictions and re-anchoring included."""
    result = run(model, tmp_path, engine=split)

    check_streams(result["streams"], expected)


TURNS = 4
TALKS = [
    [random_tokens(60 + 90 * (turn == 0), TURNS * turn + number) for turn in range(TURNS)]
    for number in range(3)
]
ONE_STREAM = 6
"""Pages of a pool for one conversation, and vLLM's null page."""


def places(place: str, folder: Path) -> dict[str, Any]:
    """Options that keep pages in host memory, or in files behind room for one conversation."""
    shape = TinyLlama()
    page = 32 * 2 * shape.kv_heads * shape.head_size * 4 * shape.layers
    options: dict[str, dict[str, Any]] = {
        "nowhere": {},
        "host": {"sink_host_gib": 0.05},
        "disk": {
            "sink_host_gib": 2 * ONE_STREAM * page / 2**30,
            "sink_disk": str(folder),
            "sink_disk_gib": 1,
        },
    }
    return options[place]


@pytest.mark.slow  # two workers on two cores, a minute each
@pytest.mark.parametrize("place", ["nowhere", "host", "disk"])
def test_two_workers_bring_pages_back(model: Path, tmp_path: Path, place: str) -> None:
    """Each its own heads of a page, where there is a place for them beside the pool."""
    pages = tmp_path / "pages"
    pool = {"enable_prefix_caching": True, "num_gpu_blocks_override": ONE_STREAM}
    engine = TENSOR_PARALLEL | pool
    job: dict[str, Any] = {"prompts": [], "num_tokens": 40, "talks": TALKS}

    talks = run(model, tmp_path, engine=engine, places=places(place, pages), **job)["talks"]

    oracle = Oracle(model)
    for talk in talks:
        for turn in talk:
            (expected,) = oracle.run([turn["prompt"]], S, W, G, 40)
            assert turn["tokens"] == expected.tokens
        assert expected.evictions >= 10
        found = [turn["cached"] for turn in talk[1:]]
        least = [len(turn["prompt"]) - 60 - 1 - 2 * G for turn in talk[1:]]
        assert found == [0] * len(found) if place == "nowhere" else all(map(ge, found, least))
    assert bool(list(pages.glob("engine-0/pages/*/*.page"))) == (place == "disk")


@pytest.mark.ray
def test_two_ray_workers_equal_the_oracle(
    model: Path, expected: list[OracleResult], tmp_path: Path, ray_address: str
) -> None:
    """TP2 on two Ray nodes makes the oracle's tokens; a worker killed ends the engine."""
    result = run(
        model,
        tmp_path,
        address=ray_address,
        engine=TENSOR_PARALLEL | RAY,
        kill_a_worker=True,
    )

    check_streams(result["streams"], expected)
    assert result["death"]["error"] == "EngineDeadError"
    assert result["death"]["seconds"] < 60


@pytest.mark.ray
@pytest.mark.slow  # a second engine over Ray
def test_two_ray_pipeline_stages_equal_the_oracle(
    model: Path, expected: list[OracleResult], tmp_path: Path, ray_address: str
) -> None:
    """PP2 on two Ray nodes makes the oracle's tokens."""
    result = run(model, tmp_path, address=ray_address, engine=PIPELINE_PARALLEL | RAY)

    check_streams(result["streams"], expected)
