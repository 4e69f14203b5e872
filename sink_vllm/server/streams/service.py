"""Appends to streams: renders what is new, and lets the engine resume from its prefix cache.

Each append is an ordinary request with the whole stream as its prompt; the engine computes what
is new (and the rest of the last page), whatever the length of the stream. So an idle stream
holds nothing of the engine, an append works after its pages have been reclaimed (the stream is
then computed again), and stop strings, LoRA adapters and priorities are vLLM's own. vLLM's
streaming-input requests would keep the pages of idle streams and one of the engine's request
slots each, know no stop strings, and be lost with the first preemption.
"""

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.generate.base.protocol import (
    RequestResponseMetadata,
    validate_cache_salt,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sink_vllm.policy.options import SinkOptions
from sink_vllm.policy.request_options import PIN_KEY, RequestPolicy
from sink_vllm.server.lengths import policy_of
from sink_vllm.server.options import apply_options
from sink_vllm.server.streams.bodies import (
    Append,
    Content,
    CreateStream,
    Generate,
    StreamInfo,
)
from sink_vllm.server.streams.join import behind
from sink_vllm.server.streams.store import StoredStream, StreamStore, TooLarge, Waiting
from sink_vllm.server.streams.turn import Turn

if TYPE_CHECKING:
    from fastapi import Request
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse


class Refused(Exception):
    """vLLM's own answer to a request, where its handlers return it and do not raise it."""

    def __init__(self, answer: "ErrorResponse") -> None:
        super().__init__(answer.error.message)
        self.answer = answer


class StreamService:
    """The streams of one API server.

    Whatever ``vllm serve`` was told about all requests (limits, defaults, models, logging) is
    applied by the server's own handler of ``/v1/completions``, method by method.
    """

    def __init__(self, handler: "OpenAIServingCompletion") -> None:
        """
        Args:
            handler: of a server under the policy.
        """
        self._handler = handler
        self._models: Any = handler.models
        self._renderer: Any = handler.online_renderer
        self._config = handler.engine_client.vllm_config
        policy, options = policy_of(self._config), SinkOptions.parse(self._config.additional_config)
        assert policy is not None
        assert options is not None
        self.policy = policy
        self.store = StreamStore(
            most_streams=options.sink_streams,
            most_tokens=options.sink_streams_tokens,
            idle_seconds=options.sink_streams_idle,
        )

    async def create(self, client: str, request: CreateStream) -> StoredStream:
        """A new stream of ``client``.

        Raises:
            Refused: there is no such model.
            NoRoom: see there.
            VLLMError: the content or the options are refused.
        """
        model = request.model or self._models.model_name()
        await self.check_model(model)
        validate_cache_salt(request.cache_salt)
        options, messages = request.options(), request.first_messages()
        if request.sink_pin == "system" and not any(m["role"] == "system" for m in messages):
            raise VLLMValidationError(
                "sink_pin='system' needs the system prompt when the stream is created; send "
                "system, or messages with one.",
                parameter="sink_pin",
            )
        others = {key: value for key, value in options.items() if key != PIN_KEY}
        # Refuses what does not fit; a pin is only known once it is rendered.
        apply_options(SamplingParams(extra_args=others), None, self._config)
        schedule = RequestPolicy.parse(others, self.policy)
        tokens = await self._tokens_of(request, first=True)
        try:
            stream = self.store.create(
                client,
                model,
                schedule,
                options,
                cache_salt=request.cache_salt,
                tokens=tokens,
                pending=[Waiting(each["role"], each["content"].encode()) for each in messages],
            )
        except TooLarge as error:
            raise VLLMValidationError(
                f"A stream that begins with {error.tokens} tokens (messages count as one for each "
                f"4 bytes, and 64 for each message) leaves no room to append to it: the server "
                f"remembers --sink-streams-tokens={self.store.most_tokens} of all streams "
                "together; send less, or start the server with more."
            ) from error
        if tokens:
            stream.tail, stream.open = "assistant", True
        return stream

    async def append(
        self, stream_id: str, request: Append, raw_request: "Request | None" = None
    ) -> Turn:
        """Append and, if asked to, generate; the turn must be closed.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
            NoRoom: see there.
            Refused: the stream's model is no longer there; the stream is as it was.
            VLLMError: the content or the options are refused; the stream is as it was.
        """
        turn = Turn(self, self.store.acquire(stream_id), request, raw_request)
        try:
            await turn.start()
        except BaseException:  # also when the client goes away
            await turn.close()
            raise
        return turn

    async def check_model(self, model: str) -> None:
        """As every handler of vLLM does, which may also load an adapter.

        Raises:
            Refused: there is no such model or adapter, or no longer.
        """
        answer = await self._handler._check_model(_asking_for(model))
        if answer is not None:
            raise Refused(answer)

    def check_engine(self) -> None:
        """As every handler of vLLM does before it renders.

        Raises:
            VLLMError: the engine is dead, or its queue is full.
        """
        self._handler._preflight()

    def info(self, stream: StoredStream) -> StreamInfo:
        """What ``GET`` says."""
        now, schedule = self.store.clock(), stream.schedule
        return StreamInfo(
            id=stream.id,
            model=stream.model,
            created=int(stream.created),
            age_seconds=round(time.time() - stream.created, 3),
            idle_seconds=0.0 if stream.busy else round(now - stream.used, 3),
            expires_in_seconds=round(max(self.store.expires_in(stream), 0.0), 3),
            busy=stream.busy,
            turns=stream.turns,
            position=len(stream.tokens),
            evicted=stream.evicted,
            cached=len(stream.tokens) - stream.evicted,
            evictions=stream.evictions,
            sink_tokens=None if schedule is None else schedule.sink_tokens,
            sink_window=None if schedule is None else schedule.window,
            capacity=self.policy.capacity if schedule is None else schedule.capacity,
            pending_messages=len(stream.pending),
        )

    async def new_tokens(self, stream: StoredStream, request: Append) -> list[int]:
        """Token ids of ``request`` behind ``stream``, with its pending messages before them.

        Renders the pin, if there is one, into ``stream``: the caller restores it on failure.
        """
        answer = request.generate is not None
        messages = [message.model_dump() for message in request.messages or ()]
        if stream.tail is None and (stream.pending or messages):
            all_messages = [*(waiting.message() for waiting in stream.pending), *messages]
            first = await self._first(stream, all_messages, answer and not request.is_raw)
            return [*first, *await self._tokens_of(request, first=False)]
        if stream.tail is not None and (messages or not (request.is_raw or stream.open)):
            return await behind(stream.tokens, stream.tail, messages, answer, self._render)
        return await self._tokens_of(request, first=not stream.tokens)

    async def _first(
        self, stream: StoredStream, messages: list[dict[str, str]], answer: bool
    ) -> list[int]:
        """Render the first messages of ``stream``, and pin their system message if it wants."""
        prompt = await self._prompt(messages, answer, stream.options)
        params = SamplingParams(extra_args=dict(stream.options))
        apply_options(params, prompt, self._config)
        stream.options = params.extra_args or {}
        stream.schedule = RequestPolicy.parse(stream.options, self.policy)
        tokens: list[int] = prompt["prompt_token_ids"]
        return tokens

    async def _render(self, messages: list[dict[str, str]], answer: bool) -> list[int]:
        prompt = await self._prompt(messages, answer, {PIN_KEY: "none"})
        tokens: list[int] = prompt["prompt_token_ids"]
        return tokens

    async def _prompt(
        self, messages: list[dict[str, str]], answer: bool, options: dict[str, Any]
    ) -> Any:
        if self._renderer.use_harmony:
            raise VLLMValidationError(
                "messages: this model's format is not a chat template; append text or tokens.",
                parameter="messages",
            )
        request = ChatCompletionRequest.model_validate(
            {"messages": messages, "add_generation_prompt": answer, "vllm_xargs": options}
        )
        _, (prompt,) = await self._renderer.preprocess_chat(
            request,
            request.messages,
            self._renderer.chat_template,
            self._renderer.chat_template_content_format,
            self._renderer.default_chat_template_kwargs,
        )
        return prompt

    async def _tokens_of(self, content: Content, *, first: bool) -> list[int]:
        """Token ids of text or tokens; messages are not for here."""
        given = content.text if content.tokens is None else content.tokens
        if given is None:
            return []
        if content.tokens is not None:
            self._renderer.renderer.validate_token_ids(content.tokens, parameter="tokens")
        request = CompletionRequest.model_validate(
            {"prompt": given, "add_special_tokens": first, "max_tokens": 1}
        )
        (prompt,) = await self._renderer.preprocess_completion(request, given, None)
        tokens: list[int] = prompt["prompt_token_ids"]
        return tokens

    def params(
        self, stream: StoredStream, generate: Generate | None, position: int
    ) -> SamplingParams:
        """Sampling parameters of a turn that generates behind ``position`` tokens.

        Raises:
            VLLMValidationError: the stream would become longer than anything may be.
        """
        room = self.store.most_tokens - position
        if generate is None:  # the engine computes a prompt only to sample behind it
            params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
            least = 1
        else:
            defaults = self._handler.default_sampling_params
            most = get_max_tokens(
                self._handler.model_config.max_model_len,
                generate.max_tokens,
                position,
                defaults,
                self._handler.override_max_tokens,
            )
            least = most
            if generate.max_tokens is None:
                left = room if stream.schedule is not None else self.policy.capacity - position
                least, most = 1, max(min(most, room, left), 1)
            given = generate.model_dump(exclude_none=True)
            params = CompletionRequest.model_validate(
                {"prompt": "a", **given, "stream": True}
            ).to_sampling_params(most, defaults)
        if least > room:
            raise VLLMValidationError(
                f"max_tokens={least} behind a stream of {position} tokens is more than the "
                f"{self.store.most_tokens} tokens this server remembers of its streams "
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
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs for ``tokens`` as the whole stream."""
        handler = self._handler
        request = _asking_for(stream.model)
        request_id = f"append-{handler._base_request_id(raw_request, request.request_id)}"
        headers = None
        if raw_request is not None:
            raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
            headers = await handler._get_trace_headers(raw_request.headers)
        prompt = tokens_input(tokens, cache_salt=stream.cache_salt)
        adapter = handler._maybe_get_adapters(request)
        handler._log_inputs(request_id, prompt, params=params, lora_request=adapter)
        return handler.engine_client.generate(
            prompt,
            params,
            request_id,
            lora_request=adapter,
            trace_headers=headers,
            priority=handler._get_priority(request, raw_request),
            data_parallel_rank=handler._get_data_parallel_rank(raw_request),
            session_id=handler._get_session_id(request, raw_request),
        )

    def raise_if_error(self, finish_reason: str | None, request_id: str) -> None:
        """vLLM's own error for the finish reason that stands for one."""
        self._handler._raise_if_error(finish_reason, request_id)


def _asking_for(model: str) -> CompletionRequest:
    """A request for ``model``, for what vLLM looks up in requests."""
    return CompletionRequest.model_validate({"model": model, "prompt": "a"})
