"""One append to a stream, from the engine's first output to the account of what it cost."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from sink_vllm.service.models import Append, Appended, AppendUsage
from sink_vllm.service.store import StoredStream

if TYPE_CHECKING:
    from sink_vllm.service.service import StreamService


class Turn:
    """One append: the stream's tokens change when it ends, all at once.

    A turn that is closed early keeps what was generated up to then if somebody has read it;
    otherwise the stream is as it was.
    """

    def __init__(self, service: "StreamService", stream: StoredStream, request: Append) -> None:
        self._service, self._stream, self._request = service, stream, request
        self._before = (stream.options, stream.schedule)
        self._appended: list[int] = []
        self._generated: list[int] = []
        self._outputs: AsyncGenerator[RequestOutput, None] | None = None
        self._first: RequestOutput | None = None
        self._cached = 0
        self._finish_reason: str | None = None
        self._read = False
        self._committed = False
        self._closed = False

    async def start(self) -> None:
        """Render, and wait for the engine's first output: errors come before any answer."""
        service, stream, request = self._service, self._stream, self._request
        self._appended = await service.new_tokens(stream, request)
        tokens = [*stream.tokens, *self._appended]
        room = service.store.most_tokens - len(tokens)
        most = 1 if request.generate is None else request.generate.max_tokens or 1
        if most > room:
            raise VLLMValidationError(
                f"max_tokens={most} behind a stream of {len(tokens)} tokens is more than the "
                f"{service.store.most_tokens} tokens this server remembers of its streams "
                "(--sink-streams-tokens); use fewer, or create a new stream."
            )
        params = service.params(stream, request.generate, room)
        self._outputs = service.outputs(stream, tokens, params)
        self._first = await anext(self._outputs)
        self._cached = self._first.num_cached_tokens or 0

    async def deltas(self) -> AsyncGenerator[tuple[str, list[int]], None]:
        """Text and token ids as they are generated; nothing without generation."""
        assert self._outputs is not None
        output = self._first
        async with aclosing(self._outputs) as outputs:
            while output is not None:
                completion = output.outputs[0]
                if self._request.generate is not None:
                    self._generated += completion.token_ids
                    self._finish_reason = completion.finish_reason
                    self._read = True
                    yield completion.text, list(completion.token_ids)
                output = await anext(outputs, None)
        self._commit()

    async def close(self) -> None:
        """Give the stream back, however the turn ended."""
        if self._closed:
            return
        self._closed = True
        stream = self._stream
        if self._outputs is not None:
            await self._outputs.aclose()
        if self._read and stream.busy and self._request.stream:
            self._commit()
        if not self._committed:
            stream.options, stream.schedule = self._before
        self._service.store.release(stream)

    def _commit(self) -> None:
        if self._committed:
            return
        self._committed = True
        stream, request = self._stream, self._request
        stream.tokens.extend([*self._appended, *self._generated])
        stream.turns += 1
        stream.sampled = bool(self._generated)
        if request.generate is not None or request.is_raw:
            stream.tail, stream.open = "assistant", True
        elif request.messages:
            stream.tail, stream.open = request.messages[-1].role, False
        stream.pending = []

    def result(self, text: str | None) -> Appended:
        """The account of the turn, when it has ended."""
        prompt = len(self._stream.tokens) - len(self._generated)
        return Appended(
            text=text,
            token_ids=self._generated if self._request.return_token_ids else None,
            finish_reason=self._finish_reason,
            usage=AppendUsage(
                appended_tokens=len(self._appended),
                generated_tokens=len(self._generated),
                cached_tokens=self._cached,
                computed_tokens=prompt - self._cached,
            ),
            stream=self._service.info(self._stream),
        )
