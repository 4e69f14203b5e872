"""A worker of vLLM's Ray executor whose device is a Ray CPU; see ``sink_vllm.ray.cpu_executor``."""

from typing import Any

import ray
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc


class CPURayWorkerProc(RayWorkerProc):
    """A worker in a Ray actor that has no accelerator to ask for."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        kwargs["assigned_physical_gpu_ids"] = None
        super().initialize_worker(*args, **kwargs)
