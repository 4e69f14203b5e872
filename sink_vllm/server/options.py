"""Writes a request's options (``policy.request_options``) into its sampling parameters, or refuses.

They are checked twice with the same functions: when ``AsyncLLM.generate`` is called, so that a
streamed response is refused with a 400 and not with an event inside a 200; and in
``InputProcessor.process_inputs``, which every other way into the engine passes too.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import POLICY_KEY, flag
from sink_vllm.policy.parked import KEY as PARKED_KEY
from sink_vllm.policy.parked import parked_of
from sink_vllm.policy.request_options import (
    BOUND_KEY,
    PIN_KEY,
    REQUEST_KEYS,
    TOKENS_KEY,
    WINDOW_KEY,
    RequestPolicy,
    check_bound,
    check_full,
    check_pages,
    pinned_sink_tokens,
)
from sink_vllm.server.lengths import FRONT_MAX, policy_of
from sink_vllm.server.prompts import OutputsOf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

PINNED_KEY = "streaming_llm_pinned_tokens"
"""Where the length of a pinned system message stands in vLLM's ``EngineInput`` (a dictionary)."""


def apply_options(params: "SamplingParams", prompt: Any, vllm_config: "VllmConfig") -> SinkConfig:
    """Check the options in ``params.extra_args``, and leave them normalised for the scheduler.

    Args:
        params: the request's own; ``extra_args`` is replaced, ``max_tokens`` of a request with
            ``kv_policy="full"`` that names none becomes what fits, and no ``max_tokens`` stays
            above what ``--sink-max-stream-tokens`` leaves.
        prompt: vLLM's ``EngineInput``, or any other prompt of one that has no pin.
        vllm_config: of the front end, under the policy.

    Returns:
        The policy of this request; for ``full`` the server's own.

    Raises:
        VLLMValidationError: HTTP status 400.
    """
    policy = policy_of(vllm_config)
    assert policy is not None
    extra_args = params.extra_args or {}
    options = _with_pin(extra_args, _field(prompt, PINNED_KEY), policy)
    try:
        parked = parked_of(extra_args)
        request = RequestPolicy.read(options)
        schedule = request.schedule(policy)
        if schedule is not None and (pages := _pool_pages(vllm_config)) is not None:
            check_pages(schedule, policy.block_size, pages)
        tokens = _field(prompt, "prompt_token_ids")
        if schedule is None and tokens is not None:
            params.max_tokens = _full_max_tokens(params, len(tokens), policy)
        if policy.max_stream_tokens and tokens is not None:
            not_sent = 0 if parked is None else parked.not_sent
            _bound(params, len(tokens) + not_sent, policy.max_stream_tokens)
    except ValueError as error:
        raise _refused(str(error)) from error
    others = {key: value for key, value in extra_args.items() if key not in REQUEST_KEYS}
    params.extra_args = {**others, **request.normalised(policy)} or None
    return policy if schedule is None else replace(policy, schedule=schedule)


def send_parked(params: "SamplingParams") -> None:
    """Make what a stored stream's request carries fit for vLLM's messages; after the checks."""
    parked = parked_of(params.extra_args)
    if parked is not None:
        params.extra_args = {**(params.extra_args or {}), PARKED_KEY: parked.wire()}


def refuse_options(extra_args: Mapping[str, Any] | None) -> None:
    """A server without the policy says so, instead of ignoring what was asked for.

    Raises:
        VLLMValidationError: HTTP status 400.
    """
    asked = {key: value for key, value in (extra_args or {}).items() if key in REQUEST_KEYS}
    if asked.get(POLICY_KEY) == "full":
        del asked[POLICY_KEY]
    if asked.get(PIN_KEY) == "none":
        del asked[PIN_KEY]
    for key, value in asked.items():
        raise _refused(
            f"{key}={value!r} needs a server that was started with --kv-policy sink, and this "
            f"one was not; start it with that option, or leave {key} out."
        )


def wants_pin(extra_args: Mapping[str, Any] | None, policy: SinkConfig) -> bool:
    """Whether a chat with these ``vllm_xargs`` has its system message pinned."""
    given = extra_args or {}
    if given.get(PIN_KEY) is not None:
        return given[PIN_KEY] == "system"
    chosen = given.get(POLICY_KEY) == "full" or given.get(TOKENS_KEY) is not None
    return policy.sink_pin == "system" and not chosen


def _with_pin(
    extra_args: Mapping[str, Any], pinned: int | None, policy: SinkConfig
) -> Mapping[str, Any]:
    """``extra_args`` with the pin, if any, turned into a number of sink tokens."""
    if pinned is None or not wants_pin(extra_args, policy):
        return extra_args
    try:
        sink_tokens = pinned_sink_tokens(pinned, extra_args, policy)
    except ValueError as error:
        raise _refused(str(error)) from error
    rest = {key: value for key, value in extra_args.items() if key != PIN_KEY}
    return {**rest, TOKENS_KEY: sink_tokens}


def _full_max_tokens(params: "SamplingParams", prompt_tokens: int, policy: SinkConfig) -> int:
    """``max_tokens`` inside the capacity; where none is given, vLLM has filled in ``FRONT_MAX``."""
    given = params.max_tokens
    if given is not None and given >= FRONT_MAX - prompt_tokens:
        given = None
    return check_full(prompt_tokens, given, policy.capacity)


def _bound(params: "SamplingParams", prompt_tokens: int, most: int) -> None:
    """Cut ``max_tokens``, as vLLM's handlers cut what does not fit into ``--max-model-len``."""
    params.max_tokens = check_bound(prompt_tokens, params.max_tokens, most)
    params.min_tokens = min(params.min_tokens, params.max_tokens)


def _pool_pages(vllm_config: "VllmConfig") -> int | None:
    """Pages one engine has for streams; ``None`` before it has reported them."""
    pages = vllm_config.cache_config.num_gpu_blocks
    if pages is None:
        return None
    parallel = vllm_config.parallel_config
    engines = (
        parallel.data_parallel_size_local
        if parallel.local_engines_only
        else parallel.data_parallel_size
    )
    # vLLM adds up its engines. One page of each is the null block.
    return pages // max(engines, 1) - 1


def _field(prompt: Any, key: str) -> Any:
    return prompt.get(key) if isinstance(prompt, dict) else None


def _refused(message: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    if message.startswith(flag(BOUND_KEY)):
        return VLLMValidationError(message, parameter="prompt")
    named = (*REQUEST_KEYS, PARKED_KEY)
    option = next((key for key in named if message.startswith(key)), WINDOW_KEY)
    return VLLMValidationError(message, parameter=f"vllm_xargs.{option}")


def _wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    # A plain function around an async generator: it raises when the handler calls it.
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if policy_of(self.vllm_config) is None:
            refuse_options(sampling_params.extra_args)
        else:
            # On a copy: the caller's object may serve other prompts too.
            apply_options(copy(sampling_params), prompt, self.vllm_config)
            if isinstance(prompt, dict):
                own = dict(prompt)
                return OutputsOf(original(self, own, sampling_params, *args, **kwargs), own)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


PATCHES = (
    Patch(
        target="vllm.v1.engine.async_llm:AsyncLLM.generate",
        wrapper=_wrap_generate,
        record="0020-options-of-one-request",
    ),
)
