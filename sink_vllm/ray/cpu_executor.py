"""vLLM's Ray executor for CPUs: one Ray CPU is the device of one worker.

vLLM 0.32 places Ray workers by accelerator: the platform names the Ray resource that stands for
its devices, and every worker asks Ray which of them it got. A CPU worker has none, and CPUs have
no ids in Ray. These classes say so; all else is vLLM's.
"""

from typing import Any

import ray
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

from sink_vllm.ray.patches import PATCHES


class CPURayWorkerProc(RayWorkerProc):
    """A worker in a Ray actor that has no accelerator to ask for."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        kwargs["assigned_physical_gpu_ids"] = None
        super().initialize_worker(*args, **kwargs)


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
