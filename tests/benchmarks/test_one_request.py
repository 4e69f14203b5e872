"""What a run of ``one_request`` knows after it was interrupted."""

import math
from pathlib import Path

import pytest

from benchmarks.one_request_prompt import BUCKET, Losses, RequestError, memory
from benchmarks.quality.texts import REPEATED
from benchmarks.rows import read, writing


def loss(position: int) -> float:
    return 1 + position % 7 / 8


def test_losses_of_two_servers_are_those_of_one(tmp_path: Path) -> None:
    """The second begins within a thousand that the first has noted, and repeats some of it."""
    end = 2 * REPEATED + 1
    with writing(tmp_path / "whole.jsonl") as rows:
        whole = Losses([], rows)
        whole.begin(0)
        whole.note(loss(position) for position in range(1, end))
        assert whole.position == end
    path = tmp_path / "losses.jsonl"
    for first, last in ((1, 61_234), (40_257, end)):
        with writing(path, go_on=True) as rows:
            losses = Losses(read(tmp_path)[path.name], rows)
            losses.begin(first - 1)
            for position in range(first, last, 333):
                losses.note(map(loss, range(position, min(position + 333, last))))
            assert losses.position == last

    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(read(tmp_path)[path.name]) == 2 * REPEATED // BUCKET
    for repetition in (0, 1):
        wanted = whole.perplexity(repetition)
        assert math.isclose(losses.perplexity(repetition), wanted, rel_tol=1e-6)


def test_a_gap_between_two_servers_is_told(tmp_path: Path) -> None:
    with writing(tmp_path / "losses.jsonl") as rows:
        losses = Losses([], rows)
        losses.begin(5_000)
        losses.note([1.0] * REPEATED)
        with pytest.raises(RequestError, match="from position 1 on were lost"):
            losses.perplexity(0)


def test_memory_is_that_of_the_server_that_computed_most() -> None:
    samples = [
        {"seconds": s, "tokens": t, "kv_pages": 9, "evictions": t, "rss": {name: 100 + t / 1000}}
        for name, times in (("a", range(5)), ("b", range(40)), ("c", range(20)))
        for s, t in ((5.0 * i, 1000 * i) for i in times)
    ]
    found = memory(samples)

    assert found["servers"] == 3
    assert found["memory_of_tokens"] == [0, 39_000]
    assert list(found["rss_growth"]) == ["b"]
    assert found["rss_growth"]["b"] > 0.2
