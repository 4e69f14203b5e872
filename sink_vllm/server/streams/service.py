"""The stored streams of an API server: create, append, look at (``/v1/streams``).

Each append is an ordinary request, with what is held of the stream (``streams.held``) as its
prompt; the engine resumes it from its prefix cache and computes what is new (and the rest of the
last page), at any age. So an idle stream holds nothing of the engine, an append works after its
pages have been reclaimed (it then goes on from its survivors), and stop strings, LoRA adapters and
priorities are vLLM's own. vLLM's streaming-input requests would keep the pages of idle streams and
one of the engine's request slots each, know no stop strings, and be lost with the first preemption.
"""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.exceptions import RetryableRequestError, VLLMValidationError

from sink_vllm.policy.request_options import PIN_KEY
from sink_vllm.server.lengths import policy_of
from sink_vllm.server.streams.archive import ArchiveError
from sink_vllm.server.streams.bodies import (
    Answer,
    Append,
    Appended,
    CreateStream,
    StreamInfo,
    TurnInfo,
)
from sink_vllm.server.streams.errors import BusyStream, TooLarge, UnknownStream
from sink_vllm.server.streams.handler import Handler
from sink_vllm.server.streams.interface import Streams
from sink_vllm.server.streams.opening import store_of
from sink_vllm.server.streams.rendering import Rendering
from sink_vllm.server.streams.resumes import Resumes
from sink_vllm.server.streams.stored import StoredStream, Waiting
from sink_vllm.server.streams.turn import Turn, digest_of

if TYPE_CHECKING:
    from fastapi import Request
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion


class StreamService:
    """Creates stored streams, appends to them, and says how they are.

    Args:
        store: who is remembered.
        handler: asks the server's own handler of ``/v1/completions``.
        rendering: of what is appended.
        capacity: of the server, in tokens.
    """

    def __init__(
        self, store: Streams, handler: Handler, rendering: Rendering, capacity: int
    ) -> None:
        self.store = store
        self._handler = handler
        self._rendering = rendering
        self._capacity = capacity
        self._resumes: Resumes | None = None

    def measure(self, model_name: str) -> None:
        """Put what appends go on from into ``/metrics``."""
        self._resumes = Resumes(model_name)

    @classmethod
    def of(cls, completions: "OpenAIServingCompletion") -> "StreamService":
        """The service of a server under the policy, by its handler of ``/v1/completions``.

        Raises:
            Refused: see ``opening.store_of``.
        """
        config = completions.engine_client.vllm_config
        policy = policy_of(config)
        assert policy is not None
        rendering = Rendering(completions.online_renderer, policy, config)
        return cls(
            store_of(config), Handler(completions, policy.capacity), rendering, policy.capacity
        )

    async def create(self, client: str, request: CreateStream) -> StoredStream:
        """A new stream of ``client``.

        Raises:
            Refused: there is no such model.
            NoRoom: see there.
            VLLMError: the content or the options are refused, or it cannot be written.
        """
        model = request.model or self._handler.default_model()
        await self._handler.check_model(model)
        validate_cache_salt(request.cache_salt)
        self._handler.check_priority(request.priority)
        most = self.store.limits.idle_seconds
        if (expires := request.expires_after) and expires > most:
            raise VLLMValidationError(
                f"expires_after={expires} is more than the {most} seconds after which "
                "this server forgets an unused stream (--sink-streams-idle); use fewer, or "
                "leave it out.",
                parameter="expires_after",
            )
        options, messages = request.options(), request.first_messages()
        if request.sink_pin == "system" and not any(m["role"] == "system" for m in messages):
            raise VLLMValidationError(
                "sink_pin='system' needs the system prompt when the stream is created; send "
                "system, or messages with one.",
                parameter="sink_pin",
            )
        others = {key: value for key, value in options.items() if key != PIN_KEY}
        # Refuses what does not fit; a pin is only known once it is rendered.
        _, schedule = self._rendering.resolve(others, None)
        tokens = await self._rendering.tokens_of(request, first=True)
        try:
            stream = self.store.create(
                client,
                model,
                schedule,
                options,
                cache_salt=request.cache_salt,
                tokens=tokens,
                metadata=request.metadata,
                expires_after=request.expires_after,
                priority=request.priority,
                pending=[Waiting(each["role"], each["content"].encode()) for each in messages],
            )
        except TooLarge as error:
            raise VLLMValidationError(
                f"A stream that begins with {error.tokens} tokens (messages count as one for each "
                f"4 bytes, and 64 for each message) leaves no room to append to it: the server "
                f"remembers --sink-streams-tokens={self.store.limits.most_tokens} of all streams "
                "together; send less, or start the server with more."
            ) from error
        if self.store.limits.is_archived:
            await self._saved(stream)
        return stream

    async def _saved(self, stream: StoredStream) -> None:
        """A stream whose id is told outlives the server."""
        try:
            await asyncio.wrap_future(self.store.save(stream))
        except ArchiveError as error:
            with suppress(BusyStream, UnknownStream):
                self.store.remove(stream.id)
            raise RetryableRequestError(str(error)) from error

    def answered(self, stream_id: str, request: Append, key: str | None) -> Appended | None:
        """The answer to the last turn of a stream, if ``request`` asks for it again.

        Raises:
            UnknownStream: see there.
            UnusableStream: see there.
            VLLMValidationError: the last turn of this key was another one.
        """
        if key is None:
            return None
        stream = self.store.get(stream_id)
        last = stream.answered
        if stream.busy or last is None or last.key != key:
            return None
        if last.asked != digest_of(request):
            raise VLLMValidationError(
                f"Idempotency-Key {key!r} was sent with another append to this stream; choose a "
                "new key for each append, and the same one only to repeat it unchanged.",
                parameter="Idempotency-Key",
            )
        answer = Answer.model_validate_json(last.answer)
        return Appended(**answer.model_dump(), stream=self.info(stream))

    async def append(
        self,
        stream_id: str,
        request: Append,
        raw_request: "Request | None" = None,
        key: str | None = None,
    ) -> Turn:
        """Append and, if asked to, generate; the turn must be closed.

        The answer can be asked for again under ``key`` until the next turn.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
            NoRoom: see there.
            Refused: the stream's model is no longer there; the stream is as it was.
            VLLMError: the content or the options are refused; the stream is as it was.
        """
        self._handler.check_priority(request.priority)
        turn = Turn(
            self.store.acquire(stream_id),
            request,
            raw_request,
            store=self.store,
            handler=self._handler,
            rendering=self._rendering,
            info=self.info,
            key=key,
            resumes=self._resumes,
        )
        try:
            if turn.is_done:  # by another API server, since somebody looked
                raise BusyStream(stream_id)
            await turn.start()
        except BaseException:  # also when the client goes away
            await turn.close()
            raise
        return turn

    def info(self, stream: StoredStream) -> StreamInfo:
        """What ``GET`` says."""
        now, schedule = self.store.clock(), stream.schedule
        expires = stream.expires(self.store.limits.idle_seconds)
        return StreamInfo(
            id=stream.id,
            model=stream.model,
            created=int(stream.created),
            age_seconds=round(time.time() - stream.created, 3),
            idle_seconds=0.0 if stream.busy else round(now - stream.used, 3),
            expires_in_seconds=round(max(expires - now, 0.0), 3),
            busy=stream.busy,
            turn=_turn_of(stream),
            turns=stream.turns,
            position=stream.position,
            evicted=stream.evicted,
            cached=stream.position - stream.evicted,
            evictions=stream.evictions,
            sink_tokens=None if schedule is None else schedule.sink_tokens,
            sink_window=None if schedule is None else schedule.window,
            capacity=self._capacity if schedule is None else schedule.capacity,
            pending_messages=len(stream.pending),
            metadata=stream.metadata,
            priority=stream.priority,
        )


def _turn_of(stream: StoredStream) -> TurnInfo | None:
    progress = stream.progress
    if progress is None:
        return None
    computed = progress.position - (progress.generated > 0)
    evicted = 0 if stream.schedule is None else stream.schedule.evicted(computed)
    return TurnInfo(
        position=progress.position,
        evicted=evicted,
        cached=progress.position - evicted,
        generated_tokens=progress.generated,
        seconds=round(progress.seconds, 3),
    )
