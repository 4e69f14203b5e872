"""The CPU worker under the policy (``--worker-cls``, set at start-up)."""

from typing import Any

import torch
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from sink_vllm.worker.runner_v1 import StreamingLLMRunnerV1
from sink_vllm.worker.runner_v2 import StreamingLLMRunnerV2
from sink_vllm.worker.worker import StreamingLLMWorker


class StreamingLLMCPUModelRunner(StreamingLLMRunnerV1, CPUModelRunner):
    """vLLM's V1 CPU model runner under the policy.

    Every prompt longer than the capacity arrives in chunks here, and vLLM 0.32 ends the engine
    when a request with a seed is prefilled in chunks on a CPU: after each chunk but the last it
    takes back the random numbers drawn for nothing with ``Generator.set_offset``, which torch has
    for CUDA only. So those rows' generators are put back to their state here, and kept out of
    vLLM's sight while it looks for them.
    """

    def sync_and_gather_intermediate_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """What a later pipeline stage is given by the stage before it.

        vLLM makes the buffer in a dummy run, which an eager CPU engine never does.
        """
        if self.intermediate_tensors is None:
            model: Any = self.get_model()
            self.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return super().sync_and_gather_intermediate_tensors(*args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        states = {row: gen.get_state() for row, gen in self._generators_to_restore().items()}
        output = super()._sample(*args, **kwargs)
        for row, state in states.items():
            self.input_batch.generators[row].set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._generators_to_restore()
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    def _generators_to_restore(self) -> dict[int, torch.Generator]:
        """Generators of the rows whose sampled token is discarded, by row."""
        generators = self.input_batch.generators
        if not generators:
            return {}
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        return {int(row): generators[int(row)] for row in discarded if int(row) in generators}


class StreamingLLMCPUModelRunnerV2(StreamingLLMRunnerV2, CPUModelRunnerV2):
    """vLLM's V2 CPU model runner under the policy."""


class StreamingLLMCPUWorker(StreamingLLMWorker, CPUWorker):
    """vLLM's CPU worker with a model runner that moves pages and offsets positions."""

    def init_device(self) -> None:
        super().init_device()
        # CPUWorker makes a runner inside this method, without a factory to override. It has loaded
        # nothing yet; it goes as it came, and ours is made the same way.
        self.model_runner = self._make_model_runner()

    def _make_model_runner(self) -> Any:
        cls = (
            StreamingLLMCPUModelRunnerV2 if self.use_v2_model_runner else StreamingLLMCPUModelRunner
        )
        return cls(self.vllm_config, torch.device("cpu"))
