"""``--sink-max-stream-tokens``: no request has more tokens of prompt and output, however it comes.

Which numbers come out of which request is in tests/policy/test_request_options.py;
``AsyncLLM`` is in ``test_async_llm.py``.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ModelFactory
from tests.support.serving import Client, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

MOST = 300
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SENTENCE = f"--sink-max-stream-tokens={MOST}: a prompt of "


@pytest.fixture(scope="module")
def client(tiny_llama: ModelFactory) -> Iterator[Client]:
    flags = ("--sink-max-stream-tokens", str(MOST))
    plugins = {"VLLM_PLUGINS": "sink_vllm"}
    with tiny_server(tiny_llama(TinyLlama()), *flags, environment=plugins) as server:
        server.wait(lambda _waited: None)
        yield Client(server)


def _chat(tokens: int) -> dict[str, Any]:
    around = len("<user>\n<assistant>")
    return {"messages": [{"role": "user", "content": "a" * (tokens - around)}]}


def _prompt(path: str, tokens: int) -> dict[str, Any]:
    return _chat(tokens) if path == CHAT else {"prompt": prompt_of(tokens)}


@pytest.mark.parametrize("tokens", [50, MOST - 1])
@pytest.mark.parametrize(
    ("path", "given"),
    [(COMPLETIONS, {"max_tokens": 10**6}), (CHAT, {"max_tokens": 251}), (CHAT, {})],
)
def test_requests_end_at_the_bound(
    client: Client, path: str, tokens: int, given: dict[str, Any]
) -> None:
    body = {**_prompt(path, tokens), "n": 2, "temperature": 1, "seed": 1, **given}

    answer = client.ask(path, **body)
    usage = {"include_usage": True}
    chunks = list(client.chunks(path, **body, stream_options=usage))

    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2 == reasons
    for told in (answer["usage"], chunks[-1]["usage"]):
        assert told["prompt_tokens"] == tokens
        assert told["completion_tokens"] == 2 * (MOST - tokens)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_without_room_are_refused_before_anything_starts(
    client: Client, path: str, stream: bool
) -> None:
    answer = client.post(path, **_prompt(path, MOST), max_tokens=1, stream=stream)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{SENTENCE}{MOST} tokens leaves no room")


def test_one_prompt_of_several_without_room_refuses_all(client: Client) -> None:
    prompts = [prompt_of(10), prompt_of(MOST)]

    answer = client.post(COMPLETIONS, prompt=prompts, max_tokens=1, stream=True)

    assert answer.status_code == 400
    client.wait_idle()


def test_stored_streams_are_bounded_as_a_whole(client: Client) -> None:
    stream = client.http.post("/v1/streams", json={"tokens": prompt_of(200)}).json()["id"]
    path = f"/v1/streams/{stream}/append"
    generate = {"temperature": 0, "ignore_eos": True, "max_tokens": 60}

    first = client.http.post(path, json={"generate": generate}).json()
    last = client.http.post(path, json={"tokens": [97] * 10, "generate": generate}).json()
    refused = client.http.post(path, json={"tokens": [97], "generate": generate})

    assert first["usage"]["generated_tokens"] == 60
    assert last["usage"]["generated_tokens"] == 30
    assert last["finish_reason"] == "length"
    assert last["stream"]["position"] == MOST
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(f"{SENTENCE}{MOST + 1} tokens")
    assert client.http.get(f"/v1/streams/{stream}").json()["position"] == MOST


def test_models_state_the_bound(client: Client) -> None:
    assert client.http.get("/v1/models").json()["data"][0]["max_model_len"] == MOST
