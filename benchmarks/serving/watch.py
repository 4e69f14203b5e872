"""What a server holds and counts during a run: pages, preemptions, memory of its processes."""

import threading
import time
from types import TracebackType
from typing import Any

from benchmarks.serving.arrivals import difference
from examples.serving import Metrics, Server

EVERY = 1.0  # seconds between two readings
COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "evictions": "sink_vllm:evictions_total",
}


def counters(metrics: Metrics) -> dict[str, float]:
    return {name: metrics.total(metric) for name, metric in COUNTERS.items()}


class Watch:
    """Reads `/metrics` and resident memory until the block ends."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._before: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []
        self.grown: dict[str, float] = {}

    def __enter__(self) -> "Watch":
        self._before = counters(self._server.metrics())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self.grown = difference(counters(self._server.metrics()), self._before)

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            metrics = self._server.metrics()
            self.samples.append(
                {
                    "time": time.perf_counter(),
                    "pages": metrics.kv_pages,
                    "running": metrics.total("vllm:num_requests_running"),
                    "waiting": metrics.total("vllm:num_requests_waiting"),
                    "generated": metrics.total(COUNTERS["generated_tokens"])
                    - self._before["generated_tokens"],
                    "rss": sum(self._server.rss().values()),
                }
            )

    def row(self, delivered: int) -> dict[str, Any]:
        """Counters and extremes of the run.

        ``computed_per_token`` counts prompt tokens that were not cached and generated tokens, over
        the tokens delivered. vLLM does not count what it computes again after a preemption, so
        where there were any it is a lower bound.
        """
        computed = (
            self.grown["prompt_tokens"]
            - self.grown["cached_tokens"]
            + self.grown["generated_tokens"]
        )
        return {
            **self.grown,
            "computed_per_token": computed / delivered if delivered else None,
            "pages_max": max((sample["pages"] for sample in self.samples), default=None),
            "running_max": max((sample["running"] for sample in self.samples), default=None),
            "rss": {name.rpartition(":")[0]: size for name, size in self._server.rss().items()},
        }
