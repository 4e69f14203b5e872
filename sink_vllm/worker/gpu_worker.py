"""The GPU worker under the policy (``--worker-cls``, set at start-up)."""

from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from sink_vllm.worker.runner_v1 import StreamingLLMRunnerV1
from sink_vllm.worker.runner_v2 import StreamingLLMRunnerV2
from sink_vllm.worker.worker import StreamingLLMWorker


class StreamingLLMGPUModelRunner(StreamingLLMRunnerV1, GPUModelRunner):
    """vLLM's V1 model runner under the policy."""


class StreamingLLMGPUModelRunnerV2(StreamingLLMRunnerV2, GPUModelRunnerV2):
    """vLLM's V2 model runner under the policy."""


class StreamingLLMGPUWorker(StreamingLLMWorker, Worker):
    """vLLM's GPU worker with a model runner that moves pages and offsets positions."""

    def _make_model_runner(self) -> Any:
        assert self.device is not None  # vLLM calls this at the end of init_device
        cls = (
            StreamingLLMGPUModelRunnerV2 if self.use_v2_model_runner else StreamingLLMGPUModelRunner
        )
        return cls(self.vllm_config, self.device)
