"""Metrics of the stored streams, read from their store: in ``/metrics``, beside ``server.metrics``.

Read from the store when somebody looks. With several API servers Prometheus is in its multi-process
mode, in which nobody can: each of them writes down what the streams' owner says with every answer,
or every second, and the most recent numbers are shown. Where the environment asks for that mode for
one API server the gauges are left out rather than shown as 0. Ray Serve has no ``/v1/streams``.
"""

import os
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Literal

from prometheus_client import REGISTRY, Gauge

from sink_vllm.server.metrics import NAMESPACE
from sink_vllm.server.streams.interface import Numbers, Streams
from sink_vllm.server.streams.remote import RemoteStore
from sink_vllm.server.streams.store import StreamStore

_Reader = Callable[[Numbers], float]
GAUGES: dict[str, tuple[str, _Reader]] = {  # name: (documentation, how to read it)
    "stored_streams": ("Streams that /v1/streams remembers.", attrgetter("streams")),
    "stored_streams_in_use": (
        "Streams of /v1/streams that somebody is appending to.",
        attrgetter("in_use"),
    ),
    "stored_stream_tokens": (
        "Tokens of all streams of /v1/streams together; waiting messages by their size.",
        attrgetter("tokens"),
    ),
}


def show(store: Streams, model_name: str) -> None:
    """Put ``store`` into ``/metrics``, in the place of an earlier one of this process."""
    if isinstance(store, RemoteStore):
        gauges = {read: gauge.labels(model_name) for gauge, read in _gauges("mostrecent")}

        def watch(numbers: Numbers) -> None:
            for read, gauge in gauges.items():
                gauge.set(read(numbers))

        store.watch(watch)
    elif isinstance(store, StreamStore) and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        for gauge, read in _gauges("all"):
            gauge.labels(model_name).set_function(_reader(store, read))


def _gauges(mode: Literal["all", "mostrecent"]) -> Iterator[tuple[Gauge, _Reader]]:
    for name, (documentation, read) in GAUGES.items():
        earlier = REGISTRY._names_to_collectors.get(NAMESPACE + name)
        if earlier is not None:
            REGISTRY.unregister(earlier)
        full_name, labels = NAMESPACE + name, ["model_name"]
        yield Gauge(full_name, documentation, labelnames=labels, multiprocess_mode=mode), read


def _reader(store: StreamStore, read: _Reader) -> Callable[[], float]:
    def value() -> float:
        store.forget_idle()
        return read(store.numbers)

    return value
