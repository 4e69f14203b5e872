"""Patches that mark where the system message of a rendered chat ends (``policy.pinning`` finds it).

With ``sink_pin`` the system message of a chat becomes its sink tokens. Where vLLM renders a chat,
over HTTP (completions, responses, Anthropic's messages) or in ``LLM.chat``, messages, template and
token ids are at hand together. There the length of the system message is written into the rendered
prompt (vLLM's ``EngineInput``, a dictionary), and ``server.options`` turns it into sink tokens.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.pinning import Render, SystemMessage, up_to_system_message
from sink_vllm.server.lengths import policy_of
from sink_vllm.server.options import PINNED_KEY, wants_pin

_REMEMBERED = 64  # system messages; they come back with every turn of a conversation
_ATTRIBUTE = "_streaming_llm_system_messages"  # of the renderer


def _wrap_preprocess_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    async def preprocess_chat(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = policy_of(self.model_config)
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        request = arguments["request"]
        # Requests of /tokenize have no such field, and no answer.
        if (
            policy is None
            or not hasattr(request, "vllm_xargs")
            or not wants_pin(request.vllm_xargs, policy)
        ):
            return await original(self, *args, **kwargs)
        messages = list(arguments["messages"])
        probe = {**arguments, "parser": None}  # parsers only change the request
        about = {**probe, "self": None, "request": None, "messages": None}
        params = request.build_chat_params(
            arguments["default_template"], arguments["default_template_content_format"]
        )

        async def render(messages: list[Any], answer: bool) -> Sequence[int] | None:
            from vllm.exceptions import VLLMValidationError

            variation = {**probe, "request": _variation(request, answer), "messages": messages}
            try:
                _, (engine_input,) = await original(**variation)
            except (ValueError, VLLMValidationError):  # the template refuses the messages
                return None
            tokens: list[int] = engine_input["prompt_token_ids"]
            return tokens

        # Before vLLM's parsers see the request: they change it.
        system = await _system_message(self, messages, render, repr((about, params)))
        conversation, engine_inputs = await original(self, *args, **kwargs)
        _mark(engine_inputs[0], system)
        return conversation, engine_inputs

    return preprocess_chat


def _variation(request: Any, answer: bool) -> Any:
    """``request`` for other messages, with or without the header of the answer."""
    fields = {
        "add_generation_prompt": answer,
        "continue_final_message": False,
        "kv_transfer_params": None,  # may hold token ids to use instead of the messages
    }
    known = {name: value for name, value in fields.items() if name in type(request).model_fields}
    return request.model_copy(update=known)


def _wrap_preprocess_chat_one(original: Callable[..., Any]) -> Callable[..., Any]:
    """``LLM.chat`` under a server default; its sampling parameters are not at hand here."""
    signature = inspect.signature(original)

    def preprocess_chat_one(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = policy_of(self.model_config)
        if policy is None or policy.sink_pin != "system":
            return original(self, *args, **kwargs)
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        messages = list(arguments["conversation"])
        about = {
            name: arguments[name] for name in arguments if name not in ("self", "conversation")
        }

        async def render(messages: list[Any], answer: bool) -> Sequence[int] | None:
            from vllm.exceptions import VLLMValidationError

            variation = {
                **arguments,
                "conversation": messages,
                "add_generation_prompt": answer,
                "continue_final_message": False,
            }
            try:
                tokens: list[int] = original(**variation)["prompt_token_ids"]
            except (ValueError, VLLMValidationError):
                return None
            return tokens

        system = _run(_system_message(self, messages, render, repr(about)))
        engine_input = original(self, *args, **kwargs)
        _mark(engine_input, system)
        return engine_input

    return preprocess_chat_one


async def _system_message(
    renderer: Any, messages: list[Any], render: Render, context: str
) -> SystemMessage | None:
    """The first system message of ``messages``, as the template described by ``context`` has it.

    ``renderer`` remembers the most recent ones.

    Raises:
        VLLMValidationError: HTTP status 400.
    """
    head = up_to_system_message(messages)
    if head is None:
        return None
    remembered = vars(renderer).setdefault(_ATTRIBUTE, OrderedDict())
    key = f"{head!r} {context}"
    if key in remembered:
        remembered.move_to_end(key)
        return remembered[key]
    try:
        system = await SystemMessage.probe(head, render)
    except ValueError as error:
        raise _refused(error) from error
    remembered[key] = system
    if len(remembered) > _REMEMBERED:
        remembered.popitem(last=False)
    return system


def _mark(engine_input: Any, system: SystemMessage | None) -> None:
    """Write into ``engine_input`` where its system message ends; 0 without one.

    Raises:
        VLLMValidationError: HTTP status 400.
    """
    try:
        pinned = 0 if system is None else system.end(engine_input["prompt_token_ids"])
    except ValueError as error:
        raise _refused(error) from error
    engine_input[PINNED_KEY] = pinned


def _refused(error: ValueError) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter="vllm_xargs.sink_pin")


def _run(coroutine: Any) -> Any:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a synchronous chat template waited for something")


PATCHES = (
    Patch(
        target="vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        wrapper=_wrap_preprocess_chat,
        record="0021-end-of-the-system-message",
    ),
    Patch(
        target="vllm.entrypoints.common.offline:OfflineInferenceMixin._preprocess_chat_one",
        wrapper=_wrap_preprocess_chat_one,
        record="0021-end-of-the-system-message",
    ),
)
