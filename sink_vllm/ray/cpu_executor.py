"""vLLM's Ray executor for CPUs: one Ray CPU is the device of one worker.

vLLM 0.32 places Ray workers by accelerator: the platform names the Ray resource that stands for
its devices, and every worker asks Ray which of them it got. A CPU worker has none, and CPUs have
no ids in Ray. These classes say so; all else is vLLM's.
"""

from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from sink_vllm.ray.patches import PATCHES


class CPURayExecutor(RayExecutorV2):
    """``RayExecutorV2`` with placement groups of Ray's resource ``CPU``."""

    def _init_executor(self) -> None:
        for patch in PATCHES:
            patch.apply()
        super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        # Ray sets OMP_NUM_THREADS to the CPUs of an actor; vLLM asks for none beside this.
        return {"num_gpus": 0}
