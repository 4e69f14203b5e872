"""What ``/v1/streams`` remembers stands in ``/metrics``, as it is when somebody looks."""

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY

from sink_vllm.server import metrics
from sink_vllm.server.streams.gauges import GAUGES, show
from sink_vllm.server.streams.store import StreamStore
from sink_vllm.server.streams.stored import Waiting


@pytest.fixture(autouse=True)
def _leave_no_gauges() -> Iterator[None]:
    yield
    metrics._unregister()


def _gauges() -> dict[str, float | None]:
    return {
        name: REGISTRY.get_sample_value(f"sink_vllm:{name}", {"model_name": "m"}) for name in GAUGES
    }


def _shown(streams: int, in_use: int, tokens: int) -> dict[str, float]:
    return {
        "stored_streams": streams,
        "stored_streams_in_use": in_use,
        "stored_stream_tokens": tokens,
    }


def test_gauges_are_the_stores_own_numbers() -> None:
    now = 0.0
    store = StreamStore(most_streams=4, most_tokens=1000, idle_seconds=60, clock=lambda: now)
    show(store, "m")
    assert _gauges() == _shown(0, 0, 0)

    stream = store.create("a", "m", None, {}, tokens=[1] * 10)
    store.create("a", "m", None, {}, pending=[Waiting("user", b"12345678")])
    assert _gauges() == _shown(2, 0, 10 + 2 + 64)
    store.acquire(stream.id)
    assert _gauges() == _shown(2, 1, 76)
    now = 61.0  # nobody has asked for anything since
    assert _gauges() == _shown(1, 1, 10)
    stream.tokens.extend([1] * 5)
    store.release(stream)
    assert _gauges() == _shown(1, 0, 15)


def test_the_latest_service_of_a_process_is_shown() -> None:
    stores = [StreamStore(most_streams=4, most_tokens=1000, idle_seconds=60) for _ in range(2)]
    stores[0].create("a", "m", None, {})
    for store in stores:
        show(store, "m")

    assert _gauges() == _shown(0, 0, 0)


def test_no_gauges_where_they_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")

    show(StreamStore(most_streams=4, most_tokens=1000, idle_seconds=60), "m")

    assert set(_gauges().values()) == {None}
