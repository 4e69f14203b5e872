"""A turn gives its stream back however it ends: finished, failed, left, cancelled once or twice."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from vllm import SamplingParams
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.exceptions import (
    GenerationError,
    RetryableRequestError,
    VLLMError,
    VLLMServerError,
    VLLMValidationError,
)
from vllm.outputs import CompletionOutput, RequestOutput

from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.streams.archive import Archive
from sink_vllm.server.streams.bodies import Append, Generate
from sink_vllm.server.streams.response import TurnResponse
from sink_vllm.server.streams.service import StreamService
from sink_vllm.server.streams.store import StreamStore, UnknownStream
from sink_vllm.server.streams.stored import StoredStream
from sink_vllm.server.streams.turn import Turn

SCHEDULE = Schedule(sink_tokens=4, window=92, stride=32)
NEW = [1, 2, 3]


class _Engine:
    """The engine's side of one request: what it outputs, and whether it has been told to stop."""

    def __init__(self, *reasons: str | None) -> None:
        """
        Args:
            reasons: finish reasons of the outputs, of one token each; ``None`` goes on. After
                the last one it waits for ever.
        """
        self.reasons = reasons
        self.waiting = asyncio.Event()
        self.stopped = asyncio.Event()

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        try:
            for token, reason in enumerate(self.reasons):
                completion = CompletionOutput(
                    0, f"{token} ", [token], None, None, finish_reason=reason
                )
                yield RequestOutput("r", None, NEW, None, [completion], reason is not None)
                if reason is not None:
                    return
            self.waiting.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(5):  # as an abort that is on its way to the engine
                await asyncio.sleep(0.01)
            self.stopped.set()


class _Rendering:
    """What a turn appends, without a model."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def new_tokens(self, stream: StoredStream, request: Append) -> list[int]:
        stream.options, stream.schedule = {"sink_tokens": 9}, None  # as rendering a pin does
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return list(NEW)


class _Handler:
    """What a turn asks of the server's handler, without a server."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine

    async def check_model(self, model: str) -> None: ...

    def check_engine(self) -> None: ...

    def check_priority(self, priority: int | None) -> None: ...

    def params(self, *_: Any) -> SamplingParams:
        return SamplingParams()

    async def outputs(self, *_: Any) -> AsyncGenerator[RequestOutput, None]:
        return self.engine.outputs()

    def raise_if_error(self, finish_reason: str | None, request_id: str) -> None:
        GenerateBaseServing._raise_if_error(cast(Any, self), finish_reason, request_id)


class _Service(StreamService):
    def __init__(
        self, engine: _Engine, error: Exception | None = None, archive: Archive | None = None
    ) -> None:
        store = StreamStore(most_streams=4, most_tokens=1000, idle_seconds=60, archive=archive)
        handler, rendering = cast(Any, _Handler(engine)), cast(Any, _Rendering(error))
        super().__init__(store, handler, rendering, SCHEDULE.capacity)

    @property
    def in_use(self) -> int:
        assert isinstance(self.store, StreamStore)
        return self.store.in_use

    def stream(self) -> StoredStream:
        return self.store.create("client", "m", SCHEDULE, {}, tokens=[7, 8])


def _request(**body: Any) -> Append:
    return Append(text="abc", generate=Generate(), **body)


def _as_it_was(stream: StoredStream) -> bool:
    return (list(stream.tokens), stream.turns, stream.options, stream.schedule) == (
        [7, 8],
        0,
        {},
        SCHEDULE,
    )


def _run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(cast(Any, test()), 30))


async def _respond(turn: Turn, request: Append, events: list[str], after: int = -1) -> None:
    """Send a turn as events; the client leaves after so many of them."""
    response = TurnResponse(turn, request, 0)
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if body := message.get("body"):
            events.append(body.decode())
        if len(events) == after:
            left.set()
            await asyncio.sleep(0)

    await response({"type": "http", "asgi": {"spec_version": "2.0"}}, receive, send)


def _parsed(events: list[str]) -> list[dict[str, Any]]:
    assert events[-1] == "data: [DONE]\n\n"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_a_finished_turn_changes_its_stream() -> None:
    async def test() -> None:
        service = _Service(_Engine(None, None, "stop"))
        stream, events = service.stream(), list[str]()
        request = _request(stream=True)
        await _respond(await service.append(stream.id, request), request, events)

        *deltas, account = _parsed(events)
        assert [delta["text"] for delta in deltas] == ["0 ", "1 ", "2 "]
        assert account["finish_reason"] == "stop"
        assert account["stream"]["busy"] is False
        assert list(stream.tokens) == [7, 8, *NEW, 0, 1, 2]
        assert stream.options == {"sink_tokens": 9}

    _run(test)


def test_a_turn_in_progress_is_told_of() -> None:
    """As far as it has come, beside the stream as it was, and no longer when it has ended."""

    async def test() -> None:
        service = _Service(_Engine(*[None] * 200, "stop"))
        stream = service.stream()
        stream.options, stream.schedule = {}, SCHEDULE
        turn = await service.append(stream.id, _request(stream=True))
        stream.schedule = SCHEDULE  # the stand-in's rendering takes it away
        begun = service.info(stream).turn
        assert begun is not None
        assert (begun.position, begun.generated_tokens, begun.evicted) == (5, 0, 0)

        deltas = turn.deltas()
        for generated in range(1, 150):
            await anext(deltas)
            info = service.info(stream)
            assert (info.position, info.busy, info.evicted) == (2, True, 0)
            assert info.turn is not None
            assert info.turn.generated_tokens == generated
            assert info.turn.position == 5 + generated
            assert info.turn.evicted == SCHEDULE.evicted(4 + generated)
            assert info.turn.cached == info.turn.position - info.turn.evicted
        assert info.turn is not None
        assert info.turn.evicted == 32
        assert info.turn.seconds > 0
        await deltas.aclose()
        await turn.close()

        assert service.info(stream).turn is None

    _run(test)


# -- cancelled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["single answer", "events"])
def test_a_turn_that_is_cancelled_again_while_it_closes(kind: str, cancels: int) -> None:
    """The second cancellation used to leave the stream in use for ever."""

    async def test() -> None:
        engine = _Engine(None, None)
        service = _Service(engine)
        stream, events = service.stream(), list[str]()
        request = _request(stream=kind == "events")

        async def run() -> None:
            turn = await service.append(stream.id, request)
            if request.stream:
                await _respond(turn, request, events)
                return
            try:
                async for _ in turn.deltas():
                    pass
            finally:
                await turn.close()

        task = asyncio.create_task(run())
        await engine.waiting.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

        assert not stream.busy
        service.store.release(service.store.acquire(stream.id))
        if request.stream:  # somebody has read it
            assert list(stream.tokens) == [7, 8, *NEW, 0, 1]
        else:
            assert _as_it_was(stream)

    _run(test)


@pytest.mark.parametrize("cancels", [1, 2])
def test_the_engine_is_told_to_stop_all_the_same(cancels: int) -> None:
    """Closing goes on when nobody waits for it any more."""

    async def test() -> None:
        engine = _Engine(None, None)
        service = _Service(engine)
        stream = service.stream()
        turn = await service.append(stream.id, _request())
        closing = asyncio.create_task(turn.close())
        await asyncio.sleep(0)
        assert not stream.busy  # before the engine has let go of it
        for _ in range(cancels):
            closing.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not engine.stopped.is_set()
        await engine.stopped.wait()

    _run(test)


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("cancels", [1, 2])
def test_a_turn_that_is_cancelled_while_it_starts(steps: int, cancels: int) -> None:
    async def test() -> None:
        service = _Service(_Engine())  # no output ever
        stream = service.stream()
        task = asyncio.create_task(service.append(stream.id, _request()))
        for _ in range(steps):
            await asyncio.sleep(0)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not stream.busy
        assert _as_it_was(stream)

    _run(test)


def test_a_turn_that_is_lost() -> None:
    """Its response was never sent: a middleware has failed, or was cancelled before."""

    async def test() -> None:
        service = _Service(_Engine(None))
        stream = service.stream()
        response = TurnResponse(await service.append(stream.id, _request()), _request(), 0)
        assert service.in_use == 1
        del response
        gc.collect()
        assert service.in_use == 0
        assert _as_it_was(stream)

    _run(test)


# -- left -----------------------------------------------------------------------------------------


def test_leaving_an_event_stream_keeps_what_it_brought() -> None:
    async def test() -> None:
        engine = _Engine(None, None, None)
        service = _Service(engine)
        stream, events = service.stream(), list[str]()
        request = _request(stream=True)
        await _respond(await service.append(stream.id, request), request, events, after=2)

        assert engine.stopped.is_set()
        assert not stream.busy
        assert list(stream.tokens)[:7] == [7, 8, *NEW, 0, 1]
        assert stream.turns == 1

    _run(test)


# -- errors ---------------------------------------------------------------------------------------


def test_a_rendering_that_fails() -> None:
    async def test() -> None:
        service = _Service(_Engine(), error=ValueError("no such template"))
        stream = service.stream()
        with pytest.raises(ValueError, match="no such template"):
            await service.append(stream.id, _request())
        assert not stream.busy
        assert _as_it_was(stream)

    _run(test)


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("reason", "error"), [("abort", RetryableRequestError), ("error", GenerationError)]
)
def test_a_generation_the_engine_gives_up(
    before: int, generate: bool, reason: str, error: type[VLLMError]
) -> None:
    """It used to be part of the stream, as if it had been finished."""

    async def test() -> None:
        service = _Service(_Engine(*[None] * before, reason))
        stream = service.stream()
        request = Append(text="abc", generate=Generate() if generate else None)

        async def run() -> None:
            turn = await service.append(stream.id, request)
            try:
                async for _ in turn.deltas():
                    pass
            finally:
                await turn.close()

        with pytest.raises(error):
            await run()
        assert not stream.busy
        assert _as_it_was(stream)

    _run(test)


@pytest.mark.parametrize(("reason", "code"), [("abort", 503), ("error", 500)])
def test_an_error_behind_events_that_were_read(reason: str, code: int) -> None:
    """An event says so, and the stream is as it was, though the client has read some of it."""

    async def test() -> None:
        service = _Service(_Engine(None, None, reason))
        stream, events = service.stream(), list[str]()
        request = _request(stream=True)
        await _respond(await service.append(stream.id, request), request, events)

        *deltas, last = _parsed(events)
        assert len(deltas) == 2
        assert last["error"]["code"] == code
        assert not stream.busy
        assert _as_it_was(stream)

    _run(test)


def test_an_engine_that_dies_behind_events_that_were_read() -> None:
    async def test() -> None:
        engine = _Engine()
        service = _Service(engine)
        stream, events = service.stream(), list[str]()

        async def outputs() -> AsyncGenerator[RequestOutput, None]:
            completion = CompletionOutput(0, "0", [0], None, None)
            yield RequestOutput("r", None, NEW, None, [completion], False)
            raise VLLMServerError("dead")

        engine.outputs = outputs  # type: ignore[method-assign]
        request = _request(stream=True)
        await _respond(await service.append(stream.id, request), request, events)

        assert _parsed(events)[-1]["error"]["message"] == "dead"
        assert _as_it_was(stream)

    _run(test)


def test_a_stream_that_is_gone() -> None:
    async def test() -> None:
        service = _Service(_Engine())
        stream = service.stream()
        service.store.remove(stream.id)
        with pytest.raises(UnknownStream):
            await service.append(stream.id, _request())

    _run(test)


def test_a_lost_answer_is_answered_again() -> None:
    """The same key and the same body: what was generated then, and nothing is appended twice."""

    async def test() -> None:
        service = _Service(_Engine(None, None, "stop"))
        stream, request = service.stream(), _request(return_token_ids=True)
        assert service.answered(stream.id, request, "k") is None
        turn = await service.append(stream.id, request, None, "k")
        texts = [text async for text, _ in turn.deltas()]
        first = await turn.finish("".join(texts))
        await turn.close()

        again = service.answered(stream.id, request, "k")

        assert again == first.model_copy(update={"stream": again and again.stream})
        assert again.text == "0 1 2 "
        assert stream.turns == 1
        assert service.answered(stream.id, request, None) is None
        assert service.answered(stream.id, request, "other") is None
        with pytest.raises(VLLMValidationError, match="another append"):
            service.answered(stream.id, Append(text="abcd", generate=Generate()), "k")

    _run(test)


def test_a_turn_left_early_is_answered_again_with_what_was_read() -> None:
    async def test() -> None:
        service = _Service(_Engine(None, None, None))
        stream, request, events = service.stream(), _request(stream=True), list[str]()
        turn = await service.append(stream.id, request, None, "k")
        await _respond(turn, request, events, after=2)

        again = service.answered(stream.id, request, "k")

        assert again is not None
        assert again.finish_reason is None
        assert again.usage.generated_tokens == stream.position - 2 - len(NEW)
        assert again.text is not None
        assert len(again.text.split()) == again.usage.generated_tokens

    _run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_turn_is_written_before_its_answer_ends(tmp_path: Path, stream: bool, full: bool) -> None:
    """On a full disk the answer is an error, and the stream as it was, here and there."""

    async def test() -> None:
        archive = Archive(str(tmp_path / "streams.db"), {})
        service = _Service(_Engine(None, "stop"), archive=archive)
        stored, events = service.stream(), list[str]()
        service.store.save(stored).result()
        if full:
            limit = "PRAGMA max_page_count=1"
            archive._thread.submit(lambda: archive._db.execute(limit).fetchall()).result()
            stored.options["pad"] = "x" * 20_000  # more than its pages have room for
        request = _request(stream=stream)
        turn = await service.append(stored.id, request)
        stored.options = {"pad": "x" * 20_000} if full else {}
        if stream:
            await _respond(turn, request, events)
            answer = _parsed(events)[-1]
            assert ("error" in answer) == full
        else:
            texts = [text async for text, _ in turn.deltas()]
            if full:
                with pytest.raises(RetryableRequestError, match="cannot be written"):
                    await turn.finish("".join(texts))
            else:
                await turn.finish("".join(texts))
            await turn.close()

        ((row, _),), _ = archive.load(time.time())
        assert row.turns == stored.turns == (0 if full else 1)
        assert list(row.tokens) == list(stored.tokens) == [7, 8] + ([] if full else [*NEW, 0, 1])
        assert not stored.busy
        archive.close()

    _run(test)
