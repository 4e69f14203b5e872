"""Which executor ``--distributed-executor-backend ray`` means under the policy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ParallelConfig


def choose_executor(parallel_config: "ParallelConfig") -> None:
    """Put our executor in the place of vLLM's Ray executor on CPUs, and only there.

    vLLM takes an executor class wherever it takes the name of one. The class has vLLM's own for
    a base and no choice to offer, so it is no option: on a CPU nothing else could work.
    """
    from vllm.platforms import current_platform

    if parallel_config.distributed_executor_backend == "ray" and current_platform.is_cpu():
        from sink_vllm.ray.cpu_executor import CPURayExecutor

        parallel_config.distributed_executor_backend = CPURayExecutor
