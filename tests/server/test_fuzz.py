"""Requests made up from the server's own OpenAPI schema: anything but an internal error.

Needs schemathesis (``make fuzz``); it runs as a program of its own, so that it shares nothing with
the tests. Routes of stock vLLM take the policy's options in ``vllm_xargs``, of which the schema
says only that they are numbers, texts or lists; those are made up here, by seed.
"""

import importlib.util
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sink_vllm.policy.request_options import REQUEST_KEYS
from tests.conftest import ModelFactory
from tests.support.serving import CAPACITY, Client, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = [pytest.mark.server, pytest.mark.slow]

_CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance")
_LEAST_CASES = 300


@pytest.fixture(scope="module")
def client(tiny_llama: ModelFactory) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "sink_vllm")
        server = tiny_server(tiny_llama(TinyLlama()), "--sink-streams", "20")
        with server:
            server.wait(lambda _: None)
            client = Client(server)
            yield client
            client.wait_idle()


def test_streams(client: Client, tmp_path: Path) -> None:
    """All routes of ``/v1/streams``, alone and one after the other."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed; use `make fuzz`")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.server.url}/openapi.json"]
    options = ["--include-path-regex", "^/v1/streams", "--checks", ",".join(_CHECKS)]
    limits = ["--max-examples", "60", "--request-timeout", "120", "--seed", "1"]

    done = subprocess.run(
        [*command, *options, *limits], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None
    assert int(found[1]) >= _LEAST_CASES
    assert client.http.get("/health").status_code == 200


def _value(rng: random.Random) -> Any:
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice((-1, 0, 1, 4, CAPACITY, 2**31, 2**63, -(2**70))),
        lambda: rng.choice(("full", "sink", "system", "none", "", "4", "\x00", "ⅸ" * 50)),
        lambda: rng.choice((0.5, -0.0, 4.0, 1e300)),
        lambda: rng.choice(([], [1, 2], ["full"], [[]])),
        lambda: rng.choice((None, True, False, {}, {"a": 1})),
    )
    return rng.choice(kinds)()


@pytest.mark.parametrize("seed", range(4))
def test_options_of_requests(client: Client, seed: int) -> None:
    """Known and misspelt keys with values of every kind, on both of vLLM's routes."""
    rng = random.Random(seed)
    statuses = set()
    for _ in range(60):
        keys = rng.sample((*REQUEST_KEYS, "sink_token", "kv-policy"), rng.randint(1, 3))
        xargs = {key: _value(rng) for key in keys}
        body: dict[str, Any] = {"max_tokens": rng.choice((1, 3, 40)), "vllm_xargs": xargs}
        if rng.random() < 0.5:
            answer = client.post("/v1/completions", prompt=[1] * rng.choice((1, 50, 300)), **body)
        else:
            messages = [{"role": "user", "content": "x" * rng.choice((1, 50, 300))}]
            answer = client.post("/v1/chat/completions", messages=messages, **body)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 422), (xargs, answer.status_code, answer.text)

    assert {200, 400} <= statuses
