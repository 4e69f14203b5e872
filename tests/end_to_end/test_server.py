"""One real `vllm serve --kv-policy sink` over HTTP: lengths, reports, metrics, endless chats."""

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import ModelFactory
from tests.support.bad_requests import bad_requests
from tests.support.serving import (
    CAPACITY,
    SCHEDULE,
    Client,
    evicted,
    prompt_of,
    report,
    tiny_server,
)
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "tell me everything"}]


@pytest.fixture(scope="module")
def client(tiny_llama: ModelFactory) -> Iterator[Client]:
    with tiny_server(tiny_llama(TinyLlama())) as server:
        server.wait(lambda _waited: None)
        yield Client(server)


@pytest.mark.parametrize(
    "num_tokens", [1, CAPACITY - 1, CAPACITY, CAPACITY + 1, 5 * CAPACITY, 3000]
)
def test_prompts_of_any_length(client: Client, num_tokens: int) -> None:
    answer = client.complete(prompt=prompt_of(num_tokens), max_tokens=20)

    assert answer["usage"]["prompt_tokens"] == num_tokens
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["choices"][0]["finish_reason"] == "length"
    told = report(answer)
    if evicted(num_tokens, 20) == 0:
        assert answer["kv_transfer_params"] is None
    else:
        assert told is not None
        assert told["evicted_tokens"] == evicted(num_tokens, 20)
        assert told["stream_position"] == num_tokens + 20


def test_stream_is_the_answer_in_pieces(client: Client) -> None:
    body = {"prompt": prompt_of(50), "max_tokens": 500, "logprobs": 1}
    whole = client.complete(**body)
    chunks = list(client.chunks(COMPLETIONS, **body, stream_options={"include_usage": True}))

    *pieces, usage = chunks
    choices = [piece["choices"][0] for piece in pieces]
    expected = whole["choices"][0]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    assert logprobs == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-4)
    assert len(logprobs) == 500
    assert usage["usage"].items() <= whole["usage"].items()
    assert [report(piece) for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert report(pieces[-1]) == report(whole)
    assert report(whole) is not None


def test_short_answers_are_as_ever(client: Client) -> None:
    body = {"prompt": prompt_of(20), "max_tokens": 30}

    answer, *chunks = [client.complete(**body), *client.chunks(COMPLETIONS, **body)]

    assert answer["kv_transfer_params"] is None
    # vLLM 0.33 says null of every choice that ends.
    assert all(chunk.get("kv_transfer_params") is None for chunk in chunks)


def test_several_choices_and_prompts_are_told_apart(client: Client) -> None:
    lengths = (30, 400)
    answer = client.complete(
        prompt=[prompt_of(length) for length in lengths], max_tokens=40, n=2, temperature=1
    )
    told = report(answer)
    assert told is not None
    assert len(answer["choices"]) == 4
    assert [choice["index"] for choice in told["choices"]] == [2, 3]
    assert told["evicted_tokens"] == 2 * evicted(400, 40)

    body = {"messages": MESSAGES, "max_tokens": 200, "n": 2, "temperature": 1}
    last = {
        chunk["choices"][0]["index"]: chunk
        for chunk in client.chunks(CHAT, **body)
        if chunk["choices"][0]["finish_reason"]
    }
    assert sorted(last) == [0, 1]
    for chunk in last.values():
        told = report(chunk)
        assert told is not None
        assert told["evicted_tokens"] == SCHEDULE.evicted(told["stream_position"] - 1)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_behind_evictions(client: Client, include: bool) -> None:
    body = {"prompt": prompt_of(60), "max_tokens": 400, "include_stop_str_in_output": include}
    text = client.complete(**body)["choices"][0]["text"]
    stop = next(  # a piece of the second half that does not occur before
        text[at : at + 5]
        for at in range(len(text) // 2, len(text))
        if text.find(text[at : at + 5]) == at
    )

    answer = client.complete(**body, stop=[stop])
    chunks = list(client.chunks(COMPLETIONS, **body, stop=[stop]))

    expected = text[: text.index(stop) + (len(stop) if include else 0)]
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    for told in (report(answer), report(chunks[-1])):
        assert told is not None
        assert told["stream_position"] == 60 + answer["usage"]["completion_tokens"]
        assert 0 < told["evicted_tokens"] <= SCHEDULE.evicted(told["stream_position"])


def test_chat_without_max_tokens_goes_on_until_the_client_leaves(client: Client) -> None:
    for wanted in (0, 5 * CAPACITY):  # none: the client leaves while the prompt is computed
        chunks = client.chunks(CHAT, messages=MESSAGES, stream_options={"include_usage": True})
        for _ in itertools.islice(chunks, wanted):
            pass
        chunks.close()  # type: ignore[attr-defined]

        client.wait_idle()


def test_responses(client: Client) -> None:
    body = {"input": "tell me everything", "max_output_tokens": 300}
    answer = client.ask("/v1/responses", **body)
    *_, last = client.chunks("/v1/responses", **body)

    assert answer["usage"]["output_tokens"] == 300
    assert report(answer) is not None
    assert report(last["response"]) == report(answer)


@pytest.mark.parametrize("max_tokens", [2**31, 2**63, 10**30, -1, "many"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_absurd_max_tokens(client: Client, path: str, max_tokens: Any) -> None:
    answer = client.post(path, prompt="a", messages=MESSAGES, max_tokens=max_tokens)

    assert answer.status_code == 400
    assert "max_tokens" in answer.json()["error"]["message"]


def test_most_tokens_that_can_be_asked_for(client: Client) -> None:
    chunks = client.chunks(COMPLETIONS, prompt=prompt_of(300), max_tokens=2**31 - 1)
    assert len(list(itertools.islice(chunks, 50))) == 50
    chunks.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"use_beam_search": True, "n": 2}),
        (CHAT, {"use_beam_search": True, "n": 2}),
        (COMPLETIONS, {"prompt_logprobs": 1}),
        (COMPLETIONS, {"echo": True, "logprobs": 1}),
    ],
)
def test_requests_the_policy_refuses(client: Client, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": prompt_of(CAPACITY + 1), "messages": MESSAGES, "max_tokens": 5, **fields}

    answer = client.post(path, **body)

    assert answer.status_code == 400, answer.text


def test_no_context_limit_is_claimed(client: Client) -> None:
    (card,) = client.http.get("/v1/models").json()["data"]
    assert card["max_model_len"] is None

    counted = client.ask("/tokenize", prompt="a" * 3000)
    assert counted["count"] >= 3000
    assert counted["max_model_len"] > 10**9


def test_metrics_count_what_the_answers_report(client: Client) -> None:
    client.wait_idle()
    names = ("streams_evicted", "evicted_tokens", "evictions")
    before = [client.counter(f"sink_vllm:{name}_total") for name in names]

    told = report(client.complete(prompt=prompt_of(300, salt=11), max_tokens=300))
    client.complete(prompt=prompt_of(30, salt=11), max_tokens=5)
    client.wait_idle()

    assert told is not None
    after = [client.counter(f"sink_vllm:{name}_total") for name in names]
    grown = [now - then for now, then in zip(after, before, strict=True)]
    assert grown == [1, told["evicted_tokens"], told["evictions"]]
    assert client.counter("sink_vllm:reanchorings_total") > 0


def test_answers_to_three_hundred_bad_requests(client: Client) -> None:
    """Refused with a reason or answered; nothing hangs, nothing is lost, nothing is damaged."""
    question = {"prompt": prompt_of(200), "max_tokens": 100}
    before = client.complete(**question)["choices"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda bad: (bad.name, bad.send(client.http)), bad_requests(300)))

    wrong = [(name, status) for name, status in answers if status is None or status >= 500]
    assert wrong == [], client.server.log_tail(60)
    statuses = Counter(status for _, status in answers)
    assert min(statuses[200], statuses[400]) > 30, statuses
    client.wait_idle()
    assert client.server.healthy()
    assert client.complete(**question)["choices"] == before


@pytest.mark.slow
def test_two_api_servers(tiny_llama: ModelFactory) -> None:
    with tiny_server(tiny_llama(TinyLlama()), "--api-server-count", "2") as server:
        server.wait(lambda _waited: None)
        client = Client(server)
        told = []
        for salt in (1, 3, 5, 7, 9, 11):
            client.http.close()
            client = Client(server)  # a new connection may reach the other process
            answer = client.complete(prompt=prompt_of(500, salt), max_tokens=100)
            told.append(report(answer))

        assert [one["evicted_tokens"] for one in told if one] == [evicted(500, 100)] * 6
        client.wait_idle()
        assert client.counter("sink_vllm:evicted_tokens_total") == 6 * evicted(500, 100)
        (card,) = client.http.get("/v1/models").json()["data"]
        assert card["max_model_len"] is None
