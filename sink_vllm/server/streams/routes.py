"""The endpoint plugin ``sink_vllm``: routes of ``/v1/streams``, and their page (API server).

vLLM loads it only when ``VLLM_PLUGINS`` names ``sink_vllm``: routes are opt-in there, and stay so.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm import envs
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.logger import init_logger

from sink_vllm.server.lengths import policy_of
from sink_vllm.server.page import routes as page
from sink_vllm.server.streams.bodies import (
    Append,
    Appended,
    CreateStream,
    Deleted,
    StreamInfo,
    StreamList,
)
from sink_vllm.server.streams.clients import KEY_CLIENT, client_name
from sink_vllm.server.streams.gauges import show
from sink_vllm.server.streams.handler import Refused
from sink_vllm.server.streams.response import TurnResponse, repeated
from sink_vllm.server.streams.service import StreamService
from sink_vllm.server.streams.store import BusyStream, NoRoom, UnknownStream, UnusableStream

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

logger = init_logger(__name__)
router = APIRouter(tags=["streams"])

_STATE = "streaming_llm_streams"
_RETRY_AFTER = 1  # second: turns end at any time
_EVENT = {
    "type": "object",
    "description": "A server-sent event: `Delta`, the account, or the text `[DONE]`.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_Key = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="Chosen by the client: an append with the key of the last one is not done "
        "again, but answered again.",
    ),
]
_StreamId = Annotated[str, Path(description="As answered when the stream was created.")]


def _errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the schema; what every route may answer is added."""
    everywhere = (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.NOT_IMPLEMENTED,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
    return {
        status.value: {"model": ErrorResponse, "description": status.phrase}
        for status in (*everywhere, *statuses)
    }


def service_of(raw_request: Request) -> StreamService:
    """The service of this API server.

    Raises:
        HTTPException: status 501, saying what the server would need.
    """
    service: StreamService | str = getattr(raw_request.app.state, _STATE)
    if isinstance(service, str):
        raise HTTPException(HTTPStatus.NOT_IMPLEMENTED, service)
    return service


def client_of(raw_request: Request) -> str:
    """Whose share of the server's streams a request is for."""
    args = raw_request.app.state.args
    return client_name(
        raw_request.headers.get("Authorization"),
        None if raw_request.client is None else raw_request.client.host,
        # As vLLM decides whether to check them.
        keys_checked=any(args.api_key or [envs.VLLM_API_KEY]),
    )


Service = Annotated[StreamService, Depends(service_of)]
Client = Annotated[str, Depends(client_of)]


@router.post(
    "/v1/streams",
    summary="Create a stream",
    status_code=HTTPStatus.CREATED,
    response_model=StreamInfo,
    responses=_errors(HTTPStatus.NOT_FOUND, HTTPStatus.TOO_MANY_REQUESTS),
    dependencies=[Depends(validate_json_request)],
)
async def create_stream(
    request: CreateStream, service: Service, client: Client
) -> StreamInfo | JSONResponse:
    """When there is no room, the client that holds the most loses its least recently used stream.

    A forgotten stream is created again by sending its messages, text or tokens: what the prefix
    cache still has of them is not computed again.
    """
    try:
        return service.info(await service.create(client, request))
    except Refused as refused:
        return _answer(refused.answer)
    except NoRoom as error:
        return _no_room(error, service)


@router.post(
    "/v1/streams/{stream_id}/append",
    summary="Append to a stream, and generate behind it",
    response_model=None,
    responses={
        HTTPStatus.OK.value: {
            "model": Appended,
            "description": "The account of the turn; with `stream`, events of type Delta, then "
            "the account or an error, then `[DONE]`.",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **_errors(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS),
    },
    dependencies=[Depends(validate_json_request)],
)
@with_cancellation
@load_aware_call
async def append(
    stream_id: _StreamId,
    request: Append,
    raw_request: Request,
    service: Service,
    idempotency_key: _Key = None,
) -> JSONResponse | StreamingResponse:
    """Only what is new is sent. An error leaves the stream as it was.

    A client that closes the connection ends the generation: what an event stream has brought
    until then stays part of the stream, a single answer that nobody has read does not.
    """
    try:
        with _available(stream_id):
            again = service.answered(stream_id, request, idempotency_key)
            if again is not None:
                return _again(again, request)
            turn = await service.append(stream_id, request, raw_request, idempotency_key)
    except Refused as refused:
        return _answer(refused.answer)
    except NoRoom as error:
        return _no_room(error, service)
    if request.stream:
        return TurnResponse(turn, request, raw_request.app.state.args.sse_keep_alive_interval)
    try:
        texts = [text async for text, _ in turn.deltas()]
        text = None if request.generate is None else "".join(texts)
        return JSONResponse((await turn.finish(text)).model_dump())
    finally:
        await turn.close()


@router.get(
    "/v1/streams",
    summary="List the streams of an API key",
    response_model=StreamList,
    responses=_errors(HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND),
)
async def list_streams(
    service: Service,
    client: Client,
    limit: Annotated[int, Query(ge=1, le=100, description="Streams of a page.")] = 20,
    after: Annotated[str | None, Query(description="Last id of the page before.")] = None,
) -> StreamList:
    """Those in use, and then the most recently used ones, first.

    An id is all that is needed to append, so a server that checks no keys lists no streams.
    """
    if not client.startswith(KEY_CLIENT):
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            "Streams are listed by API key, and this server checks none; start it with --api-key.",
        )
    with _available(after or ""):
        streams, more = service.store.of_client(client, after, limit)
    return StreamList(data=[service.info(stream) for stream in streams], has_more=more)


@router.get(
    "/v1/streams/{stream_id}",
    summary="Look at a stream",
    response_model=StreamInfo,
    responses=_errors(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
async def get_stream(stream_id: _StreamId, service: Service) -> StreamInfo:
    """Looking is no use: the stream is forgotten as if nobody had."""
    with _available(stream_id):
        return service.info(service.store.get(stream_id))


@router.delete(
    "/v1/streams/{stream_id}",
    summary="Forget a stream",
    response_model=Deleted,
    responses=_errors(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
async def delete_stream(stream_id: _StreamId, service: Service) -> Deleted:
    """A stream somebody appends to is not deleted; closing that connection ends its turn."""
    with _available(stream_id):
        service.store.remove(stream_id)
    return Deleted(id=stream_id)


def _again(answer: Appended, request: Append) -> JSONResponse | StreamingResponse:
    if request.stream:
        return StreamingResponse(repeated(answer, request), media_type="text/event-stream")
    return JSONResponse(answer.model_dump())


def _answer(error: ErrorResponse, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.model_dump(), status_code=error.error.code, headers=headers)


def _no_room(error: NoRoom, service: StreamService) -> JSONResponse:
    store = service.store
    option, most = {
        "streams": ("--sink-streams", store.most_streams),
        "tokens": ("--sink-streams-tokens", store.most_tokens),
    }[error.resource]
    message = (
        f"This client has its share of the {most} {error.resource} that the server remembers "
        f"({option}={most}), and nothing can be forgotten for it while others append; try again "
        "when one of your turns has ended, or delete a stream."
    )
    status = HTTPStatus.TOO_MANY_REQUESTS
    answer = create_error_response(message, status.phrase, status)
    return _answer(answer, {"Retry-After": f"{_RETRY_AFTER}"})


@contextmanager
def _available(stream_id: str) -> Iterator[None]:
    """Answer 404 and 409 where the store has no such stream, or it cannot be had now.

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
    except UnusableStream as error:
        raise HTTPException(HTTPStatus.CONFLICT, str(error)) from error
    except BusyStream as error:
        raise HTTPException(
            HTTPStatus.CONFLICT,
            f"Somebody is appending to stream {stream_id!r}; wait for the end of that turn, or "
            "close its connection.",
            headers={"Retry-After": f"{_RETRY_AFTER}"},
        ) from error


class StreamsPlugin:
    """What vLLM asks of an endpoint plugin."""

    name = "sink_vllm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.include_router(page.router)

    async def init_state(
        self, engine_client: "EngineClient | None", state: "State", args: Namespace
    ) -> None:
        service: StreamService | str
        if engine_client is None or policy_of(engine_client.vllm_config) is None:
            service = "/v1/streams needs a server that was started with --kv-policy sink."
        elif (getattr(args, "api_server_count", None) or 1) > 1:
            service = (
                f"/v1/streams keeps its streams in one API server, and --api-server-count is "
                f"{args.api_server_count}; start the server with --api-server-count 1."
            )
        else:
            service = StreamService.of(state.openai_serving_completion)
            model_name = state.openai_serving_models.model_name()
            show(service.store, model_name)
            service.measure(model_name)
            if not engine_client.vllm_config.cache_config.enable_prefix_caching:
                logger.warning(
                    "/v1/streams without prefix caching goes on from the tokens in the window "
                    "with every append, which are computed again and know nothing of what was "
                    "evicted; start the server with --enable-prefix-caching."
                )
        if isinstance(service, str):
            logger.warning(service)
        setattr(state, _STATE, service)
