"""The endpoint plugin ``sink_vllm``: routes of ``/v1/streams``, and their page (API server).

vLLM loads it only when ``VLLM_PLUGINS`` names ``sink_vllm``: routes are opt-in there, and stay so.
"""

from argparse import Namespace
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm import envs
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.logger import init_logger

from sink_vllm.server.lengths import policy_of
from sink_vllm.server.page import routes as page
from sink_vllm.server.streams.answers import (
    EVENT,
    answer_again,
    available,
    busy,
    error_answer,
    errors,
    no_room,
)
from sink_vllm.server.streams.bodies import (
    Append,
    Appended,
    CreateStream,
    Deleted,
    StreamInfo,
    StreamList,
)
from sink_vllm.server.streams.clients import KEY_CLIENT, client_name
from sink_vllm.server.streams.errors import BusyStream, NoRoom
from sink_vllm.server.streams.gauges import show
from sink_vllm.server.streams.handler import Refused
from sink_vllm.server.streams.response import TurnResponse
from sink_vllm.server.streams.service import StreamService

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

logger = init_logger(__name__)
router = APIRouter(tags=["streams"])

_STATE = "streaming_llm_streams"
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
    responses=errors(HTTPStatus.NOT_FOUND, HTTPStatus.TOO_MANY_REQUESTS),
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
        with available(""):
            return service.info(await service.create(client, request))
    except Refused as refused:
        return error_answer(refused.answer)
    except NoRoom as error:
        return no_room(error, service)


@router.post(
    "/v1/streams/{stream_id}/append",
    summary="Append to a stream, and generate behind it",
    response_model=None,
    responses={
        HTTPStatus.OK.value: {
            "model": Appended,
            "description": "The account of the turn; with `stream`, events of type Delta, then "
            "the account or an error, then `[DONE]`.",
            "content": {"text/event-stream": {"schema": EVENT}},
        },
        **errors(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS),
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
        with available(stream_id):
            again = service.answered(stream_id, request, idempotency_key)
            if again is not None:
                return answer_again(again, request)
            turn = await service.append(stream_id, request, raw_request, idempotency_key)
    except Refused as refused:
        return error_answer(refused.answer)
    except NoRoom as error:
        return no_room(error, service)
    except BusyStream:
        return busy(stream_id)
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
    responses=errors(HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND),
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
    with available(after or ""):
        streams, more = service.store.of_client(client, after, limit)
    return StreamList(data=[service.info(stream) for stream in streams], has_more=more)


@router.get(
    "/v1/streams/{stream_id}",
    summary="Look at a stream",
    response_model=StreamInfo,
    responses=errors(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
async def get_stream(stream_id: _StreamId, service: Service) -> StreamInfo:
    """Looking is no use: the stream is forgotten as if nobody had."""
    with available(stream_id):
        return service.info(service.store.get(stream_id))


@router.delete(
    "/v1/streams/{stream_id}",
    summary="Forget a stream",
    response_model=Deleted,
    responses=errors(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
async def delete_stream(stream_id: _StreamId, service: Service) -> Deleted | JSONResponse:
    """A stream somebody appends to is not deleted; closing that connection ends its turn."""
    try:
        with available(stream_id):
            service.store.remove(stream_id)
    except BusyStream:
        return busy(stream_id)
    return Deleted(id=stream_id)


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
