"""A step's plan is consumed by the worker it reaches, or the step fails.

A worker that is not ours would run the step without moving pages, and answer from wrong keys.
"""

from collections.abc import Callable
from typing import Any

from sink_vllm.compat.patching import Patch
from sink_vllm.policy.plan import StepPlan


def _wrap_execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if StepPlan.of(scheduler_output) is not None:
            runner = getattr(self.worker, "model_runner", None)
            if not getattr(runner, "consumes_plans", False):
                raise RuntimeError(
                    f"a step with evictions reached {type(self.worker).__name__} with "
                    f"{type(runner).__name__}, which knows nothing of --kv-policy sink; start "
                    "every node with the same options of the policy."
                )
        return original(self, scheduler_output, *args, **kwargs)

    return execute_model


PATCHES = (
    Patch(
        target="vllm.v1.worker.worker_base:WorkerWrapperBase.execute_model",
        wrapper=_wrap_execute_model,
        record="0042-plans-are-consumed",
    ),
)
