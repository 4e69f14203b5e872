"""Conversations against a Ray Serve application, each pinned to a replica by its session id.

    python -m examples.ray_serve.client [--url http://127.0.0.1:8000] [--sessions 4] [--turns 5]

A conversation resends its whole history with every turn, as chat clients do, and names itself in
the header ``x-session-id``. When an answer breaks off, because its replica has died, the same
request is sent again: the history is all another replica needs to go on.
"""

import argparse
import asyncio
import inspect
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

MODEL = "pystream"
SESSION_HEADER = "x-session-id"
RETRY_AFTER = 0.5  # seconds between attempts
GIVE_UP_AFTER = 60.0  # seconds a turn may take with all its attempts
MESSAGE_LINES = 6  # of Python source per message: about 60 tokens of the small model


class BrokenAnswer(Exception):
    """The answer ended before the model did."""


@dataclass(slots=True)
class Turn:
    """One answered turn of a conversation."""

    session: str
    number: int
    request_id: str
    started: float
    seconds: float
    first_token: float
    """Seconds from sending the attempt that succeeded to its first token."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    new_tokens: int
    """Prompt tokens that are neither an earlier prompt nor an answer to it."""
    errors: list[str] = field(default_factory=list)
    """What earlier attempts of this turn ended with."""

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(slots=True)
class Conversation:
    """A history that grows by one message and one answer per turn."""

    session: str
    lines: Sequence[str]
    """Text the user's messages are cut from."""
    max_tokens: int = 32
    messages: list[dict[str, str]] = field(default_factory=list)
    known_tokens: int = 0
    """Tokens of the prompt and the answer of the last turn."""
    turns: list[Turn] = field(default_factory=list)

    async def take_turn(self, http: httpx.AsyncClient) -> Turn:
        """Send the next message until it has been answered.

        Raises:
            TimeoutError: no attempt succeeded in time; names the last error.
        """
        number = len(self.turns)
        begin = number * MESSAGE_LINES % max(len(self.lines) - MESSAGE_LINES, 1)
        message = "\n".join(self.lines[begin : begin + MESSAGE_LINES])
        if not number:  # no two conversations begin alike, as with different users
            message = f"# {self.session}\n{message}"
        self.say(message)
        started, errors = time.monotonic(), list[str]()
        while True:
            attempt = time.monotonic()
            request_id = f"{self.session}-{number}-{len(errors)}"
            try:
                text, token_ids, first_token, usage = await self._ask(http, request_id)
                break
            except (httpx.HTTPError, BrokenAnswer) as error:
                errors.append(f"{type(error).__name__}: {error}"[:200])
                if time.monotonic() - started > GIVE_UP_AFTER:
                    raise TimeoutError(
                        f"turn {number} of {self.session} was not answered within "
                        f"{GIVE_UP_AFTER:.0f} s; the last error was {errors[-1]}"
                    ) from error
                await asyncio.sleep(RETRY_AFTER)
        self.remember(text, token_ids)
        turn = Turn(
            session=self.session,
            number=number,
            request_id=request_id,
            started=started,
            seconds=time.monotonic() - started,
            first_token=first_token - attempt,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            completion_tokens=usage["completion_tokens"],
            new_tokens=usage["prompt_tokens"] - self.known_tokens,
            errors=errors,
        )
        self.known_tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        self.turns.append(turn)
        return turn

    path: ClassVar[str] = "/v1/chat/completions"

    def say(self, message: str) -> None:
        """Append what the user says to the history."""
        self.messages.append({"role": "user", "content": message})

    def history(self) -> dict[str, Any]:
        """The history as part of a request."""
        return {"messages": self.messages}

    def remember(self, text: str, token_ids: list[int]) -> None:
        """Append the answer to the history."""
        self.messages.append({"role": "assistant", "content": text})

    async def _ask(
        self, http: httpx.AsyncClient, request_id: str
    ) -> tuple[str, list[int], float, dict[str, Any]]:
        """One attempt; returns text, token ids, the time of the first token, and the usage."""
        body = {
            "model": MODEL,
            **self.history(),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {SESSION_HEADER: self.session, "x-request-id": request_id}
        text, token_ids, first_token, usage, finished = "", list[int](), 0.0, None, False
        async with http.stream("POST", self.path, json=body, headers=headers) as answer:
            if answer.status_code != 200:
                content = (await answer.aread()).decode(errors="replace")
                raise BrokenAnswer(f"HTTP {answer.status_code}: {content}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise BrokenAnswer(str(event["error"]))
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    first_token = first_token or time.monotonic()
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                    token_ids += choice.get("token_ids") or ()
                    finished = finished or bool(choice.get("finish_reason"))
        if not finished or usage is None:
            raise BrokenAnswer("the stream ended without a finish reason")
        return text, token_ids, first_token, usage


def conversations(count: int, prefix: str = "session") -> list[Conversation]:
    """Conversations about different parts of the standard library."""
    source = (inspect.getsource(textwrap) + inspect.getsource(inspect)).splitlines()
    lines = [line for line in source if line.strip()]
    step = len(lines) // count
    return [
        Conversation(f"{prefix}-{index}", lines[index * step :] + lines[: index * step])
        for index in range(count)
    ]


def http_client(url: str) -> httpx.AsyncClient:
    """A client that opens a connection per request, as different users would."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=GIVE_UP_AFTER, limits=limits)


async def run(url: str, sessions: int, turns: int) -> None:
    """Run all conversations at once and print a line per turn."""
    print("session      turn  prompt tokens   cached  computed  new  seconds  retries")
    async with http_client(url) as http:

        async def run_one(conversation: Conversation) -> None:
            for _ in range(turns):
                turn = await conversation.take_turn(http)
                print(
                    f"{turn.session:<12} {turn.number:>4}  {turn.prompt_tokens:>13}  "
                    f"{turn.cached_tokens:>7}  {turn.computed_tokens:>8}  {turn.new_tokens:>3}  "
                    f"{turn.seconds:>7.2f}  {len(turn.errors):>7}",
                    flush=True,
                )

        await asyncio.gather(*map(run_one, conversations(sessions)))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(run(options.url, options.sessions, options.turns))


if __name__ == "__main__":
    main()
