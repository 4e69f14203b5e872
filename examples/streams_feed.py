"""Watch a log for days: lines in, alerts out, over one stored stream of `/v1/streams`.

    VLLM_PLUGINS=sink_vllm vllm serve MODEL --kv-policy sink --sink-streams-db streams.db
    tail -F /var/log/syslog | python -m examples.streams_feed --url http://localhost:8000

Lines that come while the model answers are sent together. Every append has a key of its own: one
whose answer was lost is asked for again, never appended twice. A server that is busy or restarts is
waited for; a stream it has forgotten is created again."""

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

SYSTEM = "You watch a log. Answer OK, or ALERT and the reason in one short sentence."
MOST_LINES = 200  # of one append
_LATER, _PATIENCE = (409, 429, 502, 503, 504), 1.0  # seconds, if the server names none


class Feed:
    """One stream, for as long as there are lines."""

    def __init__(self, url: str, api_key: str | None, system: str, max_tokens: int) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=600)
        self._system, self._max_tokens = system, max_tokens
        self.stream_id: str | None = None

    async def alerts(self, batches: AsyncIterator[list[str]]) -> AsyncIterator[str]:
        """What the model says of lines that are not OK."""
        async for lines in batches:
            answer = (await self.tell(lines)).strip()
            if not answer.startswith("OK"):
                yield answer

    async def tell(self, lines: list[str]) -> str:
        """The answer to ``lines``, which are in the stream exactly once afterwards."""
        body = {
            "messages": [{"role": "user", "content": "\n".join(lines)}],
            "generate": {"max_tokens": self._max_tokens, "temperature": 0},
        }
        key = {"Idempotency-Key": str(uuid.uuid4())}
        while True:
            if self.stream_id is None:
                options = {"system": self._system, "sink_pin": "system"}
                made = await self._ask("/v1/streams", options)
                self.stream_id = made.raise_for_status().json()["id"]
            answer = await self._ask(f"/v1/streams/{self.stream_id}/append", body, key)
            if answer.status_code != httpx.codes.NOT_FOUND:
                return str(answer.raise_for_status().json()["text"])
            self.stream_id = None

    async def _ask(self, path: str, body: Any, headers: Any = None) -> httpx.Response:
        """The same request until it is answered."""
        while True:
            wait = _PATIENCE
            try:
                answer = await self._http.post(path, json=body, headers=headers)
                if answer.status_code not in _LATER:
                    return answer
                wait = float(answer.headers.get("Retry-After", wait))
            except httpx.TransportError as error:
                print(repr(error), file=sys.stderr)
            await asyncio.sleep(wait)


async def batches(read: Callable[[], Awaitable[str]]) -> AsyncIterator[list[str]]:
    """Lines, as many at once as have come since somebody asked; until ``read`` gives none."""
    queue: asyncio.Queue[str] = asyncio.Queue(10 * MOST_LINES)  # then the source has to wait

    async def fill() -> None:
        while line := await read():
            await queue.put(line)
        await queue.put("")  # no line: those that are empty have their end

    filling, lines = asyncio.create_task(fill()), ["first"]
    while lines[-1]:
        lines = [await queue.get()]
        while not queue.empty() and len(lines) < MOST_LINES:
            lines.append(queue.get_nowait())
        if found := [line.rstrip() for line in lines if line.strip()]:
            yield found
    await filling


async def watch(url: str) -> None:
    feed = Feed(url, os.environ.get("VLLM_API_KEY"), SYSTEM, max_tokens=48)
    async for alert in feed.alerts(batches(lambda: asyncio.to_thread(sys.stdin.readline))):
        print(alert, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    asyncio.run(watch(parser.parse_args().url))
