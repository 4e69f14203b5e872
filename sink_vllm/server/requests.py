"""Patches where requests enter the engine: options are applied, what cannot be served is a 400.

All requests, over HTTP or from ``LLM`` and ``AsyncLLM``, pass ``InputProcessor.process_inputs``;
only beam search is made of many small requests and is refused where it starts. What cannot be
requested at all without an option of the server is refused at start-up instead (``gate.py``).
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.look_back import MOST_LOOK_BACK, longest, repetition_look_back
from sink_vllm.policy.options import POLICY_KEY
from sink_vllm.server.lengths import FRONT_MAX, policy_of
from sink_vllm.server.options import PINNED_KEY, apply_options, refuse_options, send_parked

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

Refusal = tuple[Callable[["EngineCoreRequest", "SamplingParams", SinkConfig], bool], str, str]

REFUSALS: tuple[Refusal, ...] = (
    (
        lambda request, _params, _policy: request.prompt_embeds is not None,
        "prompt_embeds",
        "prompt embeddings cannot be streamed through a bounded cache; send text or token ids",
    ),
    (
        lambda request, _params, _policy: bool(request.mm_features),
        "multi_modal_data",
        "images, audio and video are not supported with --kv-policy sink; send text",
    ),
    (
        lambda request, params, policy: (
            (params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None)
            and len(request.prompt_token_ids or ()) > policy.capacity
        ),
        "prompt_logprobs",
        "log-probabilities of a prompt need the whole prompt in the cache; shorten the prompt to "
        "the capacity, or leave prompt_logprobs out",
    ),
    (
        lambda _request, params, _policy: bool(params.trace_decode_token_ids),
        "trace_decode_token_ids",
        "trace replay is not supported with --kv-policy sink; leave it out",
    ),
    (
        # The worker finds the start of the thinking in the request's tokens; evictions drop it.
        lambda _request, params, _policy: params.thinking_token_budget is not None,
        "thinking_token_budget",
        "a thinking budget cannot be counted over evicted tokens with --kv-policy sink; leave it "
        "out, or bound the answer with max_tokens",
    ),
    (
        lambda request, params, _policy: (
            request.resumable and (params.extra_args or {}).get(POLICY_KEY) == "full"
        ),
        POLICY_KEY,
        "a streaming input session has no known length, so kv_policy='full' cannot promise that "
        "it fits; leave kv_policy out",
    ),
)
"""(is it such a request, the field to blame, why and what to do), first match is raised."""

BEAM_SEARCH = (
    "beam search forks streams at every token, which --kv-policy sink does not support; "
    "use sampling with n > 1"
)


def _wrap_process_inputs(
    original: Callable[..., "EngineCoreRequest"],
) -> Callable[..., "EngineCoreRequest"]:
    signature = inspect.signature(original)

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> "EngineCoreRequest":
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if params is None:
            return request
        if policy_of(self.vllm_config) is None:
            refuse_options(params.extra_args)
            return request
        prompt = signature.bind(self, *args, **kwargs).arguments["prompt"]
        pinned = prompt.get(PINNED_KEY) if isinstance(prompt, dict) else None
        rendered = {"prompt_token_ids": request.prompt_token_ids, PINNED_KEY: pinned}
        check_request(request, params, apply_options(params, rendered, self.vllm_config))
        send_parked(params)
        return request

    return process_inputs


def check_request(
    request: "EngineCoreRequest", params: "SamplingParams", policy: SinkConfig
) -> None:
    """Refuse what ``REFUSALS`` lists, and bound ``max_tokens`` (``params`` is the request's own).

    Raises:
        VLLMValidationError: HTTP status 400.
    """
    from vllm.exceptions import VLLMValidationError

    for applies, parameter, reason in REFUSALS:
        if applies(request, params, policy):
            raise VLLMValidationError(
                f"{parameter}: {reason} (capacity {policy.capacity} tokens).", parameter=parameter
            )
    assert params.max_tokens is not None  # process_inputs has filled it in
    room = FRONT_MAX - len(request.prompt_token_ids or ())
    if params.max_tokens > FRONT_MAX:
        raise VLLMValidationError(
            f"max_tokens={params.max_tokens} cannot be counted by the engine; "
            f"use at most {FRONT_MAX}.",
            parameter="max_tokens",
            value=params.max_tokens,
        )
    # Like vLLM's OpenAI handlers: an output that would not fit behind the prompt is cut silently.
    # Nobody reads the two thousand million tokens that remain.
    params.max_tokens = min(params.max_tokens, room)
    if FRONT_MAX - room + params.max_tokens > policy.capacity:
        check_look_back(params, policy.schedule.window)


def check_look_back(params: "SamplingParams", window: int) -> None:
    """Refuse what would have to look at evicted output tokens that nobody keeps.

    Args:
        params: of a request that may evict; ``max_tokens`` and ``bad_words`` are filled in.
        window: last tokens of its stream that are always cached.

    Raises:
        VLLMValidationError: HTTP status 400.
    """
    from vllm.exceptions import VLLMValidationError

    detection = params.repetition_detection
    look_back = repetition_look_back(detection, params.max_tokens or 0)
    if detection is not None and look_back > MOST_LOOK_BACK:
        raise VLLMValidationError(
            f"repetition_detection: max_pattern_size={detection.max_pattern_size} times "
            f"min_count={detection.min_count} looks back over {look_back} tokens, and at most "
            f"{MOST_LOOK_BACK} are kept when tokens are evicted; use a smaller product, or a "
            "smaller max_tokens.",
            parameter="repetition_detection",
        )
    if (word := longest(params.bad_words_token_ids)) > window:
        raise VLLMValidationError(
            f"bad_words: a word of {word} tokens cannot be recognised in a window of {window}; "
            f"use words of at most {window} tokens, or a larger window.",
            parameter="bad_words",
        )


def _wrap_beam_search_online(original: Callable[..., Any]) -> Callable[..., Any]:
    # A plain function around an async generator: it raises when the handler calls it, so that the
    # client gets a 400 and not events that start with an error.
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_beam_search(self.engine_client.vllm_config)
        return original(self, *args, **kwargs)

    return beam_search


def _wrap_beam_search_offline(original: Callable[..., Any]) -> Callable[..., Any]:
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_beam_search(self.llm_engine.vllm_config)
        return original(self, *args, **kwargs)

    return beam_search


def _refuse_beam_search(vllm_config: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    if policy_of(vllm_config) is not None:
        raise VLLMValidationError(f"{BEAM_SEARCH}.", parameter="use_beam_search")


PATCHES = (
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        wrapper=_wrap_process_inputs,
        record="0005-requests-the-policy-refuses",
    ),
    Patch(
        target="vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
        wrapper=_wrap_beam_search_online,
        record="0006-beam-search",
    ),
    Patch(
        target="vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
        wrapper=_wrap_beam_search_offline,
        record="0006-beam-search",
    ),
)
