"""Malformed and extreme requests: what careless, broken and hostile clients send."""

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
MESSAGES = [{"role": "user", "content": "hi"}]
HUGE = 10**30

FIELDS: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, "8", "many", [], {}, True, 2**31, 2**63, HUGE, -HUGE],
    "min_tokens": [-1, 9, 2**31, HUGE, "x", None],
    "temperature": [-1, 3, 1e308, -1e308, "hot", [], None],
    "top_p": [0, -1, 2, 1e-300, "x", None],
    "top_k": [-2, 0, 10**9, 2**40, "x"],
    "min_p": [-1, 2, "x"],
    "n": [0, -1, 3, 10**6, HUGE, 1.5, "x", None],
    "seed": [-1, 2**63, 2**64, HUGE, "x", None],
    "stop": ["", [""], 5, [5], ["x"] * 500, "x" * 10_000, [None], {}],
    "stop_token_ids": [[-1], [10**9], ["x"], 5, list(range(300)), [HUGE]],
    "logit_bias": [{"a": 1}, {"99999": 1}, {"-1": 1}, {"97": "x"}, {"97": 1e308}, []],
    "presence_penalty": [-3, 3, "x"],
    "frequency_penalty": [-3, 3, 1e308],
    "repetition_penalty": [-1, 0, 1e-300, 1e308, "x"],
    "logprobs": [-1, 0, 5, 10**6, HUGE, "x", True],
    "prompt_logprobs": [-2, 0, 10**6, "x", HUGE],
    "stream": ["perhaps", 2, None, {}],
    "stream_options": [{"include_usage": "x"}, [], "x"],
    "response_format": [{"type": "x"}, {"type": "json_schema"}, 5],
    "structured_outputs": [{"regex": "("}, {"json": "{"}, {"grammar": "?"}, {"choice": []}],
    "truncate_prompt_tokens": [-5, 0, 1, 10**9, HUGE, "x"],
    "allowed_token_ids": [[], [-1], [10**9], "x"],
    "bad_words": [[""], ["\ufffd"], 5, [5]],
    "priority": ["x", HUGE, 1.5],
    "ignore_eos": ["x", 5],
    "echo": ["x", 5],
    "cache_salt": ["", 5],
    "kv_transfer_params": [5, {"do_remote_prefill": True}, {"streaming_llm": 1}],
    "vllm_xargs": [5, {"x": {"y": 1}}, {"kv_policy": "nonsense"}, {"sink_tokens": -1}],
    "skip_special_tokens": ["x", []],
    "model": ["", "nobody", None, 5, "x" * 100_000],
    "unknown_field": [1],
}
PROMPTS: list[Any] = [
    *(None, "", " ", [], [[]], [""], 5, 1.5, True, {}, [None], [1.5], [[1.5]], ["a", 1]),
    *([-1], [10**9], [HUGE], [300], [299], [[1], []], [[1], [-1]], [True]),
    *("\x00", "\ufffd" * 500, "\U0010ffff" * 300, "a" * 127, "a" * 128, "a" * 129),
    *("a" * 10_000, [97] * 10_000, [["x"]], [[[1]]], [[97] * 129] * 20, ["a"] * 50),
]
CONVERSATIONS: list[Any] = [
    *(None, [], "x", {}, [None], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}]),
    *([{"role": "", "content": "x"}], [{"role": "nobody", "content": "x"}]),
    *([{"role": "user", "content": content}] for content in (None, 5, [], [5], [{"type": "x"}])),
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x" * 3000}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": 5}]}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": "x" * 5000}] * 5,
    [{"role": "user", "content": "x"}] * 2000,
]
BODIES = [b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe", b"{" * 5000, b'{"a":' * 5000]
BODIES += [b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b"\x00" * 1000]
MILLION = 10**6


@dataclass(frozen=True, slots=True)
class BadRequest:
    name: str
    path: str
    body: Any
    """JSON, or the bytes to send."""
    read: int | None = None
    """Bytes of the answer to read before disconnecting; ``None``: all of it."""
    patience: float = 120
    """Seconds without a byte after which the client leaves."""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def send(self, http: httpx.Client) -> int | None:
        """Status of the answer; 0 if the client left before it came; ``None`` without one."""
        content = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        status: int | None = 0 if self.patience < 60 else None
        with (
            contextlib.suppress(httpx.TransportError),
            http.stream(
                self.method,
                self.path,
                content=content,
                headers=self.headers,
                timeout=self.patience,
            ) as answer,
        ):
            status = answer.status_code
            taken = 0
            for piece in answer.iter_raw():
                taken += len(piece)
                if self.read is not None and taken >= self.read:
                    break
        return status


def bad_requests(number: int, seed: int = 0) -> list[BadRequest]:
    """``number`` requests, in a random order that is always the same."""
    rng = random.Random(seed)
    fixed = [*_fields(), *_inputs(), *_transport(), *_leaving()]
    leaving = [request for request in fixed if request.read is not None or request.patience < 60]
    while len(fixed) < number:
        fixed.append(rng.choice(leaving))
    rng.shuffle(fixed)
    assert len(fixed) >= number
    return fixed


def _fields() -> Iterator[BadRequest]:
    for name, values in FIELDS.items():
        for index, value in enumerate(values):
            path = (COMPLETIONS, CHAT)[index % 2]
            body = {**BASE, "prompt": "hello", "messages": MESSAGES, name: value}
            yield BadRequest(f"{path} {name}={value!r:.60}", path, body)


def _inputs() -> Iterator[BadRequest]:
    for prompt in PROMPTS:
        yield BadRequest(f"prompt {prompt!r:.60}", COMPLETIONS, {**BASE, "prompt": prompt})
    for messages in CONVERSATIONS:
        yield BadRequest(f"messages {messages!r:.60}", CHAT, {**BASE, "messages": messages})
    values: list[Any] = [None, 5, [], {}, "x" * 10_000, [-1], [HUGE]]
    for path in ("/v1/responses", "/tokenize", "/detokenize"):
        for value in values:
            body = {"model": "tiny", "input": value, "prompt": value, "tokens": value}
            yield BadRequest(f"{path} {value!r:.60}", path, {**body, "max_output_tokens": 8})


def _transport() -> Iterator[BadRequest]:
    for body in BODIES:
        yield BadRequest(f"body {body[:20]!r}", COMPLETIONS, body)
    yield BadRequest("no content type", CHAT, b"{}", headers={})
    yield BadRequest("form", CHAT, b"a=b", headers={"Content-Type": "text/plain"})
    yield BadRequest("unknown path", "/v1/nothing", b"{}")
    yield BadRequest("wrong method", COMPLETIONS, b"", method="GET")


def _leaving() -> Iterator[BadRequest]:
    """Clients that disconnect: at once, in the middle of a stream, while the prompt is computed."""
    for length in (1, 50, 129, 1000, 5000):
        body = {**BASE, "prompt": [97] * length, "max_tokens": 10**6, "ignore_eos": True}
        yield BadRequest(f"leaves after {length} tokens", COMPLETIONS, body, patience=1)
        for read in (1, 2000, 20_000):
            stream = {**body, "stream": True}
            yield BadRequest(f"leaves a stream, prompt {length}", COMPLETIONS, stream, read=read)
    for prompt in ([97] * MILLION, "a" * MILLION):
        body = {**BASE, "prompt": prompt}
        yield BadRequest("a million tokens, no patience", COMPLETIONS, body, patience=5)
    endless = {**BASE, "messages": MESSAGES, "max_tokens": None, "ignore_eos": True, "n": 3}
    yield BadRequest("leaves a chat", CHAT, {**endless, "stream": True}, read=50_000)
    yield BadRequest("a hundred thousand tokens", COMPLETIONS, {**BASE, "prompt": [98] * 10**5})
