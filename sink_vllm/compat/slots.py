"""How much host memory a page takes, and how many there are, in engine core and workers alike."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs

from sink_vllm.policy.config import SinkConfig


def page_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of a page of one worker: all layers of the group in which they are most."""
    return max(_group_bytes(group) for group in kv_cache_config.kv_cache_groups)


def _group_bytes(group: Any) -> int:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):  # it adds up its layers itself
        return spec.page_size_bytes
    return len(group.layer_names) * spec.page_size_bytes


def num_slots(config: SinkConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Pages that host memory has room for; 0 if none are to be kept."""
    workers = vllm_config.parallel_config.tensor_parallel_size
    return int(config.host_gib * 2**30) // (page_bytes(kv_cache_config) * workers)
