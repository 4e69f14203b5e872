"""The throughput harness end to end: a small load on real servers, checked against the schedule."""

import json
from pathlib import Path

import pytest

from benchmarks.quality.store import Store
from benchmarks.serving import run as serving
from benchmarks.serving.report import Report
from benchmarks.serving.spec import load_arms, scenario

ENTRY = {
    "name": "small",
    "kind": "endless",
    "arms": ["sink", "truncate", "transformers-sink"],
    "streams": [2],
    "sinks": 4,
    "window": 28,
    "stride": 32,  # C = 64
    "prompt": 40,
    "tokens": 100,
    "seconds": 0,
    "repetitions": 2,
}


@pytest.mark.server
@pytest.mark.slow
def test_arms_take_turns_and_are_counted(tmp_path: Path) -> None:
    arms = load_arms()
    small = scenario(ENTRY, arms)

    store = Store(tmp_path, {"model": "pystream", "dtype": "float32"})
    serving.run(store, [small], arms, "float32", portion=1)
    assert not store.done("small-1"), "a portion of one repetition"
    serving.run(store, [small], arms, "float32")

    report = Report.read(tmp_path)
    assert report.arms("small") == ["sink", "truncate", "transformers-sink"]
    assert [row["arm"] for row in report.of("small")][3] == "transformers-sink", "who begins"
    for row in report.of("small"):
        assert row["tokens"] == 200
        assert row["first_token"]["n"] == 2
        assert row["common_tokens_per_second"] > 0
    for row in report.of("small", arm="sink"):
        # 139 tokens are computed per stream: (139 - 64) / 32, rounded up.
        assert row["evictions"] == 2 * 3
        assert row["interruptions"]["n"] == 2 * 3
        assert row["computed_per_token"] == pytest.approx((40 + 100) / 100)
        assert row["preemptions"] == 0
    for row in report.of("small", arm="truncate"):
        # Of 40 prompt tokens the last 32 are sent; the next request follows after 32 new ones.
        assert row["interruptions"]["n"] == 2 * 3
        assert row["computed_per_token"] == pytest.approx((4 * 32 + 100) / 100)
        assert "evictions" not in row or row["evictions"] == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert len(meta) == 1, "one entry per start"
