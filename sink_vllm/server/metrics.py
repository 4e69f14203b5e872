"""Metrics of the engines, made of ``policy.stats``: in ``/metrics``, beside vLLM's own.

An ordinary vLLM stat logger, handed to ``AsyncLLM`` and ``LLMEngine`` as a constructor argument
when the policy is on (``sink_vllm.server.front_end``). Not through the entry point
``vllm.stat_logger_plugins``: its presence alone switches statistics on in every server of the
installation, with ``--disable-log-stats`` too, and ``LLM`` does not load it.
"""

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from sink_vllm.policy.stats import StreamingLLMStats

NAMESPACE = "sink_vllm:"
COUNTERS = {  # field of StreamingLLMStats: (name without "_total", documentation)
    "streams": ("streams_evicted", "Streams that have evicted at least once."),
    "tokens": ("evicted_tokens", "Tokens evicted from the KV cache."),
    "evictions": ("evictions", "Evictions of one stride."),
    "reanchorings": ("reanchorings", "Windows whose keys were rotated back to offset 0."),
    "composed_ahead": (
        "evictions_composed_ahead",
        "Evictions whose head page, or part of whose window, was composed in steps before.",
    ),
    "resumed": ("resumed_streams", "Long prompts resumed from cached pages."),
    "pages_kept": ("kept_pages", "KV pages copied to host memory."),
    "pages_back": ("returned_pages", "KV pages copied back from host memory."),
    "pages_read": ("read_pages", "KV pages read from disk."),
}
GAUGES = {  # field of StreamingLLMStats: (name, documentation)
    "waiting_for_pages": ("waiting_for_pages", "Requests waiting because pages are short."),
    "steps_stalled": (
        "stalled_steps",
        "Steps in a row in which nothing ran although a request waited; more than a few is a hang.",
    ),
    "residents": ("resident_streams", "Requests whose whole share of KV pages is reserved."),
    "host_bytes": ("host_bytes", "Bytes of KV pages in host memory."),
    "disk_bytes": ("disk_bytes", "Bytes of files with KV pages."),
}
LENGTH_BUCKETS = [digit * 10**power for power in range(2, 9) for digit in (1, 2, 5)]  # tokens


class StreamingLLMStatLogger(AggregateStatLoggerBase):
    """Adds up what the schedulers of all engines report, labelled like vLLM's own metrics."""

    counter: Any = Counter
    gauge: Any = Gauge
    histogram: Any = Histogram

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        _unregister()
        model_name = vllm_config.model_config.served_model_name
        self._counters: dict[int, dict[str, Any]] = {index: {} for index in engine_indexes}
        for field, (name, documentation) in COUNTERS.items():
            counter = self.counter(
                NAMESPACE + name, documentation, labelnames=["model_name", "engine"]
            )
            for index, by_field in self._counters.items():
                by_field[field] = counter.labels(model_name, str(index))
        self._gauges: dict[int, dict[str, Any]] = {index: {} for index in engine_indexes}
        for field, (name, documentation) in GAUGES.items():
            gauge = self.gauge(
                NAMESPACE + name,
                documentation,
                multiprocess_mode="mostrecent",
                labelnames=["model_name", "engine"],
            )
            for index, by_field in self._gauges.items():
                by_field[field] = gauge.labels(model_name, str(index))
        lengths = self.histogram(
            NAMESPACE + "stream_tokens",
            "Length of finished streams: tokens of prompt and output.",
            buckets=LENGTH_BUCKETS,
            labelnames=["model_name", "engine"],
        )
        self._lengths = {index: lengths.labels(model_name, str(index)) for index in engine_indexes}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        for finished in () if iteration_stats is None else iteration_stats.finished_requests:
            length = finished.num_prompt_tokens + finished.num_generation_tokens
            self._lengths[engine_idx].observe(length)
        if scheduler_stats is None:
            return
        stats = StreamingLLMStats.take(scheduler_stats)
        for field, counter in self._counters[engine_idx].items():
            if value := getattr(stats, field):
                counter.inc(value)
        for field, gauge in self._gauges[engine_idx].items():
            gauge.set(getattr(stats, field))

    def log_engine_initialized(self) -> None:
        """Nothing: the scheduler logs the policy when it starts."""


def _unregister() -> None:
    """Forget the counters of an earlier engine of this process, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(NAMESPACE):
            REGISTRY.unregister(collector)
