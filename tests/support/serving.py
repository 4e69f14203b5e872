"""A client for tests that talk to a real `vllm serve`."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.serving import Server, ServerError
from sink_vllm.policy.schedule import Schedule

SCHEDULE = Schedule(sink_tokens=4, window=92, stride=32)
CAPACITY = SCHEDULE.capacity
FLAGS = ["--kv-policy", "sink", "--sink-tokens", "4", "--sink-window", "92", "--sink-stride", "32"]
MODEL = "tiny"
# Greedy, without the end-of-text token: the same tokens for every way of asking.
GREEDY = {"model": MODEL, "temperature": 0, "ignore_eos": True}


def tiny_server(model: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Server:
    """`vllm serve` with a tiny model, a small pool and the policy of ``FLAGS``."""
    engine = ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    limits = ["--max-num-seqs", "8", "--num-gpu-blocks-override", "96"]
    served = [str(model), "--served-model-name", MODEL]
    return Server([*served, *engine, *limits, *FLAGS, *flags], environment)


def refused_start(server: Server) -> str:
    """The sentence with which a start ends, before an engine loads and without a traceback."""
    with pytest.raises(ServerError, match="exit code 1"), server:
        server.wait(lambda _waited: None)
    log = server.log.read_text()
    server.log.unlink()
    assert "Traceback" not in log
    assert "EngineCore" not in log
    return log.rstrip().splitlines()[-1]


def prompt_of(num_tokens: int, salt: int = 7) -> list[int]:
    """Token ids of a prompt: BOS and bytes; another odd ``salt`` shares no pages with it."""
    return [256, *(97 + salt * i % 26 for i in range(1, num_tokens))]


def evicted(prompt_len: int, output_len: int) -> int:
    """Tokens evicted by the time the last output token was sampled (it is not computed itself)."""
    return SCHEDULE.evicted(prompt_len + output_len - 1)


class Client:
    """Requests to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        # A connection per request: kept ones may be closed by the server just when they are used.
        no_reuse = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=server.url, timeout=300, limits=no_reuse)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json={**GREEDY, **body})

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request that must succeed."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed

    def complete(self, **body: Any) -> dict[str, Any]:
        return self.ask("/v1/completions", **body)

    def chunks(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer; closing the iterator disconnects."""
        request = {**GREEDY, "stream": True, **body}
        with self.http.stream("POST", path, json=request) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def counter(self, name: str) -> float:
        return self.server.metrics().total(name)

    def wait_idle(self, limit: float = 60) -> None:
        """Until no request is left and no KV page is held.

        Raises:
            AssertionError: naming what is left after ``limit`` seconds.
        """
        deadline = time.monotonic() + limit
        while True:
            metrics = self.server.metrics()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            left = {name: metrics.total(f"vllm:{name}") for name in names}
            if not any(left.values()):
                return
            assert time.monotonic() < deadline, left
            time.sleep(0.2)


def report(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The account of evictions in an answer or a chunk."""
    found: dict[str, Any] | None = (answer.get("kv_transfer_params") or {}).get("streaming_llm")
    return found
