"""``--api-server-count``: any API server serves any stream, by the rules of one server."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import httpx
import psutil
import pytest

from examples.serving import Metrics, Server
from examples.streams_client import StreamsClient
from examples.streams_feed import Feed, batches
from tests.conftest import ModelFactory
from tests.support.serving import CAPACITY, SCHEDULE, Client, prompt_of, refused_start, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

PLUGINS = {"VLLM_PLUGINS": "sink_vllm"}
# The next one may be given to the other API server.
ONE_CONNECTION = httpx.Limits(max_connections=1, keepalive_expiry=None)
GENERATE = {"temperature": 0, "ignore_eos": True}
KEY = "a-key"
SERVERS = 2
PLACES = 2
"""Requests at once. More endless ones would keep two API servers and an engine busy on few cores,
and what a server says of itself would be of long ago."""


class _ApiServer:
    """One connection for all calls, which the kernel has given to one of the API servers."""

    def __init__(self, server: Server) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(
            base_url=server.url, timeout=300, headers=headers, limits=ONE_CONNECTION
        )
        self.port = self.connected()
        (self.pid,) = {
            process.pid
            for process in server.processes()
            for connection in process.net_connections("tcp")
            if connection.raddr[1:] == (self.port,)
        }

    def connected(self) -> int:
        """Our port of the connection, after a request on it."""
        with self.http.stream("GET", "/health") as answer:
            answer.read()
            port: int = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
            return port

    def call(self, method: str, path: str, status: int, **body: Any) -> dict[str, Any]:
        answer = self.http.request(method, path, **body)
        assert answer.status_code == status, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed

    def create(self, **body: Any) -> str:
        stream_id: str = self.call("POST", "/v1/streams", 201, json=body)["id"]
        return stream_id

    def append(self, stream_id: str, status: int = 200, key: str | None = None, **body: Any) -> Any:
        headers = {} if key is None else {"Idempotency-Key": key}
        path = f"/v1/streams/{stream_id}/append"
        return self.call("POST", path, status, json=body, headers=headers)

    def metrics(self) -> Metrics:
        return Metrics.parse(self.http.get("/metrics").text)

    def gauges(self) -> tuple[float, float]:
        metrics = self.metrics()
        names = ("stored_streams", "stored_streams_in_use")
        one, two = (metrics.total(f"sink_vllm:{name}") for name in names)
        return one, two

    def resumes(self) -> float:
        return self.metrics().total("sink_vllm:stored_stream_resumes_total")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several") / "streams.db"


@pytest.fixture(scope="module")
def server(tiny_llama: ModelFactory, database: Path) -> Iterator[Server]:
    flags = ["--api-server-count", f"{SERVERS}", "--api-key", KEY]
    flags += ["--scheduling-policy", "priority", "--max-num-seqs", f"{PLACES}"]
    flags += ["--sink-streams-db", str(database), "--enable-prompt-tokens-details"]
    with tiny_server(tiny_llama(TinyLlama()), *flags, environment=PLUGINS) as server:
        server.wait(lambda _waited: None)
        yield server


@pytest.fixture(scope="module")
def servers(server: Server) -> list[_ApiServer]:
    return _one_of_each(server)


def _one_of_each(server: Server) -> list[_ApiServer]:
    """A connection to each API server: new ones go to the one that has the fewest."""
    found: dict[int, _ApiServer] = {}
    deadline = time.monotonic() + 60
    while len(found) < SERVERS:
        one = _ApiServer(server)
        found.setdefault(one.pid, one)
        assert time.monotonic() < deadline
    return list(found.values())


def test_any_of_them_serves_any_stream(server: Server, servers: list[_ApiServer]) -> None:
    """Turns that alternate between two give what one prompt gives; both went through evictions."""
    stream_id, text = servers[0].create(metadata={"a": "b"}), list[int]()
    before = servers[0].resumes()
    for turn in range(8):
        new = prompt_of(40, salt=3 + 2 * turn)
        generate = {**GENERATE, "max_tokens": 10}
        answer = servers[turn % 2].append(
            stream_id, tokens=new, generate=generate, return_token_ids=True
        )
        assert answer["usage"]["resumed_from"] == ("cache" if turn else None)
        text += [*new, *answer["token_ids"]]
        last = answer["token_ids"]

    assert len(text) > CAPACITY + 3 * SCHEDULE.stride
    client = Client(server)
    client.http.headers["Authorization"] = f"Bearer {KEY}"
    (choice,) = client.complete(
        prompt=text[:-10], max_tokens=10, return_token_ids=True, cache_salt="none"
    )["choices"]
    assert choice["token_ids"] == last
    for one in servers:
        info = one.call("GET", f"/v1/streams/{stream_id}", 200)
        assert (info["position"], info["turns"], info["metadata"]) == (len(text), 8, {"a": "b"})
        assert one.call("GET", "/v1/streams", 200)["data"][0]["id"] == stream_id
        assert one.resumes() == before + 7
    servers[1].call("DELETE", f"/v1/streams/{stream_id}", 200)
    servers[0].call("GET", f"/v1/streams/{stream_id}", 404)


def test_one_turn_at_a_time_and_an_answer_asked_for_elsewhere(
    server: Server, servers: list[_ApiServer]
) -> None:
    one, other = servers
    stream_id = one.create(tokens=prompt_of(40))
    # Each API server writes down what it was told last, once per second at least.
    _eventually(lambda: one.gauges()[1] == 0)
    streams, in_use = one.gauges()
    with _Endless(_ApiServer(server), stream_id) as turn:
        turn.wait()
        for api_server in servers:  # the one that has the turn, and the one that has not
            answer = api_server.http.post(f"/v1/streams/{stream_id}/append", json={"tokens": [65]})
            assert (answer.status_code, answer.headers["Retry-After"]) == (409, "1")
        _eventually(lambda: other.gauges() == one.gauges() == (streams, in_use + 1))
    deadline = time.monotonic() + 60
    while other.call("GET", f"/v1/streams/{stream_id}", 200)["busy"]:
        assert time.monotonic() < deadline
    _eventually(lambda: one.gauges() == (streams, in_use))

    again_body: dict[str, Any] = {"tokens": [66, 67], "generate": GENERATE | {"max_tokens": 5}}
    first = one.append(stream_id, key="k", **again_body)
    again = other.append(stream_id, key="k", **again_body)
    for answer in (first, again):  # seconds go on
        for name in ("age_seconds", "idle_seconds", "expires_in_seconds"):
            del answer["stream"][name]
    assert again == first


def test_priorities_are_those_of_the_scheduler(server: Server, servers: list[_ApiServer]) -> None:
    """Of two that wait for a place, the one that came last and is more urgent gets it.

    None of them ends by itself: who has a place is for the scheduler alone to say, not for the
    order in which answers reach clients.
    """
    ids = [servers[0].create(tokens=prompt_of(40), priority=5) for _ in range(PLACES)]
    late, urgent = (servers[0].create(tokens=prompt_of(40), priority=p) for p in (9, 0))
    assert servers[1].call("GET", f"/v1/streams/{late}", 200)["priority"] == 9
    client = Client(server)

    with ExitStack() as stack:
        turns = [
            stack.enter_context(_Endless(api_server, stream_id))
            for api_server, stream_id in zip(_one_of_each(server), ids, strict=True)
        ]
        for turn in turns:
            turn.wait()
        waiting = []
        for number, (stream_id, body) in enumerate([(late, {}), (urgent, {"priority": -1})], 1):
            waiting.append(stack.enter_context(_Endless(_ApiServer(server), stream_id, **body)))
            _eventually(lambda n=number: client.counter("vllm:num_requests_waiting") == n)  # type: ignore[misc]
        turns[0].close()
        waiting[1].wait()
        assert not waiting[0].begun()
        waiting[1].close()
        waiting[0].wait()
    _eventually(lambda: servers[0].gauges()[1] == 0)


class _Endless:
    """A turn without an end, read by a thread; when it is closed, so is the connection."""

    def __init__(self, api_server: _ApiServer, stream_id: str, **body: Any) -> None:
        self._http = api_server.http
        self._path = f"/v1/streams/{stream_id}/append"
        self._body = {"stream": True, "generate": {**GENERATE, "max_tokens": 100_000}, **body}
        self._begun, self._closed = Event(), Event()
        self._thread = Thread(target=self._read)

    def _read(self) -> None:
        with self._http.stream("POST", self._path, json=self._body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._begun.set()
                if self._closed.is_set():
                    return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def begun(self) -> bool:
        """Whether its first token has come."""
        return self._begun.is_set()

    def wait(self) -> None:
        """Until its first token has come."""
        assert self._begun.wait(60)

    def close(self) -> None:
        """Hang up; the server gives the turn up."""
        self._closed.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


def _eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_examples(server: Server, servers: list[_ApiServer]) -> None:
    """Lines in, alerts out, past the capacity; a stream that is gone is made again."""
    client = StreamsClient(server.url, KEY)
    stream_id = client.create(tokens=prompt_of(40))
    answers = [client.append(stream_id, "k", text="abc", generate=GENERATE | {"max_tokens": 4})]
    answers += [client.append(stream_id, "k", text="abc", generate=GENERATE | {"max_tokens": 4})]
    assert answers[0]["text"] == answers[1]["text"]
    assert client.get(stream_id)["position"] == 40 + 3 + 4
    *deltas, last = client.events(stream_id, generate=GENERATE | {"max_tokens": 5})
    assert deltas
    assert last["stream"]["position"] == 40 + 3 + 4 + 5
    client.delete(stream_id)

    lines = iter([f"line {number}\n" for number in range(400)] + ["\n", "the last one\n", ""])
    feed, alerts = Feed(server.url, KEY, "Watch a log.", max_tokens=6), list[str]()

    async def read() -> str:
        await asyncio.sleep(0)
        return next(lines)

    async def watch() -> None:
        async for alert in feed.alerts(batches(read)):
            alerts.append(alert)
            if len(alerts) == 1:
                servers[0].call("DELETE", f"/v1/streams/{feed.stream_id}", 200)

    asyncio.run(watch())
    assert len(alerts) >= 2
    info = servers[1].call("GET", f"/v1/streams/{feed.stream_id}", 200)
    assert info["evictions"] > 3
    assert info["sink_tokens"] > SCHEDULE.sink_tokens  # pinned


def test_a_second_server_on_the_database_ends_before_it_loads(
    server: Server, tiny_llama: ModelFactory, database: Path
) -> None:
    """One that would be alone, with a sentence; the first one goes on."""
    assert server.healthy()
    flags = ("--sink-streams-db", str(database))
    last = refused_start(tiny_server(tiny_llama(TinyLlama()), *flags, environment=PLUGINS))

    assert last.startswith(f"vllm serve: error: --sink-streams-db='{database}' cannot be used:")
    assert "another server has it open" in last


def test_the_processes_are_the_ones_meant(server: Server, servers: list[_ApiServer]) -> None:
    """Still: a connection that was idle for many seconds is the same."""
    assert len({one.pid for one in servers}) == SERVERS
    assert [one.connected() for one in servers] == [one.port for one in servers]
    assert all(psutil.Process(one.pid).ppid() == server.processes()[0].pid for one in servers)
    schema = json.dumps(servers[0].call("GET", "/openapi.json", 200))
    assert "/v1/streams/{stream_id}/append" in schema
