"""The two patches without which vLLM's Ray executor does not know CPUs.

They are applied by :class:`sink_vllm.ray.cpu_executor.CPURayExecutor` alone, when it starts: in
the engine core of a CPU engine that runs the policy over Ray, and nowhere else.
"""

from typing import Any

from sink_vllm.compat.patching import Patch

_RECORD = "0030-ray-workers-on-cpus"


def _device_key(_original: str) -> str:
    """Ray's resource for the devices of the CPU platform, which vLLM leaves empty."""
    return "CPU"


def _worker_proc(_original: Any) -> Any:
    """The actor class that ``RayExecutorV2`` starts, a subclass of the original."""
    from sink_vllm.ray.cpu_worker import CPURayWorkerProc

    return CPURayWorkerProc


PATCHES = (
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.ray_device_key",
        wrapper=_device_key,
        record=_RECORD,
    ),
    Patch(
        target="vllm.v1.executor.ray_executor_v2:RayWorkerProc",
        wrapper=_worker_proc,
        record=_RECORD,
    ),
)
