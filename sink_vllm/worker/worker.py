"""What the workers of CPUs and GPUs share: memory and proof before the first request."""

from typing import Any

from sink_vllm.gate.refused import refusals
from sink_vllm.worker.self_test import self_test

# vLLM's two workers are parent and child; a mixin has to come before either.
_Worker: Any = object


class StreamingLLMWorker(_Worker):
    """Mixin over vLLM's worker, whose ``model_runner`` is a ``StreamingLLMRunner``."""

    def determine_available_memory(self) -> int:
        # Before memory is measured, so that the KV cache is smaller by what page moves work in.
        self.model_runner.reserve_scratch()
        available: int = super().determine_available_memory()
        return available

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        with refusals():
            self_test(self.model_runner, self)
        return result
