"""``--data-parallel-size``: every turn of a stream goes to the engine that has its pages."""

from collections.abc import Iterator
from typing import Any

import pytest

from examples.serving import Metrics, Server
from examples.streams_client import StreamsClient
from sink_vllm.server.streams.handler import engine_of
from tests.conftest import ModelFactory
from tests.support.serving import CAPACITY, Client, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

# Slow: two engines start one after the other.
pytestmark = [pytest.mark.server, pytest.mark.slow]

ENGINES = 2
GENERATE = {"temperature": 0, "ignore_eos": True, "max_tokens": 10}


@pytest.fixture(scope="module")
def server(tiny_llama: ModelFactory) -> Iterator[Server]:
    flags = ("--data-parallel-size", f"{ENGINES}", "--enable-prompt-tokens-details")
    with tiny_server(
        tiny_llama(TinyLlama()), *flags, environment={"VLLM_PLUGINS": "sink_vllm"}
    ) as server:
        server.wait(lambda _waited: None)
        yield server


def _turn(server: Server, stream_id: str, tokens: list[int], **headers: str) -> dict[str, Any]:
    body = {"tokens": tokens, "generate": GENERATE, "return_token_ids": True}
    path = f"/v1/streams/{stream_id}/append"
    answer = Client(server).http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def _computed(server: Server) -> dict[str, float]:
    """Tokens computed by each engine."""
    return {
        sample.labels["engine"]: sample.value
        for family in Metrics.read(server.url).families
        for sample in family.samples
        if sample.name == "vllm:prompt_tokens_total"
    }


def test_a_stream_stays_where_its_pages_are(server: Server) -> None:
    """Streams of both engines resume from the cache, through evictions, as one prompt would."""
    streams = StreamsClient(server.url)
    ids = [streams.create() for _ in range(6)]
    while len({engine_of(one, ENGINES) for one in ids}) < ENGINES:
        ids.append(streams.create())
    before = _computed(server)
    texts: dict[str, list[int]] = {one: [] for one in ids}
    last: dict[str, list[int]] = {}
    for turn in range(6):
        for number, one in enumerate(ids):
            new = prompt_of(40, salt=3 + 2 * turn + 20 * number)
            answer = _turn(server, one, new)
            assert answer["usage"]["resumed_from"] == ("cache" if turn else None)
            last[one] = answer["token_ids"]
            texts[one] += [*new, *last[one]]

    after = _computed(server)
    assert len(after) == ENGINES
    assert all(after[engine] > before[engine] for engine in after), "one engine did nothing"
    client = Client(server)
    for one in ids:
        info = streams.get(one)
        assert info["evicted"] > 0
        assert info["position"] == len(texts[one]) > CAPACITY + 100
        (choice,) = client.complete(
            prompt=texts[one][:-10], max_tokens=10, return_token_ids=True, cache_salt=one
        )["choices"]
        assert choice["token_ids"] == last[one]


def test_a_header_sends_a_turn_elsewhere(server: Server) -> None:
    """There its pages are not, so it goes on from its survivors; and then from what is there."""
    one = StreamsClient(server.url).create(cache_salt="its own")
    for turn in range(6):
        _turn(server, one, prompt_of(40, salt=5 + 2 * turn))
    other = {"X-data-parallel-rank": f"{1 - engine_of(one, ENGINES)}"}
    answers = [_turn(server, one, prompt_of(40, salt=21 + 2 * turn), **other) for turn in range(2)]
    assert [answer["usage"]["resumed_from"] for answer in answers] == ["survivors", "cache"]
