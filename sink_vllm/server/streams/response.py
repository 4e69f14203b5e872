"""A turn of a stored stream as server-sent events, in a response that ends the turn in any case."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import VLLMError

from sink_vllm.server.streams.bodies import Append, Appended, Delta
from sink_vllm.server.streams.turn import Turn

_DONE = "data: [DONE]\n\n"


async def _events(turn: Turn, request: Append) -> AsyncGenerator[str, None]:
    """The server-sent events of a turn."""
    try:
        async with aclosing(turn.deltas()) as deltas:
            async for text, token_ids in deltas:
                delta = Delta(text=text, token_ids=token_ids if request.return_token_ids else None)
                yield f"data: {delta.model_dump_json()}\n\n"
        last: Appended | ErrorResponse = await turn.finish(None)
    except VLLMError as error:  # the response has begun: all that is left is to say so
        turn.end()
        last = create_error_response(error)
    yield f"data: {last.model_dump_json()}\n\n"
    yield _DONE


async def repeated(answer: Appended, request: Append) -> AsyncGenerator[str, None]:
    """The server-sent events of a turn whose answer is asked for again."""
    if answer.text:
        token_ids = answer.token_ids if request.return_token_ids else None
        yield f"data: {Delta(text=answer.text, token_ids=token_ids).model_dump_json()}\n\n"
    yield f"data: {answer.model_copy(update={'text': None}).model_dump_json()}\n\n"
    yield _DONE


class TurnResponse(StreamingResponse):
    """Ends its turn however it ends, even if the client leaves before the first event."""

    def __init__(self, turn: Turn, request: Append, keep_alive: float) -> None:
        """
        Args:
            turn: started.
            request: what it does.
            keep_alive: vLLM's ``--sse-keep-alive-interval``, in seconds; 0 is off.
        """
        self._turn = turn
        self._events = with_sse_keep_alive(_events(turn, request), keep_alive)
        super().__init__(self._events, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.end()
            try:
                await self._events.aclose()
            finally:
                await self._turn.close()
