"""The CPU worker under the policy (``--worker-cls``, set at start-up)."""

from typing import Any

from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from sink_vllm.worker.runner_v1 import StreamingLLMRunnerV1
from sink_vllm.worker.runner_v2 import StreamingLLMRunnerV2
from sink_vllm.worker.self_test import self_test


class StreamingLLMCPUModelRunner(StreamingLLMRunnerV1, CPUModelRunner):
    """vLLM's V1 CPU model runner under the policy."""


class StreamingLLMCPUModelRunnerV2(StreamingLLMRunnerV2, CPUModelRunnerV2):
    """vLLM's V2 CPU model runner under the policy."""


class StreamingLLMCPUWorker(CPUWorker):
    """vLLM's CPU worker with a model runner that moves pages and offsets positions."""

    def init_device(self) -> None:
        super().init_device()
        # CPUWorker builds its runner inside this method, without a factory to override. The
        # runner has not loaded anything yet, so it can still become one of ours.
        ours = {
            CPUModelRunner: StreamingLLMCPUModelRunner,
            CPUModelRunnerV2: StreamingLLMCPUModelRunnerV2,
        }
        self.model_runner.__class__ = ours[type(self.model_runner)]

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        self_test(self.model_runner, self)
        return result
