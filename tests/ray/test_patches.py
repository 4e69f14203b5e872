"""What lets vLLM's Ray executor use CPUs: applied there only, and in step with vLLM."""

import inspect
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.v1.executor import ray_utils

from sink_vllm.plugin import register
from sink_vllm.ray.choose import choose_executor
from sink_vllm.ray.patches import PATCHES

pytest.importorskip("ray", reason="Ray is not installed (pip install 'sink-vllm[ray]')")


@pytest.fixture
def executor() -> Any:
    """vLLM's module; it can only be imported with Ray."""
    from vllm.v1.executor import ray_executor_v2

    return ray_executor_v2


def test_guard_cpu_platform_names_no_ray_resource() -> None:
    """The day it does, patch 0030 can go."""
    assert CpuPlatform.ray_device_key == Platform.ray_device_key == ""
    for function in (ray_utils.initialize_ray_cluster, ray_utils.get_bundles_sorted_by_node):
        assert "current_platform.ray_device_key" in inspect.getsource(function)


def test_guard_executor_looks_its_worker_class_up_in_its_module(executor: Any) -> None:
    start = inspect.getsource(executor.RayExecutorV2._init_executor)
    worker = executor.RayWorkerProc

    assert "ray.remote(RayWorkerProc)" in start
    assert "self._get_actor_resource_kwargs()" in start
    assert list(inspect.signature(worker.get_node_and_physical_gpu_ids).parameters) == ["self"]
    assert "assigned_physical_gpu_ids=assigned_physical_gpu_ids," in start


def test_registering_the_plugin_does_not_touch_ray() -> None:
    register()

    assert not any(patch.is_applied for patch in PATCHES)


def test_patches_can_be_applied_and_taken_back(executor: Any) -> None:
    from sink_vllm.ray.cpu_worker import CPURayWorkerProc

    original = executor.RayWorkerProc
    for patch in PATCHES:
        patch.apply()
    try:
        assert current_platform.ray_device_key == "CPU"
        assert executor.RayWorkerProc is CPURayWorkerProc
    finally:
        for patch in PATCHES:
            patch.revert()

    assert current_platform.ray_device_key == ""
    assert executor.RayWorkerProc is original


def test_on_a_cpu_the_name_ray_means_our_executor() -> None:
    from sink_vllm.ray.cpu_executor import CPURayExecutor

    config = ParallelConfig(distributed_executor_backend="ray")

    choose_executor(config)

    assert config.distributed_executor_backend is CPURayExecutor
    assert config.use_ray


def test_other_executors_stay() -> None:
    config = ParallelConfig(distributed_executor_backend="mp")

    choose_executor(config)

    assert config.distributed_executor_backend == "mp"


def test_on_a_gpu_the_executor_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelConfig(distributed_executor_backend="ray")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)

    choose_executor(config)

    assert config.distributed_executor_backend == "ray"
