"""A chat over `/v1/streams`: only what is new is sent, however long the conversation gets.

    VLLM_PLUGINS=sink_vllm vllm serve MODEL --kv-policy sink
    python -m examples.streams_client --url http://localhost:8000 [--system "You are …"]

Type a line and read the answer; an empty line ends the chat and deletes the stream. A stream the
server has forgotten (it keeps a bounded number of them) is created again from the messages that
this client remembers.
"""

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import httpx


class Stream(TypedDict):
    """Some of what `/docs` of the server says of a stream."""

    position: int
    evicted: int


class Usage(TypedDict):
    computed_tokens: int
    resumed_from: str | None


class Appended(TypedDict):
    text: str | None
    usage: Usage
    stream: Stream


class StreamError(Exception):
    """An answer that had begun has failed; the stream is as it was before."""


class StreamsClient:
    """The routes of one server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=600)

    def create(self, **options: Any) -> str:
        """A new stream; returns its id."""
        return str(self._json(self._http.post("/v1/streams", json=options))["id"])

    def append(self, stream_id: str, key: str | None = None, **body: Any) -> Appended:
        """Append and wait for the whole answer; again with the same ``key`` if it was lost."""
        headers = {} if key is None else {"Idempotency-Key": key}
        path = f"/v1/streams/{stream_id}/append"
        return cast(Appended, self._json(self._http.post(path, json=body, headers=headers)))

    def events(self, stream_id: str, **body: Any) -> Iterator[dict[str, Any]]:
        """Append and yield the answer's events; the last one is the account of the turn.

        Raises:
            StreamError: the server has given the generation up.
        """
        path = f"/v1/streams/{stream_id}/append"
        with self._http.stream("POST", path, json={"stream": True, **body}) as answer:
            if answer.is_error:
                answer.read()
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise StreamError(event["error"]["message"])
                yield event

    def get(self, stream_id: str) -> Stream:
        return cast(Stream, self._json(self._http.get(f"/v1/streams/{stream_id}")))

    def delete(self, stream_id: str) -> None:
        self._json(self._http.delete(f"/v1/streams/{stream_id}"))

    @staticmethod
    def _json(answer: httpx.Response) -> Any:
        if answer.is_error:
            raise httpx.HTTPStatusError(
                answer.json()["error"]["message"], request=answer.request, response=answer
            )
        return answer.json()


class Chat:
    """A conversation that survives being forgotten by the server."""

    def __init__(self, client: StreamsClient, system: str | None, pin: bool) -> None:
        self._client = client
        self._options: dict[str, Any] = {"sink_pin": "system"} if pin and system else {}
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._stream_id = self._create(self._messages)

    def _create(self, messages: list[dict[str, str]]) -> str:
        content = {"messages": messages} if messages else {}
        return self._client.create(**self._options, **content)

    def ask(self, question: str, **generate: Any) -> Iterator[str]:
        """The answer to ``question``, piece by piece."""
        message = {"role": "user", "content": question}
        try:
            yield from self._answer([message], generate)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.NOT_FOUND:
                raise
            self._stream_id = self._create(self._messages)
            yield from self._answer([message], generate)

    def _answer(self, messages: list[dict[str, str]], generate: dict[str, Any]) -> Iterator[str]:
        answer = ""
        for event in self._client.events(self._stream_id, messages=messages, generate=generate):
            if event["object"] == "stream.delta":
                answer += event["text"]
                yield event["text"]
            else:
                stream, usage = event["stream"], event["usage"]
                yield (
                    f"\n  [position {stream['position']}, evicted {stream['evicted']}, "
                    f"computed {usage['computed_tokens']}]\n"
                )
        self._messages += [*messages, {"role": "assistant", "content": answer}]

    def close(self) -> None:
        self._client.delete(self._stream_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--system", help="system prompt; its tokens are pinned")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    client = StreamsClient(args.url, os.environ.get("VLLM_API_KEY"))
    chat = Chat(client, args.system, pin=True)
    while question := input("> "):
        for piece in chat.ask(question, max_tokens=args.max_tokens):
            print(piece, end="", flush=True)
    chat.close()


if __name__ == "__main__":
    main()
