"""The KV cache of a model that is not loaded: its layers are made without memory, and asked."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from vllm import envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from sink_vllm.compat.spec import under_policy, with_equal_pages
from sink_vllm.engine.sizing import Sizing
from sink_vllm.engine.tables import PageTables
from sink_vllm.gate.refused import Refused, refusals
from sink_vllm.policy.config import SinkConfig
from sink_vllm.tools.seats import take_seat


class Outline(NamedTuple):
    """What is known of a model without its weights."""

    specs: dict[str, KVCacheSpec]
    """By layer, under the policy."""
    weight_bytes: int


def outline_of(vllm_config: VllmConfig, stage: int = 0) -> Outline:
    """Make the model on torch's ``meta`` device, and ask vLLM's runner for its KV cache specs.

    Args:
        vllm_config: with the policy, and of no other stage: layers leave their names in it.
        stage: of the pipeline; what a worker has of it.

    Raises:
        Refused: the model is split in another way, or a layer does not fit the policy.
    """
    parallel = vllm_config.parallel_config
    if parallel.world_size != parallel.tensor_parallel_size * parallel.pipeline_parallel_size:
        raise Refused(
            f"{parallel.world_size} workers are more than --tensor-parallel-size × "
            "--pipeline-parallel-size: only a model split by these can be planned; leave the "
            "others out."
        )
    config = SinkConfig.of(vllm_config)
    assert config is not None, "the policy is on"
    with _alone(vllm_config):
        take_seat(parallel, stage)
        dtype = cast(torch.dtype, vllm_config.model_config.dtype)  # resolved by now
        with set_default_torch_dtype(dtype), torch.device("meta"):
            model = initialize_model(vllm_config=vllm_config)
        # vLLM would hand these to the next model of this process, without a table.
        for key in [key for key, one in _ROPE_DICT.items() if _is_outline(one)]:
            del _ROPE_DICT[key]
        # vLLM's own methods need no more of a runner, or a worker, than this.
        runner = cast(Any, SimpleNamespace(vllm_config=vllm_config, shared_kv_cache_layers={}))
        specs = GPUModelRunner.get_kv_cache_spec(runner)
        with refusals():
            block_size = vllm_config.cache_config.block_size
            ours = with_equal_pages(
                # Rows of the RoPE table decide when keys are rotated, not how many there are.
                {
                    name: under_policy(spec, config, None, block_size)
                    for name, spec in specs.items()
                },
                envs.VLLM_KV_CACHE_LAYOUT,
            )
        layouts = WorkerBase.get_supported_kv_cache_layouts(runner)
        resolve_kv_cache_layout(vllm_config, [layouts], ours.values())
        weights = sum(one.numel() * one.element_size() for one in model.parameters())
    return Outline(ours, weights)


def sizing_of(
    vllm_config: VllmConfig, stages: Sequence[dict[str, KVCacheSpec]], kv_bytes: int | None
) -> Sizing:
    """What the start-up line of a server with ``kv_bytes`` of KV cache per worker says.

    Args:
        vllm_config: with the policy.
        stages: specs of each stage of the pipeline, under the policy.
        kv_bytes: of the pool of each worker; ``None`` for some number.

    Raises:
        Refused: not even one stream fits; vLLM's sentence.
    """
    if kv_bytes is None:  # hybrids are padded: whatever is needed is less than this
        kv_bytes = 64 * max(
            sum(one.max_memory_usage_bytes(vllm_config) for one in specs.values())
            for specs in stages
        )
    with refusals(), set_current_vllm_config(vllm_config):
        configs = _kv_cache_configs(vllm_config, list(stages), kv_bytes)
        kv_cache_config = generate_scheduler_kv_cache_config(configs)
        return Sizing.of(_tables(vllm_config, kv_cache_config), kv_cache_config)


def _kv_cache_configs(
    vllm_config: VllmConfig, stages: list[dict[str, KVCacheSpec]], kv_bytes: int
) -> list[KVCacheConfig]:
    """As the engine core does it, a worker of each: 0.33 forms groups in a step of its own."""
    grouped: Any = getattr(core, "get_global_kv_cache_groups", None)
    groups = [] if grouped is None else [grouped(vllm_config, stages)]
    make: Any = vars(core)["get_kv_cache_configs"]
    made: list[KVCacheConfig] = make(vllm_config, stages, [kv_bytes] * len(stages), *groups)
    return made


def _tables(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> PageTables:
    """The tables that the engine core would make."""
    scheduler, hashes = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    manager = KVCacheManager(
        kv_cache_config=kv_cache_config,
        max_model_len=vllm_config.model_config.max_model_len,
        scheduler_block_size=scheduler,
        hash_block_size=hashes,
        enable_caching=False,
    )
    return PageTables(manager.coordinator.single_type_managers)


def _is_outline(module: torch.nn.Module) -> bool:
    return any(one.is_meta for one in (*module.parameters(), *module.buffers()))


@contextmanager
def _alone(vllm_config: VllmConfig) -> Iterator[None]:
    """Groups of one, this process: vLLM's layers ask them how many workers there are."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        method = f"file://{Path(folder, 'rendezvous')}"
        init_distributed_environment(1, 0, method, 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            cleanup_dist_env_and_memory()
