"""A server over a group of Ray workers, one of which is killed: its health check tells."""

import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from examples.processes import titled
from examples.ray_serve.local import local_cluster
from tests.conftest import ModelFactory
from tests.support.serving import Client, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,  # a server with two workers
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for each of two workers"),
]
FLAGS = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'sink-vllm[ray]')")
    with local_cluster(nodes=2) as address:
        yield address


def workers() -> list[psutil.Process]:
    """The workers' Ray actors, which are below the nodes that this process started."""
    return titled("CPURayWorkerProc")


def test_health_tells_that_a_worker_is_dead(
    tiny_llama: ModelFactory, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stream in flight and health check end within a minute; a supervisor knows what to do."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    with tiny_server(tiny_llama(TinyLlama()), *FLAGS) as server:
        server.wait(lambda waited: None)
        client = Client(server)
        answer: dict[str, Any] = client.complete(prompt="a", max_tokens=4)
        assert answer["usage"]["completion_tokens"] == 4
        stream = client.chunks("/v1/completions", prompt="b", max_tokens=100_000)
        next(stream)

        workers()[-1].kill()
        killed = time.monotonic()
        with pytest.raises((AssertionError, httpx.HTTPError)):
            _read_to_the_end(stream)
        while server.healthy():
            assert time.monotonic() - killed < 60
            time.sleep(0.2)


def _read_to_the_end(stream: Iterator[dict[str, Any]]) -> None:
    """Raise AssertionError for an error in the stream or an end without a reason."""
    reason = None
    for chunk in stream:
        assert "error" not in chunk, chunk
        reason = chunk["choices"][0]["finish_reason"] if chunk["choices"] else reason
    assert reason == "length"
