"""What a stream takes and how many fit: the line a server starts with, and ``sink-vllm plan``."""

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import KVCacheConfig

from sink_vllm.engine.tables import PageTables
from sink_vllm.policy.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Of the server's own policy; streams with options of their own may take other numbers."""

    schedule: Schedule
    block_size: int
    """Tokens of a page."""
    pages: int
    """Of one stream at most."""
    page_bytes: int
    """Of one page of the pool: all layers that share it."""
    streams: int
    """How many streams fit at once."""

    @classmethod
    def of(cls, tables: PageTables, kv_cache_config: KVCacheConfig) -> "Sizing":
        """What ``tables`` take of the pool that vLLM made."""
        # Pages of all groups come from one pool, which is as large as any of its tensors: layers
        # lie in them side by side, groups one over the other.
        pool = max(one.size for one in kv_cache_config.kv_cache_tensors)
        pages = tables.pages_per_stream
        return cls(
            schedule=tables.spec.schedule,
            block_size=tables.spec.block_size,
            pages=pages,
            page_bytes=pool // kv_cache_config.num_blocks,
            # One page of the pool is vLLM's null block.
            streams=(kv_cache_config.num_blocks - 1) // pages,
        )

    @property
    def stream_bytes(self) -> int:
        """Keys and values of one stream."""
        return self.pages * self.page_bytes

    def bytes_for(self, streams: int) -> int:
        """The least KV cache (bytes) that ``streams`` fit into, vLLM's null block included."""
        return (streams * self.pages + 1) * self.page_bytes

    def __str__(self) -> str:
        schedule = self.schedule
        return (
            f"sink tokens S={schedule.sink_tokens}, window W={schedule.window}, stride "
            f"g={schedule.stride}, capacity C={schedule.capacity} tokens; KV cache per stream: "
            f"{self.stream_bytes / 2**20:.2f} MiB in {self.pages} pages of {self.block_size} "
            f"tokens; {self.streams} streams fit."
        )
