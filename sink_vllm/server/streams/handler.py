"""How an append to a stored stream becomes a request of the engine, as ``/v1/completions`` does it.

Whatever ``vllm serve`` was told about all requests (limits, defaults, models, logging, priorities)
is applied by the server's own handler of that route, asked method by method. So a stored stream
knows no rules of its own but the room that its store has.
"""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sink_vllm.policy.parked import KEY as PARKED_KEY
from sink_vllm.server.streams.bodies import Generate
from sink_vllm.server.streams.stored import ID_PREFIX, StoredStream

if TYPE_CHECKING:
    from fastapi import Request
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse


class Refused(Exception):
    """vLLM's own answer to a request, where its handlers return it and do not raise it."""

    def __init__(self, answer: "ErrorResponse") -> None:
        super().__init__(answer.error.message)
        self.answer = answer


class Handler:
    """The handler of ``/v1/completions``, as far as stored streams ask it."""

    def __init__(self, completions: "OpenAIServingCompletion", capacity: int) -> None:
        """
        Args:
            completions: vLLM's.
            capacity: of the server, in tokens; where a stream that does not evict ends.
        """
        self._completions = completions
        self._capacity = capacity

    def default_model(self) -> str:
        """The name of the model that a request asks for if it names none."""
        name: str = self._completions.models.model_name()
        return name

    async def check_model(self, model: str) -> None:
        """As every handler of vLLM does, which may also load an adapter.

        Raises:
            Refused: there is no such model or adapter, or no longer.
        """
        answer = await self._completions._check_model(_asking_for(model))
        if answer is not None:
            raise Refused(answer)

    def check_engine(self) -> None:
        """As every handler of vLLM does before it renders.

        Raises:
            VLLMError: the engine is dead, or its queue is full.
        """
        self._completions._preflight()

    def check_priority(self, priority: int | None) -> None:
        """What vLLM says of priorities and does not check: they need its priority scheduling.

        Raises:
            VLLMValidationError: it is not 0, and the server schedules first come, first served.
        """
        policy = self._completions.engine_client.vllm_config.scheduler_config.policy
        if priority and policy != "priority":
            raise VLLMValidationError(
                f"priority={priority} needs a server with --scheduling-policy priority, and this "
                f"one has {policy}; leave it out, or start the server like that.",
                parameter="priority",
            )

    def params(
        self, stream: StoredStream, generate: Generate | None, position: int, most_tokens: int
    ) -> SamplingParams:
        """Sampling parameters of a turn.

        Args:
            stream: that is appended to.
            generate: how to generate; ``None`` only computes what is appended.
            position: tokens before those that are generated, as many as are held.
            most_tokens: that the server remembers of all its streams.

        Raises:
            VLLMValidationError: the stream would become longer than ``most_tokens``.
        """
        room = most_tokens - position
        if generate is None:  # the engine computes a prompt only to sample behind it
            params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
            least = 1
        else:
            defaults = self._completions.default_sampling_params
            most = get_max_tokens(
                self._completions.model_config.max_model_len,
                generate.max_tokens,
                position,
                defaults,
                self._completions.override_max_tokens,
            )
            least = most
            if generate.max_tokens is None:
                left = room if stream.schedule is not None else self._capacity - position
                least, most = 1, max(min(most, room, left), 1)
            given = generate.model_dump(exclude_none=True)
            params = CompletionRequest.model_validate(
                {"prompt": "a", **given, "stream": True}
            ).to_sampling_params(most, defaults)
        if least > room:
            raise VLLMValidationError(
                f"max_tokens={least} behind a stream of {position} tokens is more than the "
                f"{most_tokens} tokens this server remembers of its streams "
                "(--sink-streams-tokens); use fewer, or create a new stream."
            )
        params.output_kind = RequestOutputKind.DELTA
        params.extra_args = dict(stream.options) or None
        return params

    async def outputs(
        self,
        stream: StoredStream,
        tokens: list[int],
        params: SamplingParams,
        raw_request: "Request | None",
        priority: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs for a stream with ``tokens`` appended, as one request.

        ``priority`` is the stream's by default; a header of vLLM's goes before both.
        """
        handler = self._completions
        request = _asking_for(stream.model, stream.priority if priority is None else priority)
        request_id = f"append-{handler._base_request_id(raw_request, request.request_id)}"
        headers = None
        if raw_request is not None:
            raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
            headers = await handler._get_trace_headers(raw_request.headers)
        if stream.schedule is not None:
            parked = stream.held.parked(stream.schedule)
            params.extra_args = {**(params.extra_args or {}), PARKED_KEY: parked}
        prompt = tokens_input([*stream.tokens, *tokens], cache_salt=stream.cache_salt)
        adapter = handler._maybe_get_adapters(request)
        handler._log_inputs(request_id, prompt, params=params, lora_request=adapter)
        return handler.engine_client.generate(
            prompt,
            params,
            request_id,
            lora_request=adapter,
            trace_headers=headers,
            priority=handler._get_priority(request, raw_request),
            data_parallel_rank=self._rank_of(stream, raw_request),
            session_id=handler._get_session_id(request, raw_request),
        )

    def _rank_of(self, stream: StoredStream, raw_request: "Request | None") -> int | None:
        """The engine that has the stream's pages, unless a header names another."""
        rank: int | None = self._completions._get_data_parallel_rank(raw_request)
        parallel = self._completions.engine_client.vllm_config.parallel_config
        engines = (
            parallel.data_parallel_size_local
            if parallel.local_engines_only
            else parallel.data_parallel_size
        )
        return engine_of(stream.id, engines) if rank is None and engines > 1 else rank

    def raise_if_error(self, finish_reason: str | None, request_id: str) -> None:
        """vLLM's own error for the finish reason that stands for one."""
        self._completions._raise_if_error(finish_reason, request_id)


def _asking_for(model: str, priority: int = 0) -> CompletionRequest:
    """A request for ``model``, for what vLLM looks up in requests."""
    return CompletionRequest.model_validate({"model": model, "prompt": "a", "priority": priority})


def engine_of(stream_id: str, engines: int) -> int:
    """The same of several engines for all turns of a stream; ids are random, so all get alike."""
    return int(stream_id.removeprefix(ID_PREFIX), 16) % engines
