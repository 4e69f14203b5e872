"""What an open streamed response takes in the API server does not depend on its prompt.

A real server counts the bytes of all its Python objects (tests/support/memory_probe.py). With
``LONG_PROMPT=1000000`` the prompts are as long as in the claim of docs/service.md.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.conftest import ModelFactory
from tests.support.memory_probe import MIDDLEWARE, PATH
from tests.support.paths import ROOT
from tests.support.serving import Client, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = int(os.environ.get("LONG_PROMPT", "100000"))  # tokens
SHORT = 100  # tokens
OPEN = 2  # responses at once
BEGUN = 20  # events


@pytest.fixture(scope="module")
def client(tiny_llama: ModelFactory) -> Iterator[Client]:
    # Cut prompts are not computed: what matters here is what is kept of them.
    flags = ("--sink-prompt", "truncate", "--middleware", MIDDLEWARE)
    root = str(ROOT)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    model = tiny_llama(TinyLlama())
    with tiny_server(model, *flags, environment={"PYTHONPATH": path}) as server:
        server.wait(lambda _waited: None)
        yield Client(server)


def _ids(length: int, salt: int) -> dict[str, Any]:
    # Above 256, which are objects of their own to Python.
    return {"prompt": [260 + (salt + 7 * index) % 40 for index in range(length)]}


def _text(length: int, salt: int) -> dict[str, Any]:
    return {"prompt": f"{salt:03}" + "a" * (length - 3)}  # a token per byte


def _chat(length: int, salt: int) -> dict[str, Any]:
    around = len("<user>\n<assistant>")
    return {"messages": [{"role": "user", "content": _text(length - around, salt)["prompt"]}]}


CASES = {
    "token ids": (COMPLETIONS, _ids, {}),
    "text": (COMPLETIONS, _text, {"echo": True, "return_token_ids": True, "n": 2}),
    "chat": (CHAT, _chat, {}),
    "chat that returns ids": (CHAT, _chat, {"return_token_ids": True, "n": 2}),
}


@contextmanager
def _open_response(client: Client, path: str, body: dict[str, Any]) -> Iterator[None]:
    """A response that is read for as long as the context lasts, after its first events."""
    begun, left = threading.Event(), threading.Event()

    def read() -> None:
        for number, _ in enumerate(client.chunks(path, **body)):
            if number == BEGUN:
                begun.set()
            if left.is_set():
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert begun.wait(300)
        yield
    finally:
        left.set()
        reader.join()


def _bytes_per_open_response(client: Client, case: str, length: int) -> float:
    path, prompt, options = CASES[case]
    endless = {"max_tokens": 10**9, "temperature": 1, **options}
    before = int(client.http.get(PATH).text)
    with ExitStack() as responses:
        for salt in range(OPEN):
            body = {**endless, **prompt(length, salt)}
            responses.enter_context(_open_response(client, path, body))
        after = int(client.http.get(PATH).text)
        rss = client.server.rss()
    client.wait_idle()
    each = (after - before) / OPEN
    print(f"{case}, {length} tokens: {each / 1024:.0f} KiB each; {rss}")
    return each


@pytest.mark.parametrize("case", CASES)
def test_prompt_is_not_kept_while_a_response_is_open(client: Client, case: str) -> None:
    # What caches take at one time or another (the tokenizer's know 100,000 tokens by 10 bytes each)
    # does not come again with the same prompt; what a response keeps does.
    short, long = (
        min(_bytes_per_open_response(client, case, length) for _ in range(2))
        for length in (SHORT, LONG)
    )

    assert long - short < LONG / 2  # the text alone, of ASCII, is a byte per token


def _usages(chunks: list[dict[str, Any]]) -> set[int]:
    return {chunk["usage"]["prompt_tokens"] for chunk in chunks if chunk.get("usage")}


USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize("give", [_ids, _text])
def test_a_completion_tells_the_whole_prompt_and_counts_it(client: Client, give: Any) -> None:
    """Every choice has the prompt once, every event its length."""
    length = 3000
    text = give is _text
    prompts = [give(length, salt)["prompt"] for salt in (1, 2)]
    body = {"prompt": prompts, "n": 2, "temperature": 1, "max_tokens": 40, "logprobs": None}
    asked = {"echo": text, "return_token_ids": not text, "stream_options": USAGE}

    chunks = list(client.chunks(COMPLETIONS, **body, **asked))

    choices: dict[int, list[dict[str, Any]]] = {index: [] for index in range(4)}
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices[choice["index"]].append(choice)
    for index, told in choices.items():
        prompt = prompts[index // 2]
        if text:
            assert told[0]["text"].startswith(prompt)
            assert not any(prompt[:100] in choice["text"] for choice in told[1:])
        else:
            ids = [choice.get("prompt_token_ids") for choice in told]
            assert ids == [prompt, *[None] * (len(told) - 1)]
            assert sum(len(choice["token_ids"]) for choice in told) == 40
    assert _usages(chunks) == {length, 2 * length}
    assert chunks[-1]["usage"]["completion_tokens"] == 4 * 40


def test_a_chat_tells_the_whole_prompt_and_counts_it(client: Client) -> None:
    body = {**_chat(3000, 1), "n": 2, "temperature": 1, "max_tokens": 40}

    chunks = list(client.chunks(CHAT, **body, return_token_ids=True, stream_options=USAGE))
    whole = client.ask(CHAT, **body)

    ids = [chunk["prompt_token_ids"] for chunk in chunks if chunk.get("prompt_token_ids")]
    assert [len(told) for told in ids] == [3000, 3000]  # before the first token of each choice
    assert _usages(chunks) == {3000} == {whole["usage"]["prompt_tokens"]}
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * 40
    assert {chunk["choices"][0]["delta"].get("role") for chunk in chunks if chunk["choices"]} == {
        "assistant",
        None,
    }
