"""A server killed with ``--sink-streams-db`` and ``--sink-disk`` goes on exactly."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from examples.serving import Metrics
from tests.conftest import ModelFactory
from tests.server.streams.test_restart import PLUGINS, _Streams
from tests.support.serving import CAPACITY, SCHEDULE, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server


def wait_until_written(folder: Path) -> None:
    """Until no file has been added for a second."""
    before, since = -1, time.monotonic()
    while time.monotonic() - since < 1:
        found = len(list(folder.glob("*/pages/*/*.page")))
        if found != before:
            before, since = found, time.monotonic()
        time.sleep(0.1)


def test_killed_in_mid_turn(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    """Streams between two turns, and one in a turn, which is as it was before it."""
    model, pages = tiny_llama(TinyLlama()), tmp_path / "pages"
    flags = ["--sink-streams-db", str(tmp_path / "streams.db"), "--sink-host-gib", "0.05"]
    flags += ["--sink-disk", str(pages), "--sink-disk-gib", "1"]
    texts: dict[str, list[int]] = {}
    with tiny_server(model, *flags, environment=PLUGINS) as server:
        streams = _Streams(server)
        for salt in (3, 7, 9):
            stream_id, text = streams.create(), list[int]()
            for turn in range(8):
                new = prompt_of(40, salt=salt + 2 * turn)
                answer = streams.generate(stream_id, new, 10)
                text += [*new, *answer["token_ids"]]
            texts[stream_id] = text
        wait_until_written(pages)
        busy = streams.events(stream_id)
        assert next(busy).startswith("data: ")
        assert server._process is not None
        os.killpg(server._process.pid, signal.SIGKILL)
        server._process.wait(30)
        with pytest.raises(httpx.HTTPError):
            list(busy)

    with tiny_server(model, *flags, environment=PLUGINS) as server:
        streams = _Streams(server)
        for stream_id, text in texts.items():
            assert len(text) > CAPACITY + 2 * SCHEDULE.stride
            answer = streams.generate(stream_id, [65, 66], 12)
            usage = answer["usage"]
            assert usage["resumed_from"] == "disk"
            assert usage["computed_tokens"] < 2 * SCHEDULE.stride
            text += [65, 66]
            expected = streams.complete(text, 12, cache_salt=stream_id)
            assert answer["token_ids"] == expected
        wait_until_written(pages)
        metrics = Metrics.parse(streams.http.get("/metrics").text)
        for name in ("read_pages", "returned_pages", "kept_pages"):
            assert metrics.total(f"sink_vllm:{name}_total") > 0, name
        assert 0 < metrics.total("sink_vllm:host_bytes") <= 0.05 * 2**30
        sizes = [path.stat().st_size for path in pages.glob("*/pages/*/*.page")]
        assert min(sizes) <= metrics.total("sink_vllm:disk_bytes") <= sum(sizes)
        resumed = {
            sample.labels["source"]: sample.value
            for family in metrics.families
            for sample in family.samples
            if sample.name == "sink_vllm:stored_stream_resume_seconds_count"
        }
        assert resumed["disk"] == len(texts)
    assert len({tuple(text[-30:]) for text in texts.values()}) == len(texts)
