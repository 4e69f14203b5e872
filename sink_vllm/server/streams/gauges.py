"""Metrics of the stored streams, read from their store: in ``/metrics``, beside ``server.metrics``.

Read from the store when somebody looks. In Prometheus' multi-process mode nobody can: vLLM uses it
for several API servers, which ``/v1/streams`` does not have, and where the environment asks for it
all the same the gauges are left out rather than shown as 0. Ray Serve has no ``/v1/streams``.
"""

import os
from collections.abc import Callable

from prometheus_client import REGISTRY, Gauge

from sink_vllm.server.metrics import NAMESPACE
from sink_vllm.server.streams.store import StreamStore

_Reader = Callable[[StreamStore], float]
GAUGES: dict[str, tuple[str, _Reader]] = {  # name: (documentation, how to read it)
    "stored_streams": ("Streams that /v1/streams remembers.", len),
    "stored_streams_in_use": (
        "Streams of /v1/streams that somebody is appending to.",
        lambda store: store.in_use,
    ),
    "stored_stream_tokens": (
        "Tokens of all streams of /v1/streams together; waiting messages by their size.",
        lambda store: store.tokens,
    ),
}


def show(store: StreamStore, model_name: str) -> None:
    """Put ``store`` into ``/metrics``, in the place of an earlier one of this process."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return
    for name, (documentation, read) in GAUGES.items():
        earlier = REGISTRY._names_to_collectors.get(NAMESPACE + name)
        if earlier is not None:
            REGISTRY.unregister(earlier)
        gauge = Gauge(NAMESPACE + name, documentation, labelnames=["model_name"])
        gauge.labels(model_name).set_function(_reader(store, read))


def _reader(store: StreamStore, read: _Reader) -> Callable[[], float]:
    def value() -> float:
        store.forget_idle()
        return read(store)

    return value
