"""What an engine core keeps of pages outside its block pool, as the options say."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from sink_vllm.compat.slots import num_slots, page_bytes
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
    most_loads = max(_LOADED // (size * workers), tables.pages_per_stream)
    return Hibernation(tables, Slots(slots), most_loads)
