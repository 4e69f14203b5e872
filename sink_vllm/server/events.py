"""Patches of vLLM's server-sent events: they carry the account of evictions, and nothing is kept.

vLLM's generators of events, for ``/v1/completions`` and ``/v1/chat/completions``, are fed with
outputs of the engine. They do not pass ``kv_transfer_params`` on, the one for chat keeps the text
of the whole response for the request log, and both keep the prompt. They are wrapped from outside:
the outputs that go in are watched, the events that come out get the report.
"""

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.report import (
    FIELD,
    Report,
    account_of_batch,
    onto_chunk,
    report_of,
    with_account,
)
from sink_vllm.server.lengths import policy_of
from sink_vllm.server.prompts import Luggage, forget_body, own_messages


class Unkept(str):
    """Text that is not kept by who collects it: ``collected + text`` is ``collected``."""

    __slots__ = ()

    def __radd__(self, collected: str) -> str:
        return collected


class _Watch:
    """The outputs on their way into a generator of events."""

    def __init__(
        self, outputs: AsyncIterator[Any], choices: int, keep_text: bool, luggage: Luggage
    ) -> None:
        self.reports: dict[int, Report] = {}
        """Of choices whose last output went in and whose last event has not come out."""
        self._outputs = outputs
        self._choices = choices
        self._keep_text = keep_text
        self._luggage = luggage

    async def __call__(self) -> AsyncGenerator[Any, None]:
        async for item in self._outputs:
            # The merged outputs of several prompts come with the index of their prompt.
            prompt_index, output = item if isinstance(item, tuple) else (0, item)
            for completion in output.outputs:
                if not self._keep_text:
                    completion.text = Unkept(completion.text)
                if completion.finish_reason is not None:
                    report = report_of(output.kv_transfer_params, completion.index)
                    if report is not None:
                        index = prompt_index * self._choices + completion.index
                        self.reports[index] = report
            yield item
            if self._luggage.untold:
                self._luggage.told(prompt_index, output)


def _wrap_events(
    keeps_text: Callable[[Any], bool],
) -> Callable[[Callable[..., AsyncGenerator[str, None]]], Callable[..., Any]]:
    def wrap(original: Callable[..., AsyncGenerator[str, None]]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        async def watched(call: inspect.BoundArguments) -> AsyncGenerator[str, None]:
            arguments = call.arguments
            policy = policy_of(arguments["self"].model_config)
            assert policy is not None
            watch = _Watch(
                arguments["result_generator"],
                choices=arguments["request"].n or 1,
                keep_text=keeps_text(arguments["self"]),
                luggage=Luggage(arguments, policy),
            )
            async with aclosing(watch()) as outputs:
                arguments["result_generator"] = outputs
                async with aclosing(original(*call.args, **call.kwargs)) as chunks:
                    async for chunk in chunks:
                        yield _told(chunk, watch.reports) if watch.reports else chunk

        def events(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
            if policy_of(self.model_config) is None:
                return original(self, *args, **kwargs)
            return watched(signature.bind(self, *args, **kwargs))

        return events

    return wrap


def _told(chunk: Any, reports: dict[int, Report]) -> Any:
    """A chunk, an event or an object, with the report of the choice that ends in it."""
    if isinstance(chunk, str):
        return onto_chunk(chunk, reports)
    for choice in getattr(chunk, "choices", ()):
        if choice.finish_reason and choice.index in reports:
            report = reports.pop(choice.index)
            chunk.kv_transfer_params = with_account(chunk.kv_transfer_params, report)
    return chunk


def _chat_keeps_text(handler: Any) -> bool:
    """Parsers of tool calls and reasoning read the text; so does the log, if it is switched on."""
    return handler.parser_cls is not None or bool(
        handler.enable_log_outputs and handler.request_logger
    )


def _wrap_create(
    own: Callable[[Any], Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For both handlers: the body is of no use when a streamed response has been made of it."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
            if policy_of(self.model_config) is None:
                return await original(self, request, raw_request)
            response = await original(self, own(request), raw_request)
            if isinstance(response, AsyncGenerator) and raw_request is not None:
                forget_body(raw_request)
            return response

        return create

    return wrap


def _wrap_full_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    """Several prompts in one request: vLLM passes on the report about the first only."""

    def request_output_to_completion_response(
        self: Any, final_res_batch: list[Any], request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = original(self, final_res_batch, request, *args, **kwargs)
        if policy_of(self.model_config) is not None and len(final_res_batch) > 1:
            account = account_of_batch(final_res_batch, request.n or 1)
            if account is not None:
                response.kv_transfer_params = with_account(getattr(response, FIELD), account)
        return response

    return request_output_to_completion_response


PATCHES = (
    Patch(
        target="vllm.entrypoints.openai.completion.serving:"
        "OpenAIServingCompletion.completion_stream_generator",
        wrapper=_wrap_events(lambda _handler: True),
        record="0007-streamed-responses",
    ),
    Patch(
        target="vllm.entrypoints.openai.completion.serving:"
        "OpenAIServingCompletion.request_output_to_completion_response",
        wrapper=_wrap_full_completion,
        record="0007-streamed-responses",
    ),
    Patch(
        # Chunks before they become events: those of /v1/messages are made of them, too.
        target="vllm.entrypoints.openai.chat_completion.serving:"
        "OpenAIServingChat.chat_completion_stream_generator_raw",
        formerly="vllm.entrypoints.openai.chat_completion.serving:"
        "OpenAIServingChat.chat_completion_stream_generator",
        wrapper=_wrap_events(_chat_keeps_text),
        record="0007-streamed-responses",
    ),
    Patch(
        target="vllm.entrypoints.openai.completion.serving:"
        "OpenAIServingCompletion.create_completion",
        wrapper=_wrap_create(lambda request: request),
        record="0007-streamed-responses",
    ),
    Patch(
        target="vllm.entrypoints.openai.chat_completion.serving:"
        "OpenAIServingChat.create_chat_completion",
        wrapper=_wrap_create(own_messages),
        record="0007-streamed-responses",
    ),
)
