"""What ``/v1/streams`` answers when there is no turn: errors, and answers given before."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from sink_vllm.server.streams.bodies import Append, Appended
from sink_vllm.server.streams.errors import (
    NoRoom,
    UnknownStream,
    Unreachable,
    UnusableStream,
)
from sink_vllm.server.streams.response import repeated
from sink_vllm.server.streams.service import StreamService

_RETRY_AFTER = 1  # second: turns end at any time
_TEMPORARY = (HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)
_LATER = {
    "Retry-After": {
        "description": "Seconds, where waiting for somebody's turn to end is enough.",
        "schema": {"type": "integer"},
    }
}
EVENT = {
    "type": "object",
    "description": "A server-sent event: `Delta`, the account, or the text `[DONE]`.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
"""Schema of an event of an append."""


def errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the schema; what every route may answer is added."""
    everywhere = (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.NOT_IMPLEMENTED,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
    return {
        status.value: {
            "model": ErrorResponse,
            "description": status.phrase,
            **({"headers": _LATER} if status in _TEMPORARY else {}),
        }
        for status in (*everywhere, *statuses)
    }


def answer_again(answer: Appended, request: Append) -> JSONResponse | StreamingResponse:
    if request.stream:
        return StreamingResponse(repeated(answer, request), media_type="text/event-stream")
    return JSONResponse(answer.model_dump())


def error_answer(error: ErrorResponse, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.model_dump(), status_code=error.error.code, headers=headers)


def no_room(error: NoRoom, service: StreamService) -> JSONResponse:
    limits = service.store.limits
    option, most = {
        "streams": ("--sink-streams", limits.most_streams),
        "tokens": ("--sink-streams-tokens", limits.most_tokens),
    }[error.resource]
    message = (
        f"This client has its share of the {most} {error.resource} that the server remembers "
        f"({option}={most}), and nothing can be forgotten for it while others append; try again "
        "when one of your turns has ended, or delete a stream."
    )
    status = HTTPStatus.TOO_MANY_REQUESTS
    answer = create_error_response(message, status.phrase, status)
    return error_answer(answer, {"Retry-After": f"{_RETRY_AFTER}"})


def busy(stream_id: str) -> JSONResponse:
    # Not raised: vLLM's handler of exceptions leaves their headers out.
    message = (
        f"Somebody is appending to stream {stream_id!r}; wait for the end of that turn, or close "
        "its connection."
    )
    status = HTTPStatus.CONFLICT
    answer = create_error_response(message, status.phrase, status)
    return error_answer(answer, {"Retry-After": f"{_RETRY_AFTER}"})


@contextmanager
def available(stream_id: str) -> Iterator[None]:
    """Answer 404, 409 or 503 where there is no such stream, or none that can be gone on with.

    Raises:
        HTTPException: see above.
    """
    try:
        yield
    except UnknownStream as error:
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            f"There is no stream {stream_id!r}, or no longer; create a stream and send its "
            "messages or tokens again.",
        ) from error
    except Unreachable as error:
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
    except UnusableStream as error:
        raise HTTPException(HTTPStatus.CONFLICT, str(error)) from error
