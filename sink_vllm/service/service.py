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

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sink_vllm.config import SinkOptions
from sink_vllm.frontend.lengths import policy_of
from sink_vllm.frontend.request_options import apply_options
from sink_vllm.request_options import PIN_KEY, RequestPolicy
from sink_vllm.service.join import behind
from sink_vllm.service.models import (
    Append,
    Content,
    CreateStream,
    Generate,
    StreamInfo,
)
from sink_vllm.service.store import StoredStream, StreamStore
from sink_vllm.service.turn import Turn

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class StreamService:
    """The streams of one API server."""

    def __init__(self, engine_client: "EngineClient", models: Any, renderer: Any) -> None:
        """
        Args:
            engine_client: of a server under the policy.
            models: vLLM's ``OpenAIServingModels``.
            renderer: vLLM's ``OnlineRenderer``.
        """
        self._engine, self._models, self._renderer = engine_client, models, renderer
        self._config = engine_client.vllm_config
        policy, options = policy_of(self._config), SinkOptions.parse(self._config.additional_config)
        assert policy is not None
        assert options is not None
        self.policy = policy
        self.store = StreamStore(
            most_streams=options.sink_streams,
            most_tokens=options.sink_streams_tokens,
            idle_seconds=options.sink_streams_idle,
        )

    async def create(self, request: CreateStream) -> StoredStream:
        """A new stream; raises vLLM's own errors for what is wrong with it, and ``NoRoom``."""
        model = request.model or self._models.base_model_paths[0].name
        names = [base.name for base in self._models.base_model_paths]
        if model not in (*names, *self._models.lora_requests):
            raise VLLMNotFoundError(
                f"The model {model!r} does not exist; this server has "
                f"{', '.join([*names, *self._models.lora_requests])}."
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
        apply_options(SamplingParams(extra_args=others), None, self._config)
        schedule = RequestPolicy.parse(others, self.policy)
        tokens = await self._tokens_of(request, first=True)
        stream = self.store.create(model, schedule, options, request.cache_salt)
        stream.pending = messages
        stream.tokens.extend(tokens)
        if tokens:
            stream.tail, stream.open = "assistant", True
        self.store.release(stream)
        return stream

    async def append(self, stream_id: str, request: Append) -> Turn:
        """Append and, if asked to, generate; the turn must be closed.

        Raises:
            UnknownStream: see there.
            BusyStream: see there.
            VLLMError: the content or the options are refused; the stream is as it was.
        """
        stream = self.store.acquire(stream_id)
        turn = Turn(self, stream, request)
        try:
            await turn.start()
        except BaseException:  # also when the client goes away
            await turn.close()
            raise
        return turn

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
            all_messages = [*stream.pending, *messages]
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

    def params(self, stream: StoredStream, generate: Generate | None, room: int) -> SamplingParams:
        """Sampling parameters of a turn that may bring ``room`` tokens."""
        if generate is None:  # the engine computes a prompt only to sample behind it
            params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        else:
            given = generate.model_dump(exclude_none=True)
            most = generate.max_tokens or (None if stream.schedule is None else room)
            defaults = self._config.model_config.get_diff_sampling_param()
            params = CompletionRequest.model_validate(
                {"prompt": "a", **given, "stream": True}
            ).to_sampling_params(most, defaults)  # type: ignore[arg-type]
        params.output_kind = RequestOutputKind.DELTA
        params.extra_args = dict(stream.options) or None
        return params

    def outputs(
        self, stream: StoredStream, tokens: list[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs for ``tokens`` as the whole stream."""
        return self._engine.generate(
            tokens_input(tokens, cache_salt=stream.cache_salt),
            params,
            f"{stream.id}-{stream.turns}",
            lora_request=self._models.lora_requests.get(stream.model),
        )
