"""The pure parts of the throughput benchmark: scenarios, arrival times, ratios, tables."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.profile_step import owners
from benchmarks.serving import short, tables
from benchmarks.serving.arrivals import (
    Log,
    by_position,
    common_rate,
    interruptions,
    is_evicting,
    percentile,
    split_gaps,
    spread,
    summary,
)
from benchmarks.serving.load import Client, LoadError, parse, words
from benchmarks.serving.report import Report, Spread
from benchmarks.serving.runs import check_evictions, client_of
from benchmarks.serving.servers import arguments
from benchmarks.serving.spec import SpecError, load_arms, load_scenarios, scenario
from sink_vllm.policy.schedule import Schedule

SCHEDULE = Schedule(sink_tokens=4, window=28, stride=32)  # C = 64
ENTRY: dict[str, Any] = {
    "name": "any",
    "kind": "endless",
    "arms": ["sink", "truncate"],
    "streams": [1, 8],
    "sinks": 4,
    "window": 188,
    "stride": 64,
    "prompt": 16,
    "tokens": 100,
    "seconds": 0,
    "repetitions": 3,
}


@pytest.mark.parametrize("chosen", ["short", "full"])
def test_every_scenario_of_the_repository_can_be_run(chosen: str) -> None:
    arms = load_arms()

    for one in load_scenarios(chosen, arms):
        for name in one.arms:
            server = arms[name].server
            if server is not None:
                words_ = arguments(server, one, "bfloat16")
                assert not any("{" in word and "max_position" not in word for word in words_)
                # A server refuses to start when one stream does not fit.
                longest = one.length if server.name == "long" else one.schedule.capacity + 1
                assert 32 * one.pool(server.kind) >= longest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "sprint"}, "kind='sprint' is none of"),
        ({"arms": ["sinks"]}, "arm 'sinks' is none of"),
        ({"streams": [0]}, "must be positive"),
        ({"repetitions": 0}, "must be 1 or more"),
        ({"stream": 3}, "unknown stream"),
        ({"arms": ["full"], "length": 115}, "too short for the arm full"),
    ],
)
def test_a_scenario_that_cannot_be_run_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        scenario({**ENTRY, **change}, load_arms())


def test_truncation_keeps_as_much_as_the_policy() -> None:
    arms, one = load_arms(), scenario(ENTRY, load_arms())

    assert client_of(arms["truncate"], one) == Client(keep=192, chunk=64)
    assert client_of(arms["recompute"], one) == Client(keep=256, chunk=1)
    assert client_of(arms["sink"], one) == Client()


def test_servers_of_equal_memory_have_equal_pools() -> None:
    one = replace(scenario(ENTRY, load_arms()), pages=77)

    assert {one.pool(name) for name in ("sink", "long", "short")} == {77}


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], list(range(101))])
@pytest.mark.parametrize("percent", [0, 50, 95, 100])
def test_percentiles_are_those_of_statistics(values: list[float], percent: float) -> None:
    expected = sorted(values)[0]
    if len(values) > 1 and percent:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        expected = max(values) if percent == 100 else cuts[int(percent) - 1]

    assert percentile(values, percent) == pytest.approx(expected)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    assert spread([]) == {"n": 0}


def test_evicting_gaps_are_those_of_the_schedule() -> None:
    # C = 64, prompt 60: token 4 leaves with 64 computed, the 65th needs an eviction.
    found = [gap for gap in range(200) if is_evicting(SCHEDULE, 60, gap)]

    assert found == [4, 36, 68, 100, 132, 164, 196]


def test_gaps_at_restarts_count_where_a_client_restarts() -> None:
    log = Log(prompt=60, arrivals=[0.0, 1.0, 2.0, 5.0, 6.0], restarts=[3])

    assert split_gaps([log], SCHEDULE) == ([3.0], [1.0, 1.0, 1.0])


def test_rates_are_taken_while_all_streams_run() -> None:
    steady = Log(prompt=1, arrivals=[float(t) for t in range(11)])
    late = Log(prompt=1, arrivals=[float(t) for t in range(4, 11)])

    assert common_rate([steady, late]) == 2.0
    assert common_rate([steady, Log(prompt=1, arrivals=[9.0, 10.0])]) is None, "1 second of 11"
    assert common_rate([steady, Log(prompt=1, arrivals=[20.0, 21.0])]) is None


def test_interruptions_are_in_medians_of_all_gaps() -> None:
    found = interruptions([1.0, 4.0], [2.0] * 7 + [6.0])

    assert found["max_ratio"] == 2.0
    assert found["share_above"] == 0.5
    assert found["elsewhere_share_above"] == 1 / 8


def test_tokens_that_were_read_at_once_have_no_ratio() -> None:
    assert interruptions([0.0, 3.0], [0.0] * 7) == {"n": 2}


def test_a_summary_counts_first_tokens_from_the_start() -> None:
    logs = [Log(prompt=62, started=1.0, arrivals=[2.0, 2.5, 3.0, 5.0])]

    found = summary(logs, SCHEDULE, evicts=True)

    assert found["first_token"]["p50"] == 1.0
    assert found["per_token"]["mean"] == 1.0
    assert found["tokens_per_second"] == 1.0
    assert found["interruptions"]["n"] == 1
    assert by_position(logs, 2) == {62: 0.5, 64: 1.25}


def event(*ids: int, **more: Any) -> bytes:
    content = {"choices": [{"token_ids": list(ids)}], **more}
    return f"data: {json.dumps(content)}\n\n".encode()


def cut(data: bytes, sizes: Sequence[int]) -> list[tuple[float, bytes]]:
    pieces, begin = [], 0
    for when, size in enumerate([*sizes, len(data)]):
        pieces.append((float(when), data[begin : begin + size]))
        begin += size
    return pieces


@pytest.mark.parametrize("sizes", [[10_000], [5, 90], [1] * 150])
def test_events_are_found_wherever_the_bytes_are_cut(sizes: list[int]) -> None:
    usage = {"prompt_tokens": 3}
    data = event(7) + event(8, 9) + b'data: {"choices": [], "usage": ' + json.dumps(usage).encode()
    log = Log(prompt=3)

    ids, found = parse(
        cut(data + b"}\n\ndata: [DONE]\n\n", sizes), log, broken_off=False, expected=3
    )

    assert ids == [7, 8, 9]
    assert found == usage
    assert log.arrivals[1] == log.arrivals[2]
    assert log.arrivals == sorted(log.arrivals)


def test_tokens_that_are_missing_are_noticed() -> None:
    with pytest.raises(LoadError, match="1 tokens arrived where 2"):
        parse([(0.0, event(7))], Log(prompt=1), broken_off=False, expected=2)
    assert parse([(0.0, event(7)[:-3])], Log(prompt=1), broken_off=True, expected=2)[0] == []
    with pytest.raises(LoadError, match="broke off"):
        parse([(0.0, b'data: {"error": "out"}\n\n')], Log(prompt=1), broken_off=False, expected=1)


def test_prompts_differ_by_their_seed_and_repeat() -> None:
    assert words(40, "a", 1, 0) == words(40, "a", 1, 0) != words(40, "a", 1, 1)
    assert len(words(40, 1)) == 40


def test_a_server_that_did_not_evict_is_noticed() -> None:
    one = scenario(ENTRY, load_arms())  # C = 256, g = 64
    logs = [Log(prompt=16, arrivals=[0.0] * tokens) for tokens in (241, 242, 500)]

    check_evictions(logs, one, 0 + 1 + 5)
    with pytest.raises(LoadError, match="0 evictions counted by the server, 6 scheduled"):
        check_evictions(logs, one, 0)


def row(arm: str, repetition: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "scenario": "recompute",
        "kind": "endless",
        "arm": arm,
        "streams": 1,
        "repetition": repetition,
        "common_tokens_per_second": rate,
        "tokens_per_second": rate / 2,
        **more,
    }


def test_ratios_are_taken_within_a_repetition() -> None:
    # The machine is twice as fast in the second repetition; the ratio does not see it.
    rows = [row("sink", 0, 30.0), row("recompute", 0, 10.0)]
    report = Report([*rows, row("sink", 1, 60.0), row("recompute", 1, 20.0), row("sink", 2, 99.0)])

    assert report.ratio("recompute", 1, "sink", "recompute") == Spread(3.0, 3.0, 3.0)


def test_one_kind_of_rate_serves_all_arms() -> None:
    report = Report([row("sink", 0, 30.0), row("full", 0, 10.0, common_tokens_per_second=None)])

    assert report.ratio("recompute", 1, "sink", "full") == Spread(3.0, 3.0, 3.0)
    assert report.rates("recompute", 1, "sink") == Spread(15.0, 15.0, 15.0)


def test_what_ran_before_a_preemption_is_no_rate() -> None:
    report = Report([row("sink", 0, 30.0), row("full", 0, 20.0, preemptions=2)])

    assert report.rates("recompute", 1, "full") == Spread(10.0, 10.0, 10.0)


def test_tables_are_made_from_a_folder_of_rows(tmp_path: Path) -> None:
    logs = [Log(prompt=62, started=1.0, arrivals=[2.0, 2.5, 3.0, 5.0])]
    found = {**summary(logs, SCHEDULE, evicts=True), "kept": [], "pages_max": 9, "preemptions": 0}
    lines: list[dict[str, object]] = [{"scenario": "streams", "kind": "endless"}]
    lines += [{"arm": "sink", "streams": 4, "repetition": 0, **found}]
    (tmp_path / "streams-0.jsonl").write_text("\n".join(map(json.dumps, lines)))

    tables.write(tmp_path)

    written = (tmp_path / "tables.md").read_text()
    assert "| 4 | sink_vllm | 1.0 | 1,000.0 | 500 / 1,850 / 1,970 |" in written


def test_the_last_line_has_every_ratio() -> None:
    def pair(scenario_: str, streams: int, arm: str, rate: float) -> dict[str, Any]:
        return {**row(arm, 0, rate), "scenario": scenario_, "streams": streams}

    def short_requests(arm: str, *microseconds: int) -> dict[str, Any]:
        return {**pair("mixed", 8, arm, 1.0), "kind": "mixed", "first_token_us": microseconds}

    rows = [pair("recompute", 1, "sink", 44.0), pair("recompute", 1, "recompute", 2.0)]
    rows += [
        pair("transformers", 32, "sink", 90.0),
        pair("transformers", 32, "transformers-sink", 3),
    ]
    rows += [short_requests("endless", 110), short_requests("ordinary", 100)]
    overhead = {
        "1": {"mean_ratio_of_rounds": {"median": 1.01}, "worst_eviction_step_over_median": 1.9},
        "16": {"mean_ratio_of_rounds": {"median": 1.034}, "worst_eviction_step_over_median": 1.2},
    }

    found = short.ratios(overhead, {"ratio_of_rounds": {"median": 0.99}}, Report(rows))

    assert short.last_line(found) == (
        "bench: overhead=1.03 flatness=0.99 gap=1.9 recompute=22 transformers=30 mixed=1.1"
    )


def test_a_sample_belongs_to_the_innermost_of_policy_and_vllm() -> None:
    def stack(*files: str) -> str:
        return ";".join(
            ["advance (/r/benchmarks/overhead_arm.py:9)", *(f"f ({f}:1)" for f in files)]
        )

    vllm, ours = "/x/site-packages/vllm/v1/a.py", "/r/sink_vllm/worker/b.py"
    lines = [
        f"{stack(vllm, ours, '/x/torch/c.py')} 3",
        f"{stack(ours, vllm)} 5",
        "poll (/lib/connection.py:1) 100",
    ]

    assert owners(lines) == {"sink_vllm/worker/b.py f": 3, "vllm": 5}
