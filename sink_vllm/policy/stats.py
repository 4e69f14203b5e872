"""What the scheduler counts, on its way to the front end's metrics.

vLLM sends one ``SchedulerStats`` per step from the engine core to *one* of its API servers. It is
encoded field by field as msgpack, so new attributes and fields of subclasses do not arrive. Its
field ``num_kv_fetch_reqs_by_stage`` is a ``dict[str, int]`` that every reader looks up by vLLM's
own stage names (all zero without a KV connector, which the policy refuses): ours travel there
under names of our own, and :meth:`StreamingLLMStats.take` removes them again.

Contract for the scheduler, in its ``make_stats``::

    stats = super().make_stats(...)
    if stats is not None:
        self.step_stats.attach(stats)
        self.step_stats = StreamingLLMStats()

Counters are increments since the last ``make_stats``, like vLLM's prefix cache statistics: with
several API servers each of them sees some of the steps, and Prometheus adds them up. Gauges are
as of the step.
Imports neither torch nor vLLM.
"""

from dataclasses import asdict, dataclass
from typing import Any

_PREFIX = "streaming_llm."
GAUGES = (
    "waiting_for_pages",
    "steps_stalled",
    "residents",
    "host_bytes",
    "disk_bytes",
)


@dataclass(slots=True)
class StreamingLLMStats:
    """Increments since the last step that reported, and gauges of that step."""

    streams: int = 0
    """Streams that evicted for the first time."""
    tokens: int = 0
    """Tokens evicted, or never computed because of ``--sink-prompt truncate``."""
    evictions: int = 0
    """Evictions of one stride."""
    reanchorings: int = 0
    """Times the keys of a whole window were rotated back."""
    composed_ahead: int = 0
    """Evictions of which something was in the pages before they happened."""
    resumed: int = 0
    """Long prompts that went on from cached pages past their first eviction."""
    pages_kept: int = 0
    """KV pages copied to host memory."""
    pages_back: int = 0
    """KV pages copied back."""
    pages_read: int = 0
    """Of those, pages that had to be read from disk first."""
    waiting_for_pages: int = 0
    """Requests that wait because there are no pages for the first of them."""
    steps_stalled: int = 0
    """Steps in a row in which nothing ran although somebody waited."""
    residents: int = 0
    """Requests whose whole share of pages is reserved."""
    host_bytes: int = 0
    """Of KV pages in host memory, of all workers."""
    disk_bytes: int = 0
    """Of files with KV pages."""

    def attach(self, scheduler_stats: Any) -> None:
        """Put the gauges, and counters that are not zero, into vLLM's ``SchedulerStats``."""
        scheduler_stats.num_kv_fetch_reqs_by_stage.update(
            {
                _PREFIX + name: value
                for name, value in asdict(self).items()
                if value or name in GAUGES
            }
        )

    @classmethod
    def take(cls, scheduler_stats: Any) -> "StreamingLLMStats":
        """The numbers in vLLM's ``SchedulerStats``, which is left as vLLM made it."""
        carrier: dict[str, int] = scheduler_stats.num_kv_fetch_reqs_by_stage
        names = [name for name in carrier if name.startswith(_PREFIX)]
        return cls(**{name.removeprefix(_PREFIX): carrier.pop(name) for name in names})
