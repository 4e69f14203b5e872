"""Patches of ``AsyncLLM`` and ``LLMEngine``: what the front end of an engine gets as it is made.

Their constructors are the one place that sees the configuration and everything made from it, so
this is where the front end gets its own view of the lengths, its counters in ``/metrics``, and
responses that take constant memory. With the policy off the original runs untouched.

Engines in other processes say what they run when they are ready, and are refused if that is not
what the front end runs: engines of other nodes are started from a command line of their own.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from sink_vllm.compat.parts import TOLD, check_engine
from sink_vllm.compat.patching import Patch
from sink_vllm.gate.refused import refusals
from sink_vllm.policy.config import SinkConfig
from sink_vllm.server.lengths import front_view, policy_of


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        vllm_config = front_view(call.arguments["vllm_config"])
        policy = policy_of(vllm_config)
        if policy is None:
            original(self, *args, **kwargs)
            return
        call.arguments["vllm_config"] = vllm_config
        if call.arguments["log_stats"]:
            loggers = call.arguments.get("stat_loggers") or ()
            # First: it takes our numbers out of the statistics that the others read.
            call.arguments["stat_loggers"] = [_stat_logger(loggers), *loggers]
        original(*call.args, **call.kwargs)

        from sink_vllm.server.memory import adopt

        adopt(self.output_processor, policy)

    return __init__


def _stat_logger(others: Sequence[Any]) -> Any:
    """Our counters, exported in the way of the loggers beside them."""
    if any(getattr(other, "__name__", "").startswith("Ray") for other in others):
        from sink_vllm.server.ray_metrics import RayStreamingLLMStatLogger

        return RayStreamingLLMStatLogger
    from sink_vllm.server.metrics import StreamingLLMStatLogger

    return StreamingLLMStatLogger


def _wrap_apply_ready_response(original: Callable[..., None]) -> Callable[..., None]:
    def _apply_ready_response(self: Any, payload: bytes) -> None:
        # vLLM takes an empty message for an engine that has nothing to say.
        message = msgspec.msgpack.decode(payload) if payload else {}
        with refusals():
            config = SinkConfig.of(self.vllm_config)
            check_engine(message.get("data_parallel_rank", 0), message.get(TOLD), config)
        original(self, payload)

    return _apply_ready_response


PATCHES = (
    Patch(
        target="vllm.v1.engine.async_llm:AsyncLLM.__init__",
        wrapper=_wrap_init,
        record="0003-front-end-view-of-lengths",
    ),
    Patch(
        target="vllm.v1.engine.llm_engine:LLMEngine.__init__",
        wrapper=_wrap_init,
        record="0003-front-end-view-of-lengths",
    ),
    Patch(
        target="vllm.v1.engine.core_client:MPClient._apply_ready_response",
        wrapper=_wrap_apply_ready_response,
        record="0041-parts-are-checked",
    ),
)
