"""The load generator for what `vllm bench serve` cannot express: endless streams, conversations.

Thin on purpose: while tokens arrive it notes the time and keeps the bytes; events are parsed when
the request is over.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.serving.arrivals import Log

MODEL_NAME = "model"
FIRST_WORD = 3  # token ids below are special in the repository's model
VOCABULARY = 1024


class LoadError(Exception):
    """A request failed, or brought something else than was asked for."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked for greedy tokens behind token ids, and how it says them."""

    path: str
    options: dict[str, Any]
    """Beside prompt and number of tokens."""
    most: str
    """The option for the number of tokens."""
    mark: bytes
    """Stands once in every event that brings tokens."""

    def body(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        return {**self.options, "prompt": list(prompt), self.most: tokens}

    @staticmethod
    def ids(event: dict[str, Any]) -> list[int]:
        """Token ids of an event."""
        if "choices" not in event:
            return list(event.get("tokens") or [])
        return [token for choice in event["choices"] for token in choice.get("token_ids") or []]


OPENAI = Dialect(
    path="/v1/completions",
    options={
        "model": MODEL_NAME,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    },
    most="max_tokens",
    mark=b'"token_ids":[',
)


@dataclass(frozen=True, slots=True)
class Client:
    """What an application does about the length of its streams.

    ``keep``: tokens of history sent with each request; None: the stream is one request.
    ``chunk``: tokens generated per request.
    """

    keep: int | None = None
    chunk: int | None = None
    dialect: Dialect = OPENAI


@dataclass(slots=True)
class Limit:
    """Ends a run ``seconds`` after each of its ``streams`` has had a token; 0: never."""

    streams: int
    seconds: float
    _until: float = float("inf")

    def begun(self) -> None:
        """One more stream has had its first token."""
        self.streams -= 1
        if self.streams == 0 and self.seconds:
            self._until = time.perf_counter() + self.seconds

    def over(self) -> bool:
        return time.perf_counter() > self._until


NO_LIMIT = Limit(0, 0.0)


@asynccontextmanager
async def connection() -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as there are streams, no time limit.

    A new one per request: llama.cpp's server closes what was idle for some seconds, perhaps just
    when the next request is sent on it.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=1 << 20,
    ) as http:
        yield http


def words(count: int, *seed: object) -> list[int]:
    """``count`` token ids, BOS first; no two seeds share a page."""
    draw = random.Random(repr(seed))
    return [0, *(draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(count - 1))]


async def complete(
    http: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    tokens: int,
    log: Log,
    limit: Limit,
    arrived: Callable[[int], None],
    dialect: Dialect = OPENAI,
) -> tuple[list[int], dict[str, Any]]:
    """One streamed completion; its tokens go into ``log``; token ids and usage come back.

    Left unfinished (which aborts it in the server) when ``limit`` is over.

    Raises:
        LoadError: the server refused it or broke off.
    """
    pieces: list[tuple[float, bytes]] = []
    first, over = not log.arrivals, False
    body = dialect.body(prompt, tokens)
    async with http.post(f"{url}{dialect.path}", json=body) as answer:
        if answer.status != 200:
            raise LoadError(f"HTTP {answer.status}: {(await answer.text())[:500]}")
        async for data in answer.content.iter_any():
            pieces.append((time.perf_counter(), data))
            if count := data.count(dialect.mark):
                arrived(count)
                if first:
                    limit.begun()
                    first = False
            if over := limit.over():
                break
    return parse(pieces, log, broken_off=over, expected=tokens)


def parse(
    pieces: Sequence[tuple[float, bytes]], log: Log, *, broken_off: bool, expected: int
) -> tuple[list[int], dict[str, Any]]:
    """Token ids of a response, with their arrivals added to ``log``, and its usage."""
    ids: list[int] = []
    usage: dict[str, Any] = {}
    rest = b""
    for when, data in pieces:
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: {"):
                continue
            content = json.loads(event.removeprefix(b"data: "))
            if "error" in content:
                raise LoadError(f"the server broke off: {content['error']}")
            usage = content.get("usage") or usage
            new = Dialect.ids(content)
            ids += new
            log.arrivals += [when] * len(new)
    if not broken_off and len(ids) != expected:
        raise LoadError(f"{len(ids)} tokens arrived where {expected} were asked for")
    return ids, usage


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    client: Client,
    prompt: Sequence[int],
    tokens: int,
    limit: Limit,
    arrived: Callable[[int], None],
) -> Log:
    """One stream of ``tokens`` tokens, as one request or as many."""
    log = Log(prompt=len(prompt), started=time.perf_counter())
    history = list(prompt)
    while len(log.arrivals) < tokens and not limit.over():
        missing = tokens - len(log.arrivals)
        if log.arrivals:
            log.restarts.append(len(log.arrivals))
        sent = history if client.keep is None else history[-client.keep :]
        chunk = missing if client.chunk is None else min(client.chunk, missing)
        new, _ = await complete(http, url, sent, chunk, log, limit, arrived, client.dialect)
        history += new
        if client.keep is not None:
            history = history[-client.keep :]
    return log


async def streams(
    url: str,
    client: Client,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    seconds: float,
    arrived: Callable[[int], None],
) -> list[Log]:
    """All streams at once, cut off by :class:`Limit`."""
    limit = Limit(len(prompts), seconds)
    async with connection() as http:
        return list(
            await asyncio.gather(
                *(stream(http, url, client, p, tokens, limit, arrived) for p in prompts)
            )
        )


@dataclass(slots=True)
class Turn:
    """One turn of a conversation; tokens and seconds."""

    conversation: int
    turn: int
    prompt: int
    cached: int
    new: int
    first_token: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Talk:
    """What conversations of a run have in common; tokens."""

    seed: object
    turns: int
    question: int
    answer: int
    keep: int | None
    """History resent with every turn; None: all of it."""


async def conversation(
    http: aiohttp.ClientSession, url: str, number: int, talk: Talk, arrived: Callable[[int], None]
) -> list[Turn]:
    """One conversation, each turn as soon as the one before is answered."""
    history: list[int] = []
    made = []
    for turn in range(talk.turns):
        asked = words(talk.question, talk.seed, number, turn)
        history += asked if turn == 0 else asked[1:]
        sent = history if talk.keep is None else history[-talk.keep :]
        log = Log(prompt=len(sent), started=time.perf_counter())
        new, usage = await complete(http, url, sent, talk.answer, log, NO_LIMIT, arrived)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        made.append(
            Turn(
                conversation=number,
                turn=turn,
                prompt=len(sent),
                cached=cached,
                new=talk.question + talk.answer,
                first_token=log.arrivals[0] - log.started,
                seconds=log.arrivals[-1] - log.started,
            )
        )
        history += new
    return made


async def conversations(
    url: str, number: int, talk: Talk, arrived: Callable[[int], None]
) -> list[Turn]:
    """``number`` conversations at once."""
    async with connection() as http:
        made = await asyncio.gather(
            *(conversation(http, url, n, talk, arrived) for n in range(number))
        )
    return [turn for turns in made for turn in turns]
