"""``/v1/streams`` of a real ``vllm serve``: what is sent, what comes back, what it costs."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples.serving import Metrics, Server
from sink_vllm.policy.parked import KEY as PARKED_KEY
from sink_vllm.policy.schedule import Schedule
from tests.support.monitoring import metrics_named
from tests.support.serving import CAPACITY, FLAGS, MODEL, SCHEDULE, prompt_of
from tests.support.tiny_models import TinyLlama, write_tiny_lora
from tests.support.trace_collector import Collector, running_collector

pytestmark = pytest.mark.server

BLOCK = 32
KEY, OTHER_KEY = "a-key", "another-key"
MOST_STREAMS = 6
MOST_TOKENS = 3000
MOST_NEW = 1500
"""Server-wide limit of one generation: seconds of it, in which others are to come in between."""
GREEDY = {"temperature": 0, "ignore_eos": True}


class _Api:
    """The routes, with the server's key."""

    def __init__(
        self, url: str, key: str = KEY, log: Path | None = None, traces: Collector | None = None
    ) -> None:
        self.url, self.log, self.traces = url, log, traces
        self.http = httpx.Client(
            base_url=url, timeout=300, headers={"Authorization": f"Bearer {key}"}
        )

    def call(self, method: str, path: str, status: int, body: Any = None) -> dict[str, Any]:
        answer = self.http.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed

    def error(self, method: str, path: str, status: int, body: Any = None) -> str:
        """The message of an error, which has vLLM's form."""
        error = self.call(method, path, status, body)["error"]
        assert error["code"] == status
        message: str = error["message"]
        return message

    def create(self, **body: Any) -> str:
        stream_id: str = self.call("POST", "/v1/streams", 201, body)["id"]
        return stream_id

    def append(self, stream_id: str, **body: Any) -> dict[str, Any]:
        return self.call("POST", f"/v1/streams/{stream_id}/append", 200, body)

    def generate(self, stream_id: str, max_tokens: int, **body: Any) -> dict[str, Any]:
        generate = {**GREEDY, "max_tokens": max_tokens}
        return self.append(stream_id, generate=generate, return_token_ids=True, **body)

    def get(self, stream_id: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/streams/{stream_id}", 200)

    def delete(self, stream_id: str) -> None:
        answer = self.call("DELETE", f"/v1/streams/{stream_id}", 200)
        assert answer == {"id": stream_id, "object": "stream.deleted", "deleted": True}

    def events(self, stream_id: str, **body: Any) -> Iterator[dict[str, Any] | None]:
        """Parsed events; ``None`` for ``[DONE]``. Closing the iterator disconnects."""
        path = f"/v1/streams/{stream_id}/append"
        with self.http.stream("POST", path, json={"stream": True, **body}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    yield None
                elif line:
                    yield json.loads(line.removeprefix("data: "))

    def gauge(self, name: str) -> float:
        return Metrics.parse(self.http.get("/metrics").text).total(f"sink_vllm:{name}")

    def connect(self, connections: int) -> None:
        """Have open connections: vLLM's server accepts no new ones, for seconds, while a model as
        fast as this one generates several answers (stock vLLM too)."""
        with ExitStack() as stack:
            answers = [
                stack.enter_context(self.http.stream("GET", "/health")) for _ in range(connections)
            ]
            for answer in answers:
                answer.read()

    def complete(
        self, tokens: list[int], max_tokens: int, model: str = MODEL, **xargs: Any
    ) -> list[int]:
        """The same over the plain API, as one prompt that no page is cached of."""
        body = {
            "model": model,
            "prompt": tokens,
            "max_tokens": max_tokens,
            "return_token_ids": True,
            "cache_salt": f"{hash(tuple(tokens))}",
            "vllm_xargs": xargs,
            **GREEDY,
        }
        (choice,) = self.call("POST", "/v1/completions", 200, body)["choices"]
        found: list[int] = choice["token_ids"]
        return found


@pytest.fixture(scope="module")
def api(tiny_llama: Callable[[TinyLlama], Path]) -> Iterator[_Api]:
    arguments = [str(tiny_llama(TinyLlama())), "--served-model-name", MODEL]
    arguments += ["--api-key", KEY, OTHER_KEY, "--enable-lora"]
    arguments += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
    arguments += ["--max-num-seqs", "8", "--num-gpu-blocks-override", "96", *FLAGS]
    arguments += ["--sink-streams", f"{MOST_STREAMS}", "--sink-streams-tokens", f"{MOST_TOKENS}"]
    arguments += ["--override-generation-config", json.dumps({"max_new_tokens": MOST_NEW})]
    arguments += ["--enable-prompt-tokens-details", "--enable-server-load-tracking"]
    arguments += ["--enable-log-requests", "--enable-request-id-headers"]
    environment = {"VLLM_PLUGINS": "sink_vllm", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO"}
    with running_collector() as traces:
        arguments += ["--otlp-traces-endpoint", traces.url]
        with Server(arguments, environment | traces.environment) as server:
            server.wait(lambda _seconds: None)
            yield _Api(server.url, log=server.log, traces=traces)


def _message(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def _bytes(text: str) -> list[int]:
    """Token ids of the tiny model's tokenizer, whose vocabulary is the sorted byte alphabet."""
    from tests.support.tiny_models import _tokenizer

    tokens: list[int] = _tokenizer()(text, add_special_tokens=False)["input_ids"]
    return tokens


# -- what an append does ------------------------------------------------------------------------


def test_deltas_are_one_uninterrupted_stream(api: _Api) -> None:
    """Only what is new is sent and computed; the tokens are those of the whole as one prompt."""
    stream_id = api.create()
    whole: list[int] = []
    for turn in range(12):
        new = prompt_of(40 + turn, salt=2 * turn + 5)
        answer = api.generate(stream_id, 10, tokens=new)
        prompt = [*whole, *new]

        assert answer["token_ids"] == api.complete(prompt, 10), turn
        usage, stream = answer["usage"], answer["stream"]
        assert usage["appended_tokens"] == len(new)
        assert usage["generated_tokens"] == 10
        assert usage["cached_tokens"] + usage["computed_tokens"] == len(prompt)
        if turn:
            # The last output and the rest of a page; before the first resume a page more.
            rest = BLOCK if len(whole) > CAPACITY + BLOCK else 2 * BLOCK
            assert len(new) <= usage["computed_tokens"] <= len(new) + rest
            assert usage["resumed_from"] == "cache"
        whole = [*prompt, *answer["token_ids"]]
        assert stream["position"] == len(whole)
        assert stream["evicted"] == SCHEDULE.evicted(len(whole) - 1)
        assert stream["cached"] == len(whole) - stream["evicted"] <= CAPACITY + 1
        assert stream["turns"] == turn + 1
    assert len(whole) > 4 * CAPACITY
    assert api.get(stream_id)["position"] == len(whole)
    api.delete(stream_id)


def test_content_without_generation_is_computed(api: _Api) -> None:
    stream_id = api.create()
    new = prompt_of(200, salt=9)

    answer = api.append(stream_id, tokens=new)

    assert answer["text"] is answer["token_ids"] is answer["finish_reason"] is None
    assert answer["usage"]["generated_tokens"] == 0
    assert answer["stream"]["position"] == 200
    after = api.generate(stream_id, 8, tokens=[70])
    assert after["usage"]["computed_tokens"] <= BLOCK
    assert after["token_ids"] == api.complete([*new, 70], 8)
    api.delete(stream_id)


def test_generation_goes_on_without_content(api: _Api) -> None:
    stream_id = api.create(tokens=prompt_of(50, salt=11))

    parts = [token for _ in range(3) for token in api.generate(stream_id, 5)["token_ids"]]

    assert parts == api.complete(prompt_of(50, salt=11), 15)
    api.delete(stream_id)


def test_messages_are_what_the_chat_template_makes_of_the_whole(api: _Api) -> None:
    """The tiny model's format: ``<role>content\\n`` and ``<assistant>``."""
    stream_id = api.create(system="Be short.", messages=[_message("Hello")])
    assert api.get(stream_id)["pending_messages"] == 2
    assert api.get(stream_id)["position"] == 0

    first = api.generate(stream_id, 6)
    start = "<system>Be short.\n<user>Hello\n<assistant>"
    assert first["usage"]["appended_tokens"] == len(start)
    assert first["token_ids"] == api.complete(_bytes(start), 6)
    second = api.generate(stream_id, 6, messages=[_message("And?"), _message("Why?")])
    more = "\n<user>And?\n<user>Why?\n<assistant>"
    whole = [*_bytes(start), *first["token_ids"], *_bytes(more)]
    assert second["usage"]["appended_tokens"] == len(more)
    assert second["token_ids"] == api.complete(whole, 6)
    assert api.get(stream_id)["pending_messages"] == 0
    api.delete(stream_id)


def test_messages_without_generation_close_their_turn(api: _Api) -> None:
    stream_id = api.create()
    parts = ["<user>One\n", "<assistant>Two\n<user>Three\n", "<assistant>"]

    api.append(stream_id, messages=[_message("One")])
    api.append(stream_id, messages=[_message("Two", "assistant"), _message("Three")])
    answer = api.generate(stream_id, 6)

    assert answer["usage"]["appended_tokens"] == len(parts[-1])
    assert answer["token_ids"] == api.complete(_bytes("".join(parts)), 6)
    api.delete(stream_id)


def test_text_is_appended_as_it_is(api: _Api) -> None:
    stream_id = api.create(text="Once ")
    answer = api.generate(stream_id, 6, text="upon a time")

    assert answer["token_ids"] == api.complete(_bytes("Once upon a time"), 6)
    api.delete(stream_id)


def test_events(api: _Api) -> None:
    stream_id = api.create(tokens=prompt_of(60, salt=13))
    one = api.generate(stream_id, 20)
    api.delete(stream_id)
    stream_id = api.create(tokens=prompt_of(60, salt=13))

    generate = {**GREEDY, "max_tokens": 20}
    *deltas, account, done = api.events(stream_id, generate=generate, return_token_ids=True)

    assert done is None
    assert account is not None
    assert {delta["object"] for delta in deltas if delta} == {"stream.delta"}
    assert "".join(delta["text"] for delta in deltas if delta) == one["text"]
    assert account["token_ids"] == one["token_ids"]
    assert account["object"] == "stream.append"
    assert account["text"] is None
    assert account["finish_reason"] == "length"
    assert account["stream"]["busy"] is False
    api.delete(stream_id)


def test_leaving_an_event_stream_keeps_what_was_read(api: _Api) -> None:
    """The stream is free again, and goes on where the client left it."""
    stream_id = api.create(tokens=prompt_of(60, salt=15))
    events = api.events(stream_id, generate={**GREEDY, "max_tokens": MOST_NEW})
    for _, _event in zip(range(5), events, strict=False):
        pass
    assert "appending" in api.error(
        "POST", f"/v1/streams/{stream_id}/append", 409, {"generate": {}}
    )
    assert "appending" in api.error("DELETE", f"/v1/streams/{stream_id}", 409)
    for method, path in (("POST", f"{stream_id}/append"), ("DELETE", stream_id)):
        answer = api.http.request(method, f"/v1/streams/{path}", json={"generate": {}})
        assert answer.headers["Retry-After"] == "1"
    assert api.get(stream_id)["busy"]
    events.close()  # type: ignore[attr-defined]

    for _ in range(200):
        info = api.get(stream_id)
        if not info["busy"]:
            break
        threading.Event().wait(0.05)
    assert not info["busy"]
    assert 60 + 5 <= info["position"] < 3000
    assert api.generate(stream_id, 3)["stream"]["position"] == info["position"] + 3
    api.delete(stream_id)


def test_an_append_that_is_repeated(api: _Api) -> None:
    """The answer was lost: the same key gives it again, and nothing is appended twice."""
    stream_id = api.create(tokens=prompt_of(150, salt=25))
    path = f"/v1/streams/{stream_id}/append"
    body = {"tokens": [70], "generate": {**GREEDY, "max_tokens": 5}, "return_token_ids": True}
    headers = {"Idempotency-Key": "one"}
    first, again = (api.http.post(path, json=body, headers=headers).json() for _ in range(2))

    assert {**again, "stream": None} == {**first, "stream": None}
    assert again["stream"]["turns"] == 1
    assert again["stream"]["position"] == 156
    other = api.http.post(path, json={**body, "tokens": [71]}, headers=headers)
    assert other.status_code == 400
    assert "another append" in other.json()["error"]["message"]
    events = api.http.post(path, json={**body, "stream": True}, headers={"Idempotency-Key": "two"})
    repeated = api.http.post(
        path, json={**body, "stream": True}, headers={"Idempotency-Key": "two"}
    )
    assert repeated.text.count("stream.delta") == 1 < events.text.count("stream.delta")
    assert repeated.text.endswith("data: [DONE]\n\n")
    assert api.get(stream_id)["position"] == 162
    api.delete(stream_id)


def test_streams_of_a_key_are_listed(api: _Api) -> None:
    other = _Api(api.url, OTHER_KEY)
    theirs = other.create()
    ids = [api.create(metadata={"n": f"{n}"}, expires_after=600) for n in range(3)]

    pages = [api.call("GET", "/v1/streams?limit=2", 200)]
    last = pages[0]["data"][-1]["id"]
    pages.append(api.call("GET", f"/v1/streams?limit=2&after={last}", 200))

    found = [stream for page in pages for stream in page["data"]]
    assert [stream["id"] for stream in found] == ids[::-1]
    assert [stream["metadata"] for stream in found] == [{"n": "2"}, {"n": "1"}, {"n": "0"}]
    assert all(590 < stream["expires_in_seconds"] <= 600 for stream in found)
    assert [page["has_more"] for page in pages] == [True, False]
    api.error("GET", f"/v1/streams?after={theirs}", 404)
    assert "--sink-streams-idle" in api.error("POST", "/v1/streams", 400, {"expires_after": 3601})
    api.error("POST", "/v1/streams", 400, {"metadata": {f"{n}": "" for n in range(17)}})
    for stream_id in ids:
        api.delete(stream_id)
    other.delete(theirs)


# -- options ------------------------------------------------------------------------------------


def test_options_of_a_stream(api: _Api) -> None:
    stream_id = api.create(sink_tokens=20, sink_window=40)
    schedule = Schedule(sink_tokens=20, window=40, stride=32)
    new = prompt_of(300, salt=17)

    answer = api.generate(stream_id, 8, tokens=new)

    assert answer["token_ids"] == api.complete(new, 8, sink_tokens=20, sink_window=40)
    stream = answer["stream"]
    assert (stream["sink_tokens"], stream["sink_window"], stream["capacity"]) == (20, 40, 92)
    assert stream["evicted"] == schedule.evicted(307)
    api.delete(stream_id)


def test_a_pinned_system_prompt(api: _Api) -> None:
    system = "You answer in one word. " * 2
    stream_id = api.create(system=system, sink_pin="system")

    answer = api.generate(stream_id, 4, messages=[_message("word " * 30)])

    end = len(f"<system>{system}\n")
    assert answer["stream"]["sink_tokens"] == end
    assert answer["stream"]["evicted"] > 0
    api.delete(stream_id)
    stream_id = api.create(system="x" * 100, sink_pin="system")
    message = api.error(
        "POST", f"/v1/streams/{stream_id}/append", 400, {"messages": [_message("a")]}
    )
    assert "first 109 tokens" in message
    assert "has room for 64" in message
    assert api.get(stream_id)["pending_messages"] == 1  # as it was
    api.delete(stream_id)


def test_a_full_stream_ends_at_the_capacity(api: _Api) -> None:
    stream_id = api.create(kv_policy="full", tokens=prompt_of(100, salt=19))

    assert api.append(stream_id, generate=GREEDY)["usage"]["generated_tokens"] == CAPACITY - 100
    message = api.error(
        "POST", f"/v1/streams/{stream_id}/append", 400, {"tokens": [1], "generate": GREEDY}
    )
    assert "kv_policy='full'" in message
    assert api.get(stream_id)["position"] == CAPACITY
    api.delete(stream_id)


# -- limits -------------------------------------------------------------------------------------


def test_the_least_recently_used_stream_is_forgotten(api: _Api) -> None:
    ids = [api.create(tokens=[65 + n]) for n in range(MOST_STREAMS)]
    api.append(ids[0], tokens=[70])
    newest = api.create()

    assert "create a stream" in api.error("GET", f"/v1/streams/{ids[1]}", 404)
    assert api.get(ids[0])["position"] == 2
    for stream_id in (ids[0], *ids[2:], newest):
        api.delete(stream_id)


def test_a_forgotten_stream_comes_back_by_resending(api: _Api) -> None:
    stream_id = api.create(tokens=prompt_of(400, salt=21))
    first = api.generate(stream_id, 8)
    api.delete(stream_id)

    tokens = [*prompt_of(400, salt=21), *first["token_ids"]]
    stream_id = api.create(tokens=tokens)
    again = api.generate(stream_id, 8, tokens=[70])

    assert again["usage"]["computed_tokens"] <= 9 + BLOCK
    assert again["token_ids"] == api.complete([*tokens, 70], 8)
    api.delete(stream_id)


def test_tokens_of_all_streams_are_bounded(api: _Api) -> None:
    ids = [api.create(tokens=[65] * 1400) for _ in range(2)]
    third = api.create(tokens=[65] * 1400)

    assert "no longer" in api.error("GET", f"/v1/streams/{ids[0]}", 404)
    assert api.gauge("stored_stream_tokens") == 2800
    for stream_id in (ids[1], third):
        api.delete(stream_id)
    stream_id = api.create(tokens=[65] * (MOST_TOKENS - 100))
    body = {"tokens": [65], "generate": {"max_tokens": 100}}
    path = f"/v1/streams/{stream_id}/append"
    assert f"more than the {MOST_TOKENS} tokens" in api.error("POST", path, 400, body)
    answer = api.append(stream_id, tokens=[65], generate=GREEDY)  # what there is room for
    assert answer["usage"]["generated_tokens"] == 99
    api.delete(stream_id)


@pytest.mark.parametrize(
    "content",
    [
        {"tokens": [65] * MOST_TOKENS},
        {"text": "a" * MOST_TOKENS},
        {"system": "a" * 4 * MOST_TOKENS},
        {"messages": [_message("a" * 2 * MOST_TOKENS)] * 2},
    ],
    ids=["tokens", "text", "system", "messages"],
)
def test_a_stream_nothing_fits_behind_is_refused_at_once(
    api: _Api, content: dict[str, Any]
) -> None:
    stream_id = api.create(tokens=[65] * 100)

    message = api.error("POST", "/v1/streams", 400, content)

    assert f"--sink-streams-tokens={MOST_TOKENS}" in message
    assert "send less" in message
    assert api.get(stream_id)["position"] == 100  # it has cost nobody anything
    api.delete(stream_id)


def test_waiting_messages_take_room(api: _Api) -> None:
    ids = [api.create(messages=[_message("a" * 8000)]) for _ in range(2)]

    assert "no longer" in api.error("GET", f"/v1/streams/{ids[0]}", 404)
    assert api.gauge("stored_stream_tokens") == 8000 / 4 + 64
    api.delete(ids[1])


def test_a_client_does_not_push_out_another(api: _Api) -> None:
    other = _Api(api.url, OTHER_KEY)
    theirs = [other.create(tokens=[65 + n]) for n in range(MOST_STREAMS // 2)]

    mine = [api.create() for _ in range(3 * MOST_STREAMS)]

    assert all(other.get(stream_id)["position"] == 1 for stream_id in theirs)
    for stream_id in (*theirs, *mine[-MOST_STREAMS // 2 :]):
        api.delete(stream_id)
    assert api.gauge("stored_streams") == 0


def test_streams_in_use_do_not_lock_out_another_client(api: _Api) -> None:
    other = _Api(api.url, OTHER_KEY)
    ids = [api.create(tokens=[65 + n]) for n in range(MOST_STREAMS)]
    api.connect(MOST_STREAMS + 1)
    other.connect(1)
    turns = [api.events(stream_id, generate=GREEDY) for stream_id in ids]
    for turn in turns:
        next(turn)
    assert api.gauge("stored_streams_in_use") == MOST_STREAMS

    refused = api.http.post("/v1/streams", json={})
    theirs = other.create(tokens=[65])

    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert f"--sink-streams={MOST_STREAMS}" in refused.json()["error"]["message"]
    assert other.generate(theirs, 2)["usage"]["generated_tokens"] == 2
    for turn in turns:
        turn.close()  # type: ignore[attr-defined]
    other.delete(theirs)
    for stream_id in ids:
        for _ in range(200):
            answer = api.http.delete(f"/v1/streams/{stream_id}")
            if answer.status_code != 409:
                break
            threading.Event().wait(0.05)
        assert answer.status_code in (200, 404)


# -- what the server says about all requests ------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"max_tokens": 2 * MOST_NEW}])
def test_the_servers_limit_of_a_generation(api: _Api, given: dict[str, int]) -> None:
    """``max_new_tokens`` of ``--override-generation-config``: it used to be ignored here."""
    prompt = prompt_of(40, salt=23)
    stream_id = api.create(tokens=prompt)

    answer = api.append(stream_id, generate={**GREEDY, **given}, return_token_ids=True)

    assert answer["usage"]["generated_tokens"] == MOST_NEW
    assert answer["finish_reason"] == "length"
    assert answer["token_ids"] == api.complete(prompt, 2 * MOST_NEW)
    api.delete(stream_id)


def test_an_adapter_that_is_unloaded_between_turns(
    api: _Api, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The stream used to go on with the base model, and nobody was told."""
    folder = write_tiny_lora(tmp_path_factory.mktemp("lora"), TinyLlama())
    adapter = {"lora_name": "adapter", "lora_path": str(folder)}
    api.http.post("/v1/load_lora_adapter", json=adapter).raise_for_status()
    prompt = prompt_of(150, salt=25)
    stream_id = api.create(model="adapter", tokens=prompt)
    first = api.generate(stream_id, 8)["token_ids"]
    assert first == api.complete(prompt, 8, "adapter")
    assert first != api.complete(prompt, 8)
    before = api.get(stream_id)

    api.http.post("/v1/unload_lora_adapter", json=adapter).raise_for_status()
    path, body = f"/v1/streams/{stream_id}/append", {"tokens": [65], "generate": GREEDY}
    gone = api.call("POST", path, 404, body)
    assert gone == api.call("POST", "/v1/completions", 404, {"model": "adapter", "prompt": [65]})
    assert gone == api.call("POST", path, 404, {**body, "stream": True})
    assert gone == api.call("POST", "/v1/streams", 404, {"model": "adapter"})
    after = api.get(stream_id)
    for name in ("position", "turns", "busy", "model"):
        assert after[name] == before[name]

    api.http.post("/v1/load_lora_adapter", json=adapter).raise_for_status()
    again = api.generate(stream_id, 8, tokens=[65])["token_ids"]
    assert again == api.complete([*prompt, *first, 65], 8, "adapter")
    api.delete(stream_id)
    api.http.post("/v1/unload_lora_adapter", json=adapter).raise_for_status()


# -- errors -------------------------------------------------------------------------------------


def test_unknown_streams(api: _Api) -> None:
    for method, path, body in (
        ("GET", "/v1/streams/nobody", None),
        ("DELETE", "/v1/streams/nobody", None),
        ("POST", "/v1/streams/nobody/append", {"text": "a"}),
    ):
        assert "no stream 'nobody'" in api.error(method, path, 404, body)


def test_unknown_model(api: _Api) -> None:
    assert "The model `other` does not exist" in api.error(
        "POST", "/v1/streams", 404, {"model": "other"}
    )


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/streams/x/append", "/v1/streams/x"])
def test_the_key_is_asked_for(api: _Api, path: str) -> None:
    for method in ("POST", "GET", "DELETE"):
        assert httpx.request(method, api.url + path, json={}).status_code == 401


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"text": "a", "tokens": [1]}, "text and tokens exclude each other"),
        ({"system": "a", "text": "b"}, "system needs chat messages"),
        ({"sink_tokens": 65}, "use 64 or fewer"),
        ({"sink_tokens": 2**40}, "sink_tokens"),
        ({"sink_window": 93}, "larger than the server's window"),
        ({"kv_policy": "full", "sink_tokens": 1}, "contradicts"),
        ({"sink_pin": "system"}, "needs the system prompt"),
        ({"sink_pins": "system"}, "sink_pins"),
        ({"tokens": [300]}, "300"),
        ({"tokens": [-1]}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"text": ""}, "text"),
        ({"cache_salt": "a" * 129}, "cache_salt"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role"),
    ],
)
def test_streams_that_are_refused(api: _Api, body: dict[str, Any], says: str) -> None:
    assert says in api.error("POST", "/v1/streams", 400, body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "nothing to append"),
        ({"stream": True}, "nothing to append"),
        ({"tokens": [10**6]}, "1000000"),
        ({"tokens": [10**6], "stream": True, "generate": {}}, "1000000"),
        ({"text": "a", "generate": {"max_tokens": 0}}, "max_tokens"),
        ({"text": "a", "generate": {"max_tokens": 5, "min_tokens": 6}}, "min_tokens"),
        ({"text": "a", "generate": {"temperature": "hot"}}, "temperature"),
        ({"text": "a", "generate": {"beams": 2}}, "beams"),
        ({"text": "a", "generate": {"stop": [""]}}, "stop"),
        ({"text": "a", "priority": 1}, "--scheduling-policy priority"),
    ],
)
def test_appends_that_are_refused(api: _Api, body: dict[str, Any], says: str) -> None:
    """The stream stays as it was, and usable."""
    stream_id = api.create(tokens=[65, 66])
    before = api.get(stream_id)

    assert says in api.error("POST", f"/v1/streams/{stream_id}/append", 400, body)

    after = api.get(stream_id)
    for name in ("position", "turns", "busy", "sink_tokens"):
        assert after[name] == before[name]
    assert api.generate(stream_id, 2)["token_ids"] == api.complete([65, 66], 2)
    api.delete(stream_id)


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"{", b'{"text": "\\ud800"}', b'{"tokens": [1e400]}', b"\xff"]
)
def test_bodies_that_are_not_requests(api: _Api, raw: bytes) -> None:
    for path in ("/v1/streams", "/v1/streams/x/append"):
        answer = api.http.post(path, content=raw, headers={"Content-Type": "application/json"})

        assert answer.status_code == 400, answer.text


def test_schema(api: _Api) -> None:
    """Every route with its bodies, and every status the tests of this file have seen."""
    schema = api.call("GET", "/openapi.json", 200)
    paths = {path: routes for path, routes in schema["paths"].items() if "/streams" in path}

    assert {(path, method) for path, routes in paths.items() for method in routes} == {
        ("/v1/streams", "post"),
        ("/v1/streams", "get"),
        ("/v1/streams/{stream_id}", "get"),
        ("/v1/streams/{stream_id}", "delete"),
        ("/v1/streams/{stream_id}/append", "post"),
    }
    append = paths["/v1/streams/{stream_id}/append"]["post"]
    assert {"200", "400", "401", "404", "409", "429"} <= set(append["responses"])
    assert set(append["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    models = schema["components"]["schemas"]
    bodies = ("CreateStream", "Append", "Generate", "StreamInfo", "Appended", "AppendUsage")
    for name in (*bodies, "StreamList", "TurnInfo"):
        fields = models[name]["properties"].items()
        missing = [field for field, said in fields if not ({"description", "$ref"} & set(said))]
        assert set(missing) <= {"id", "object"}, name


# -- options of one request, over the plain API -------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_refused_options_are_a_400_in_streams_too(api: _Api, path: str, stream: bool) -> None:
    content: dict[str, Any] = {"prompt": [65] * 130}
    if "chat" in path:
        content = {"messages": [_message("x" * 130)]}
    for xargs, says in (
        ({"sink_tokens": 65}, "use 64 or fewer"),
        ({"kv_policy": "full"}, "128 tokens"),
        ({"sink_windows": 3}, "sink_windows"),
        ({PARKED_KEY: "a stream of somebody else's"}, "cannot be named"),
        ({PARKED_KEY: ["0" * 64, 32]}, "cannot be named"),
    ):
        body = {"model": MODEL, "max_tokens": 5, "stream": stream, "vllm_xargs": xargs, **content}
        assert says in api.error("POST", path, 400, body)


def test_a_chat_pins_its_system_message(api: _Api) -> None:
    """Over the plain API: the pinned tokens are sinks, whatever is asked after them."""
    system = "You answer in one word."
    chat = [_message(system, "system"), _message("word " * 60)]
    body = {
        "model": MODEL,
        "messages": chat,
        "max_tokens": 6,
        "vllm_xargs": {"sink_pin": "system"},
        "return_token_ids": True,
        **GREEDY,
    }
    (choice,) = api.call("POST", "/v1/chat/completions", 200, body)["choices"]

    end = len(f"<system>{system}\n")
    text = f"<system>{system}\n<user>{'word ' * 60}\n<assistant>"
    assert choice["token_ids"] == api.complete(_bytes(text), 6, sink_tokens=end)
    assert choice["token_ids"] != api.complete(_bytes(text), 6)


def test_metrics_of_dashboard_and_alerts_exist(api: _Api) -> None:
    """Whatever deploy/monitoring asks for, by the names that Prometheus stores."""
    api.call("GET", "/v1/streams/nobody", 404)  # a refusal, for the alert on refusals
    text = httpx.get(f"{api.url}/metrics").text
    families = list(text_string_to_metric_families(text))
    known = {sample.name for family in families for sample in family.samples}

    assert metrics_named() - known == set()
    refused = next(one for one in families if one.name == "http_requests")
    handlers = {(one.labels["handler"], one.labels["status"]) for one in refused.samples}
    assert ("/v1/streams/{stream_id}", "4xx") in handlers


# -- what the server says about all requests ----------------------------------------------------


def _until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_append_is_logged_under_the_clients_own_id(api: _Api) -> None:
    """As a completion is; and the answer has the id, too."""
    body = {"prompt": [65, 66], "max_tokens": 2, "model": MODEL}
    append = {"tokens": [65, 66], "generate": {"max_tokens": 2}}
    path = f"/v1/streams/{api.create()}/append"
    for number, (where, what, name) in enumerate(
        [
            ("/v1/completions", body, "cmpl-{}-0"),
            (path, append, "append-{}"),
            (path, {**append, "stream": True}, "append-{}"),
        ]
    ):
        own = f"from-the-client-{number}"
        answer = api.http.post(where, json=what, headers={"X-Request-Id": own})
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Request-Id"] == own
        line = f"Received request {name.format(own)}: params: SamplingParams("
        assert api.log is not None
        assert api.log.read_text().count(line) == 1


def test_an_append_in_progress_is_load(api: _Api) -> None:
    """Until its answer has ended, whoever ends it; what is refused leaves no load behind.

    vLLM counts down after the last byte of an answer, in a background task: a client may ask for
    the load before that, and sees the answer that it has.
    """

    def until_load_is(expected: int) -> None:
        _until(lambda: api.call("GET", "/load", 200)["server_load"] == expected)

    until_load_is(0)
    one, other = api.create(), api.create()
    events = api.events(one, tokens=[65], generate={**GREEDY, "max_tokens": MOST_NEW})
    next(events)
    until_load_is(1)
    whole = threading.Thread(target=api.generate, args=(other, 200), kwargs={"tokens": [66]})
    whole.start()
    until_load_is(2)
    whole.join()
    until_load_is(1)
    api.error("POST", f"/v1/streams/{one}/append", 409, {"tokens": [65]})
    api.error("POST", f"/v1/streams/{other}/append", 400, {"tokens": [-1]})
    api.error("POST", f"/v1/streams/{'stream-' + '0' * 32}/append", 404, {"tokens": [65]})
    until_load_is(1)
    events.close()  # type: ignore[attr-defined]
    until_load_is(0)


def test_an_append_is_part_of_the_clients_trace(api: _Api) -> None:
    """The engine's span of a request has the trace and the parent that the client named."""
    traces = api.traces
    assert traces is not None
    append = {"tokens": [65, 66], "generate": {"max_tokens": 2}}
    completion = {"prompt": [65, 66], "max_tokens": 2, "model": MODEL}
    for number, (path, body, name) in enumerate(
        [
            ("/v1/completions", completion, "cmpl-{}-0"),
            (f"/v1/streams/{api.create()}/append", append, "append-{}"),
        ]
    ):
        trace, parent, own = f"{number + 1:032x}", f"{number + 7:016x}", f"traced-{number}"
        headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": own}
        answer = api.http.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        _until(partial(traces.of, trace))
        (span,) = traces.of(trace)
        assert (span.name, span.parent) == ("llm_request", parent)
        assert span.attributes["gen_ai.request.id"] == name.format(own)


def test_stream_lengths_are_counted(api: _Api) -> None:
    text = httpx.get(f"{api.url}/metrics").text
    buckets = [line for line in text.splitlines() if line.startswith("sink_vllm:stream_tokens_b")]
    assert buckets
    count = next(line for line in text.splitlines() if line.startswith("sink_vllm:stream_tokens_c"))
    assert float(count.rsplit(" ", 1)[1]) > 0


def test_what_streams_go_on_from_is_counted(api: _Api) -> None:
    resumes, seconds = "stored_stream_resumes_total", "stored_stream_resume_seconds_count"
    before = api.gauge(resumes)
    stream_id = api.create()
    for turn in range(3):  # the first one goes on from nothing
        api.generate(stream_id, 2, tokens=prompt_of(60, salt=31 + 2 * turn))
    text = httpx.get(f"{api.url}/metrics").text

    assert api.gauge(resumes) == api.gauge(seconds) == before + 2
    assert f'sink_vllm:{resumes}{{model_name="{MODEL}",source="cache"}}' in text
    api.delete(stream_id)
