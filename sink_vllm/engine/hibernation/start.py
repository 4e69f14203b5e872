"""What an engine core keeps of pages outside its block pool, as the options say."""

import hashlib

import psutil
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed
from vllm.v1.kv_cache_interface import KVCacheConfig

from sink_vllm.compat.disk_folder import engine_folder
from sink_vllm.compat.shared import attach
from sink_vllm.compat.slots import num_slots, page_bytes
from sink_vllm.engine.hibernation.disk import Disk
from sink_vllm.engine.hibernation.kept import Hibernation
from sink_vllm.engine.tables import PageTables
from sink_vllm.gate.refused import Refused
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.slots import Slots

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_LOADED = 64 << 20
"""Bytes that a step brings back at most, unless one stream takes more: a few milliseconds."""


def make_hibernation(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, tables: PageTables
) -> Hibernation | None:
    """``None`` if no pages are to be kept.

    Raises:
        Refused: one stream takes more host memory than there is.
    """
    config = SinkConfig.of(vllm_config)
    if config is None or not config.host_gib:
        return None
    slots, size = num_slots(config, vllm_config, kv_cache_config), page_bytes(kv_cache_config)
    workers = vllm_config.parallel_config.tensor_parallel_size
    total = psutil.virtual_memory().total / 2**30
    if config.host_gib > total:
        raise Refused(
            f"--sink-host-gib={config.host_gib} is more than this machine's memory of {total:.1f} "
            "GiB; use less."
        )
    if slots < tables.pages_per_stream:
        least = tables.pages_per_stream * size * workers / 2**30
        raise Refused(
            f"--sink-host-gib={config.host_gib} has room for {slots} KV pages, and one stream "
            f"has {tables.pages_per_stream}; use {least:.3g} or more, or drop it."
        )
    logger.info(
        "StreamingLLM: %d KV pages are kept in host memory when turns end (%s GiB); a stream has "
        "up to %d.",
        slots,
        config.host_gib,
        tables.pages_per_stream,
    )
    kept = Slots(slots)
    disk = _disk(config, vllm_config, kept)
    most_loads = max(_LOADED // (size * workers), tables.pages_per_stream)
    return Hibernation(tables, kept, size * workers, most_loads, disk)


def _disk(config: SinkConfig, vllm_config: VllmConfig, slots: Slots) -> Disk | None:
    if config.disk is None:
        return None
    workers = range(vllm_config.parallel_config.tensor_parallel_size)
    memories, layouts = zip(*(attach(rank) for rank in workers), strict=True)
    layout = f"{layouts[0]}, hashes of {_seed(vllm_config)}"
    folder, lock = engine_folder(config, vllm_config, layout)
    disk = Disk(folder, int(config.disk_gib * 2**30), slots, list(memories), lock)
    logger.info(
        "StreamingLLM: %d pages are on disk in %s, which may have up to %s GiB.",
        len(disk.files),
        folder,
        config.disk_gib,
    )
    return disk


def _seed(vllm_config: VllmConfig) -> str:
    """A name of what all hashes begin with, which vLLM decides after the scheduler is made."""
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    seed = resolve_none_hash_seed(get_hash_fn_by_name(algorithm))
    if seed != resolve_none_hash_seed(get_hash_fn_by_name(algorithm)):
        raise Refused(
            f"--prefix-caching-hash-algo={algorithm} hashes otherwise with every start, so that "
            "no page of --sink-disk would be found again; use sha256, or set PYTHONHASHSEED."
        )
    return hashlib.sha256(seed.encode()).hexdigest()[:16]
