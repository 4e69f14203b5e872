"""Token ids of what is appended to a stored stream: messages, text or tokens, by vLLM's renderer.

Only what is new is rendered: messages behind a stream that goes on by ``streams.join``. The first
messages of a stream are rendered as a whole chat, which is also where its system message is pinned.
"""

from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.request_options import PIN_KEY, RequestPolicy
from sink_vllm.policy.schedule import Schedule
from sink_vllm.server.options import apply_options
from sink_vllm.server.streams.bodies import Append, Content
from sink_vllm.server.streams.join import behind
from sink_vllm.server.streams.stored import StoredStream

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Rendering:
    """Renders for all stored streams of one API server."""

    def __init__(self, renderer: Any, policy: SinkConfig, vllm_config: "VllmConfig") -> None:
        """
        Args:
            renderer: vLLM's ``OnlineRenderer``.
            policy: of the server.
            vllm_config: of the front end, under the policy.
        """
        self._renderer = renderer
        self._policy = policy
        self._config = vllm_config

    async def new_tokens(self, stream: StoredStream, request: Append) -> list[int]:
        """Token ids of ``request`` behind ``stream``, with its pending messages before them.

        Renders the pin, if there is one, into ``stream``: the caller restores it on failure.

        Raises:
            VLLMError: the content or the options are refused.
        """
        answer = request.generate is not None
        messages = [message.model_dump() for message in request.messages or ()]
        if stream.tail is None and (stream.pending or messages):
            all_messages = [*(waiting.message() for waiting in stream.pending), *messages]
            first = await self._first(stream, all_messages, answer and not request.is_raw)
            return [*first, *await self.tokens_of(request, first=False)]
        if stream.tail is not None and (messages or not (request.is_raw or stream.open)):
            return await behind(stream.tokens, stream.tail, messages, answer, self._render)
        return await self.tokens_of(request, first=not stream.tokens)

    async def tokens_of(self, content: Content, *, first: bool) -> list[int]:
        """Token ids of text or tokens; messages are not for here.

        Args:
            content: at most one of the two.
            first: nothing stands before it, so that the tokenizer adds what begins a text.

        Raises:
            VLLMError: the content is refused.
        """
        given = content.text if content.tokens is None else content.tokens
        if given is None:
            return []
        if content.tokens is not None:
            self._renderer.renderer.validate_token_ids(content.tokens, parameter="tokens")
        request = CompletionRequest.model_validate(
            {"prompt": given, "add_special_tokens": first, "max_tokens": 1}
        )
        (prompt,) = await self._renderer.preprocess_completion(request, given, None)
        return _ids(prompt)

    def resolve(
        self, options: dict[str, Any], prompt: Any
    ) -> tuple[dict[str, Any], Schedule | None]:
        """What ``options`` come to in front of ``prompt`` (vLLM's ``EngineInput``, or ``None``).

        Returns:
            The options as the scheduler takes them, a pin turned into sink tokens, and their
            schedule; ``None`` for ``kv_policy="full"``.

        Raises:
            VLLMValidationError: they do not fit what the server was started with.
        """
        params = SamplingParams(extra_args=dict(options))
        apply_options(params, prompt, self._config)
        resolved = params.extra_args or {}
        return resolved, RequestPolicy.parse(resolved, self._policy)

    async def _first(
        self, stream: StoredStream, messages: list[dict[str, str]], answer: bool
    ) -> list[int]:
        """Render the first messages of ``stream``, and pin their system message if it wants."""
        prompt = await self._prompt(messages, answer, stream.options)
        stream.options, stream.schedule = self.resolve(stream.options, prompt)
        return _ids(prompt)

    async def _render(self, messages: list[dict[str, str]], answer: bool) -> list[int]:
        return _ids(await self._prompt(messages, answer, {PIN_KEY: "none"}))

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


def _ids(prompt: Any) -> list[int]:
    tokens: list[int] = prompt["prompt_token_ids"]
    return tokens
