"""The front-end half of an engine, ``AsyncLLM`` or ``LLMEngine``, under the policy.

Their constructors are the one place that sees the configuration and everything made from it, so
this is where the front end gets its own view of the lengths, its counters in ``/metrics``, and
responses that take constant memory. With the policy off the original runs untouched.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from sink_vllm.frontend.lengths import front_view, policy_of
from sink_vllm.patching import Patch


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

        from sink_vllm.frontend.memory import adopt

        adopt(self.output_processor, policy)

    return __init__


def _stat_logger(others: Sequence[Any]) -> Any:
    """Our counters, exported in the way of the loggers beside them."""
    if any(getattr(other, "__name__", "").startswith("Ray") for other in others):
        from sink_vllm.ray.metrics import RayStreamingLLMStatLogger

        return RayStreamingLLMStatLogger
    from sink_vllm.metrics import StreamingLLMStatLogger

    return StreamingLLMStatLogger


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
)
