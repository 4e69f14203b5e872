"""One append to a stored stream, from the engine's first output to the account of what it cost."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.exceptions import RetryableRequestError
from vllm.outputs import RequestOutput

from sink_vllm.policy.parked import CHAIN, Chain, ResumedFrom
from sink_vllm.policy.report import KEY as ACCOUNT_KEY
from sink_vllm.server.streams.archive import ArchiveError
from sink_vllm.server.streams.bodies import Answer, Append, Appended, AppendUsage, StreamInfo
from sink_vllm.server.streams.handler import Handler
from sink_vllm.server.streams.interface import Streams
from sink_vllm.server.streams.rendering import Rendering
from sink_vllm.server.streams.resumes import Resumes
from sink_vllm.server.streams.stored import Answered, Progress, StoredStream

if TYPE_CHECKING:
    from fastapi import Request

_REPORT_SECONDS = 0.2
"""Between two reports of how far a turn has come."""
_CLOSING: set[asyncio.Future[Any]] = set()  # asyncio itself would let go of them


class Turn:
    """One append: the stream's tokens change when it ends, all at once.

    A turn that is ended early keeps what was generated up to then if somebody has read it;
    otherwise, and after any error, the stream is as it was. Whatever happens to the task that
    runs a turn, and however often it is cancelled, the stream is given back: that waits for
    nothing, and a turn that is lost gives its stream back too.
    """

    _ended = True  # until there is a stream to give back

    def __init__(
        self,
        stream: StoredStream,
        request: Append,
        raw_request: "Request | None",
        *,
        store: Streams,
        handler: Handler,
        rendering: Rendering,
        info: Callable[[StoredStream], StreamInfo],
        key: str | None = None,
        resumes: Resumes | None = None,
    ) -> None:
        """
        Args:
            stream: the turn's, until it ends.
            request: what to append, and how to generate.
            raw_request: for vLLM's headers (priority, session, tracing, request id).
            store: that ``stream`` has been taken from.
            handler: makes a request of the engine of it.
            rendering: of what is appended.
            info: what the account says of the stream.
            key: under which the client may ask for the answer again.
            resumes: counts what streams went on from.
        """
        self._stream, self._request, self._raw_request = stream, request, raw_request
        self._store, self._handler, self._rendering = store, handler, rendering
        self._info, self._key = info, key
        self._resumes, self._began = resumes, time.monotonic()
        self._report_at = 0.0
        self._texts: list[str] = []
        self._before = (stream.options, stream.schedule)
        self._held = stream.held.copy()
        self._appended = self._generated = 0  # tokens
        self._token_ids: list[int] = []
        self._outputs: AsyncGenerator[RequestOutput, None] | None = None
        self._first: RequestOutput | None = None
        self._told: Mapping[str, Any] | None = None
        self._resumed_from: ResumedFrom | None = None
        self._skipped = 0  # tokens that are neither found nor computed
        self._cached = 0
        self._finish_reason: str | None = None
        self._read = False
        self._failed = False
        self._complete = False
        self._is_saved = False
        self._ended = False

    @property
    def is_done(self) -> bool:
        """Whether the stream's last turn was this one already: ask for its answer again."""
        last = self._stream.answered
        return self._key is not None and last is not None and last.key == self._key

    async def start(self) -> None:
        """Render, and wait for the engine's first output: errors come before any answer."""
        handler, stream, request = self._handler, self._stream, self._request
        await handler.check_model(stream.model)
        handler.check_engine()
        tokens = await self._rendering.new_tokens(stream, request)
        self._held.extend(tokens)
        self._appended = len(tokens)
        most = self._store.limits.most_tokens
        params = handler.params(stream, request.generate, len(self._held.tokens), most)
        self._outputs = await handler.outputs(
            stream, tokens, params, self._raw_request, request.priority
        )
        self._first = await anext(self._outputs)
        self._answered_at = self._store.clock()
        self._report_progress()
        self._cached = self._first.num_cached_tokens or 0
        self._check(self._first)
        if (told := _told_in(self._first)) is not None:
            chain = Chain.read(told)
            self._resumed_from = chain.resumed_from
            self._skipped = chain.base if chain.resumed_from in (None, "survivors") else 0
        if self._resumed_from is None and self._cached:
            self._resumed_from = "cache"
        if self._resumes is not None and stream.position:
            self._resumes.observe(self._resumed_from, time.monotonic() - self._began)

    async def deltas(self) -> AsyncGenerator[tuple[str, list[int]], None]:
        """Text and token ids as they are generated; nothing without generation.

        Raises:
            GenerationError: the engine has given the request up; the stream is as it was.
            VLLMError: as the engine raises it; the same.
        """
        outputs, output = self._outputs, self._first
        assert outputs is not None
        try:
            while output is not None:
                self._check(output)
                completion = output.outputs[0]
                token_ids = () if self._request.generate is None else completion.token_ids
                self._take(output, token_ids)
                if self._request.generate is not None:
                    if self._key is not None:
                        self._texts.append(completion.text)
                    self._finish_reason = completion.finish_reason
                    self._read = True
                    yield completion.text, list(completion.token_ids)
                output = await anext(outputs, None)
        except Exception:  # nobody has left: something went wrong
            self._failed = True
            raise
        self._complete = True

    def _take(self, output: RequestOutput, token_ids: Sequence[int]) -> None:
        """Take in an output; what it lets the stream forget is forgotten."""
        self._held.extend(token_ids)
        self._generated += len(token_ids)
        self._report_progress()
        if self._request.return_token_ids:
            self._token_ids += token_ids
        told = _told_in(output)
        if told is not None and told is not self._told and self._stream.schedule is not None:
            self._told = told
            self._held.told(Chain.read(told))
            self._held.trim(self._stream.schedule, sampled=self._generated > 0)

    def _report_progress(self) -> None:
        seconds = self._store.clock() - self._answered_at
        progress = Progress(self._held.position, self._generated, seconds)
        self._stream.progress = progress
        if seconds >= self._report_at:  # where the stream is a copy of what others look at
            self._report_at = seconds + _REPORT_SECONDS
            self._store.report(self._stream.id, progress)

    def _check(self, output: RequestOutput) -> None:
        """Raise what the engine's finish reason means, if it is an error."""
        reason = output.outputs[0].finish_reason
        if reason == "abort":  # by the engine: our own aborts have no outputs
            raise RetryableRequestError(
                "The server has aborted this generation, because it is pausing or ending or "
                "because nobody read the answer; the stream is as it was, append again."
            )
        self._handler.raise_if_error(reason, output.request_id)

    def end(self) -> None:
        """Give the stream back, however the turn ended. Nothing here waits."""
        if self._ended:
            return
        self._ended = True
        try:
            left = self._read and self._request.stream and not self._failed
            if self._complete or left:
                self._commit(self._stream)
                if not self._is_saved:
                    self._store.save_later(self._stream)
            else:
                self._stream.options, self._stream.schedule = self._before
        finally:
            self._store.release(self._stream)

    async def close(self) -> None:
        """End the turn, and wait until the engine has let go of it.

        Cancelling this stops the waiting only: the next turn may begin meanwhile, as another
        request of the engine.
        """
        self.end()
        if self._outputs is None:
            return
        outputs, self._outputs = self._outputs, None
        closing = asyncio.ensure_future(outputs.aclose())
        _CLOSING.add(closing)
        closing.add_done_callback(_CLOSING.discard)
        await asyncio.shield(closing)

    def __del__(self) -> None:
        self.end()  # of a response that was never sent, say

    async def _save(self) -> None:
        """Write the stream as it will be; only then is the turn a part of it.

        Raises:
            RetryableRequestError: it cannot be written; the stream is as it was.
        """
        if not self._store.limits.is_archived or self._is_saved:
            return
        after = copy(self._stream)
        self._commit(after)
        try:
            await asyncio.wrap_future(self._store.save(after))
        except ArchiveError as error:
            self._failed, self._complete = True, False
            raise RetryableRequestError(f"{error} The stream is as it was.") from error
        self._is_saved = True

    def _commit(self, stream: StoredStream) -> None:
        request = self._request
        sampled = self._generated > 0
        if stream.schedule is not None:
            self._held.trim(stream.schedule, sampled=sampled)
        stream.held = self._held
        stream.turns += 1
        stream.sampled = sampled
        if request.generate is not None or request.is_raw:
            stream.tail, stream.open = "assistant", True
        elif request.messages:
            stream.tail, stream.open = request.messages[-1].role, False
        stream.pending = ()
        stream.answered = None
        if self._key is not None:
            text = None if request.generate is None else "".join(self._texts)
            answer = self._answer(text)
            stream.answered = Answered(self._key, digest_of(request), answer.model_dump_json())

    async def finish(self, text: str | None) -> Appended:
        """End the turn, and account for it before anybody else can begin another.

        Raises:
            RetryableRequestError: it cannot be written; the stream is as it was.
        """
        await self._save()
        self.end()
        return Appended(**self._answer(text).model_dump(), stream=self._info(self._stream))

    def _answer(self, text: str | None) -> Answer:
        prompt = self._held.position - self._generated
        return Answer(
            text=text,
            token_ids=self._token_ids if self._request.return_token_ids else None,
            finish_reason=self._finish_reason,
            usage=AppendUsage(
                appended_tokens=self._appended,
                generated_tokens=self._generated,
                cached_tokens=self._cached,
                computed_tokens=prompt - self._cached - self._skipped,
                resumed_from=self._resumed_from,
            ),
        )


def digest_of(request: Append) -> str:
    """What a request asks for, to tell whether another asks for the same."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()


def _told_in(output: RequestOutput) -> Mapping[str, Any] | None:
    """What the engine tells of the stream; the same object in outputs that only repeat it."""
    return (output.kv_transfer_params or {}).get(ACCOUNT_KEY, {}).get(CHAIN)
