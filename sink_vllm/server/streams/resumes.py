"""Metrics of what stored streams went on from, and how long that took (API server).

In Prometheus' multi-process mode they are added up, as vLLM's own; the service they are of is that
of this process.
"""

from prometheus_client import REGISTRY, Counter, Histogram

from sink_vllm.policy.parked import ResumedFrom
from sink_vllm.server.metrics import NAMESPACE

_COUNTER = NAMESPACE + "stored_stream_resumes"
_HISTOGRAM = NAMESPACE + "stored_stream_resume_seconds"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Resumes:
    """Counts appends to streams that had tokens already, by what they went on from."""

    def __init__(self, model_name: str) -> None:
        """In the place of an earlier one of this process."""
        for name in (_COUNTER, _HISTOGRAM):
            earlier = REGISTRY._names_to_collectors.get(name)
            if earlier is not None:
                REGISTRY.unregister(earlier)
        labels = ["model_name", "source"]
        self._model = model_name
        self._count = Counter(_COUNTER, "Appends, by what their streams went on from.", labels)
        self._seconds = Histogram(
            _HISTOGRAM,
            "From an append to the first output of the engine.",
            labels,
            buckets=_BUCKETS,
        )

    def observe(self, source: ResumedFrom | None, seconds: float) -> None:
        """``None``: all of the stream was held, and has been computed again."""
        labels = (self._model, source or "tokens")
        self._count.labels(*labels).inc()
        self._seconds.labels(*labels).observe(seconds)
