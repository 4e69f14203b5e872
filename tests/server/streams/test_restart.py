"""A server killed in the middle of turns loses none of its streams (``--sink-streams-db``)."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.serving import Server
from tests.conftest import ModelFactory
from tests.support.serving import CAPACITY, SCHEDULE, Client, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

PLUGINS = {"VLLM_PLUGINS": "sink_vllm"}
GENERATE = {"temperature": 0, "ignore_eos": True}


class _Streams:
    def __init__(self, server: Server) -> None:
        server.wait(lambda _waited: None)
        self.client = Client(server)
        self.http = self.client.http

    def create(self, **body: Any) -> str:
        answer = self.http.post("/v1/streams", json=body)
        assert answer.status_code == 201, answer.text
        stream_id: str = answer.json()["id"]
        return stream_id

    def generate(self, stream_id: str, tokens: list[int], count: int) -> dict[str, Any]:
        generate = {**GENERATE, "max_tokens": count}
        body = {"tokens": tokens, "generate": generate, "return_token_ids": True}
        answer = self.http.post(f"/v1/streams/{stream_id}/append", json=body)
        assert answer.status_code == 200, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed

    def info(self, stream_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/streams/{stream_id}")
        assert answer.status_code == 200, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed

    def events(self, stream_id: str) -> Iterator[str]:
        body = {"generate": {**GENERATE, "max_tokens": 100_000}, "stream": True}
        path = f"/v1/streams/{stream_id}/append"
        with self.http.stream("POST", path, json=body) as answer:
            yield from answer.iter_lines()

    def complete(self, tokens: list[int], count: int, **body: Any) -> list[int]:
        body = {"prompt": tokens, "max_tokens": count, "return_token_ids": True, **body}
        (choice,) = self.client.complete(**body)["choices"]
        found: list[int] = choice["token_ids"]
        return found


def test_killed_in_mid_turn(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    """Young streams go on exactly, old ones from their survivors, each as before its turn."""
    model, database = tiny_llama(TinyLlama()), tmp_path / "streams.db"
    flags = ("--sink-streams-db", str(database))
    texts: dict[str, list[int]] = {}
    with tiny_server(model, *flags, environment=PLUGINS) as server:
        streams = _Streams(server)
        for salt, turns in ((3, 1), (5, 2), (7, 8), (9, 9)):
            stream_id, text = streams.create(), list[int]()
            for turn in range(turns):
                new = prompt_of(40, salt=salt + 2 * turn)
                answer = streams.generate(stream_id, new, 10)
                text += [*new, *answer["token_ids"]]
            texts[stream_id] = text
        waiting = streams.create(messages=[{"role": "user", "content": "Hello"}])
        busy = [streams.events(stream_id) for stream_id in (*list(texts)[1::2],)]
        for events in busy:
            assert next(events).startswith("data: ")
        assert streams.info(list(texts)[1])["busy"]
        assert server._process is not None
        os.killpg(server._process.pid, signal.SIGKILL)
        server._process.wait(30)
        for events in busy:
            with pytest.raises(httpx.HTTPError):
                list(events)

    with tiny_server(model, *flags, environment=PLUGINS) as server:
        streams = _Streams(server)
        assert streams.info(waiting)["pending_messages"] == 1
        for stream_id, text in texts.items():
            info = streams.info(stream_id)
            assert (info["position"], info["busy"]) == (len(text), False)
            assert info["evicted"] == SCHEDULE.evicted(len(text) - 1)
            evicted = len(text) > CAPACITY + 2 * SCHEDULE.stride
            answer = streams.generate(stream_id, [65, 66], 12)
            prompt = text
            if evicted:
                prompt = [text[p] for p in SCHEDULE.cached_positions(len(text))]
            expected = streams.complete([*prompt, 65, 66], 12, cache_salt=stream_id)
            assert answer["token_ids"] == expected
            usage = answer["usage"]
            assert usage["resumed_from"] == ("survivors" if evicted else None)
            assert usage["computed_tokens"] == len(prompt) + 2
            assert usage["cached_tokens"] == 0
            # And from there on exactly.
            again = streams.generate(stream_id, [67], 12)
            whole = [*prompt, 65, 66, *answer["token_ids"], 67]
            assert again["token_ids"] == streams.complete(whole, 12, cache_salt=stream_id)
            assert again["usage"]["resumed_from"] == "cache"
            assert again["stream"]["position"] == len(text) + 2 + 12 + 1 + 12
