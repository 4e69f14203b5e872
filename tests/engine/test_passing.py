"""Who may pass whom in the queue of waiting requests, on the real scheduler without a model."""

from dataclasses import replace

import pytest

from sink_vllm.policy.schedule import Schedule
from tests.support.judge import random_tokens
from tests.support.liveness import Watch
from tests.support.scheduler_only import Settings

# C = 128: a stream holds four pages, and a fifth at an eviction. Three are left beside one.
SETTINGS = Settings(
    schedule=Schedule(sink_tokens=4, window=92, stride=32), block_size=32, spare_pages=3
)


def _beside_a_stream(asynchronous: bool) -> Watch:
    watch = Watch(replace(SETTINGS, asynchronous=asynchronous))
    watch.send("stream", random_tokens(20, 1), 600)
    watch.run(lambda: watch.reach["evictions"] >= 2)
    return watch


def _running(watch: Watch) -> set[str]:
    return {request.request_id for request in watch.core.scheduler.running}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_who_waits_for_pages_is_not_passed(asynchronous: bool) -> None:
    """Else small requests, one after the other, would keep a larger one waiting for ever."""
    watch = _beside_a_stream(asynchronous)
    larger = watch.send("larger", random_tokens(100, 2), 5)
    for index in range(8):
        watch.send(f"smaller {index}", random_tokens(20, 3 + index), 5)
        for _ in range(4):
            watch.step()
            assert _running(watch) == {"stream"}

    watch.abort(watch.clients["stream"])
    watch.run(lambda: larger.received > 0)
    watch.finish()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_who_waits_for_a_share_is_passed(asynchronous: bool) -> None:
    """A second stream waits until the first ends; what no share covers is of use until then."""
    watch = _beside_a_stream(asynchronous)
    second = watch.send("second stream", random_tokens(20, 2), 300)
    smaller = [watch.send(f"smaller {i}", random_tokens(20, 3 + i), 5) for i in range(8)]

    watch.run(lambda: all(client.ended for client in smaller))

    assert not watch.clients["stream"].ended
    assert second.received == 0
    watch.finish()
