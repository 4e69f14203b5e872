"""Markdown tables of a run, from its raw rows and nothing else: ``<run>/tables.md``.

    python -m benchmarks.serving.tables benchmarks/results/bench_…

Values are medians over the repetitions, with the smallest and the largest in brackets.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.tables import table
from benchmarks.serving.arrivals import GAP_LIMIT
from benchmarks.serving.report import Report, Row, Spread
from benchmarks.serving.spec import load_arms


def milliseconds(rows: list[Row], key: str, percent: str) -> str:
    found = Spread.of([row[key][percent] for row in rows if percent in row.get(key, {})])
    return found.text(1, 1e3) if found else "–"


def plain(rows: list[Row], key: str, digits: int = 0) -> str:
    found = Spread.of([row[key] for row in rows if row.get(key) is not None])
    return found.text(digits) if found else "–"


def percentiles(rows: list[Row], key: str) -> str:
    """Medians over the repetitions of p50, p95 and p99."""
    found = [
        Spread.of([row[key][p] for row in rows if p in row.get(key, {})])
        for p in ("p50", "p95", "p99")
    ]
    return " / ".join(f"{1e3 * one.median:,.0f}" if one else "–" for one in found)


def at_once(rows: list[Row]) -> str:
    """Median number of streams that run at the same time, over all readings."""
    running = [sample[2] for row in rows for sample in row.get("held", [])]
    return f"{statistics.median(running):.0f}" if running else "–"


def megabytes(rows: list[Row]) -> str:
    """Resident memory of the server's processes, the largest first."""
    sizes = [sorted(row["rss"].values(), reverse=True) for row in rows if row.get("rss")]
    return " + ".join(f"{size / 1e6:,.0f}" for size in sizes[-1][:3]) if sizes else "–"


def endless(report: Report, scenario: str) -> str:
    """Rates, times and memory by arm and number of streams."""
    labels = {name: arm.label for name, arm in load_arms().items()}
    lines = []
    for streams in report.streams(scenario):
        for arm in report.arms(scenario, streams):
            rows = report.of(scenario, streams, arm)
            rate = report.rates(scenario, streams, arm)
            lines.append(
                [
                    streams,
                    labels.get(arm, arm),
                    rate.text() if rate else "–",
                    milliseconds(rows, "per_token", "mean"),
                    percentiles(rows, "gaps"),
                    percentiles(rows, "first_token"),
                    plain(rows, "computed_per_token", 2),
                    plain(rows, "pages_max"),
                    at_once(rows),
                    plain(rows, "preemptions"),
                    megabytes(rows),
                ]
            )
    head = ["streams", "arm", "tokens/s", "ms per token", "gaps p50/p95/p99, ms"]
    head += ["first token p50/p95/p99, ms", "computed per token", "KV pages", "running at once"]
    return table([*head, "preemptions", "RSS, MB"], lines)


def ratios(report: Report, scenario: str) -> str:
    """Tokens per second of the policy over those of the other arms."""
    lines = []
    for streams in report.streams(scenario):
        for arm in report.arms(scenario, streams):
            found = report.ratio(scenario, streams, "sink", arm)
            if arm != "sink" and found is not None:
                lines.append([streams, arm, found.text(2)])
    return table(["streams", "sink_vllm over", "tokens/s ratio"], lines)


def interruptions(report: Report, scenario: str) -> str:
    """Gaps at evictions (or restarts) in medians, beside the other gaps of the same runs."""
    lines = []
    for streams in report.streams(scenario):
        for arm in report.arms(scenario, streams):
            rows = [
                row["interruptions"]
                for row in report.of(scenario, streams, arm)
                if row.get("interruptions", {}).get("n", 0) > 1
                and "p95_ratio" in row["interruptions"]
            ]
            if rows:
                lines.append(
                    [
                        streams,
                        arm,
                        sum(row["n"] for row in rows),
                        plain(rows, "median_ratio", 2),
                        plain(rows, "p95_ratio", 2),
                        plain(rows, "max_ratio", 2),
                        plain(rows, "share_above", 3),
                        plain(rows, "elsewhere_p95_ratio", 2),
                        plain(rows, "elsewhere_max_ratio", 2),
                        plain(rows, "elsewhere_share_above", 3),
                    ]
                )
    above = f"share above {GAP_LIMIT}"
    head = ["streams", "arm", "n", "median", "p95", "max", above]
    return table([*head, "others: p95", "others: max", f"others: {above}"], lines)


def prompts(report: Report, scenario: str) -> str:
    lines = [
        [
            streams,
            arm,
            plain(rows, "prompt_tokens_per_second"),
            percentiles(rows, "first_token"),
            plain(rows, "pages_max"),
        ]
        for streams in report.streams(scenario)
        for arm in report.arms(scenario, streams)
        if (rows := report.of(scenario, streams, arm))
    ]
    head = ["at once", "arm", "prompt tokens/s", "first token p50/p95/p99, ms", "KV pages"]
    return table(head, lines)


def conversations(report: Report, scenario: str) -> str:
    lines = [
        [
            streams,
            arm,
            plain(rows, "tokens_per_second", 1),
            percentiles(rows, "first_token"),
            plain(rows, "computed_over_new", 2),
            plain(rows, "pages_max"),
        ]
        for streams in report.streams(scenario)
        for arm in report.arms(scenario, streams)
        if (rows := report.of(scenario, streams, arm))
    ]
    head = ["conversations", "arm", "tokens/s", "first token, second half, p50/p95/p99, ms"]
    return table([*head, "computed ÷ new tokens, second half", "KV pages held"], lines)


def mixed(report: Report, scenario: str) -> str:
    lines = []
    for streams in report.streams(scenario):
        for background in report.arms(scenario, streams):
            rows = report.of(scenario, streams, background)
            lines.append(
                [
                    streams,
                    background,
                    plain(rows, "tokens_per_second", 1),
                    percentiles(rows, "first_token"),
                    f"{1e3 * report.pooled_p95(scenario, streams, background):,.1f}",
                    plain(rows, "evictions"),
                ]
            )
    head = ["streams behind", "kind", "tokens/s, all", "first token p50/p95/p99, ms"]
    return table([*head, "p95 of all repetitions", "evictions"], lines)


def overhead(summary: dict[str, Any]) -> str:
    """Of `benchmarks.overhead`."""
    lines = [
        [
            streams,
            f"{row['mean_ratio']:.3f}",
            f"{row['mean_ratio_of_rounds']['median']:.3f}",
            f"{row['median_ratio']:.3f}",
            f"{row['eviction_step_over_median']:.2f}",
            f"{row['worst_eviction_step_over_median']:.2f}",
            f"{row['worst_step_over_median_stock']:.2f}",
        ]
        for streams, row in summary.items()
    ]
    head = ["streams", "mean ratio", "median round", "median step", "eviction step ÷ median"]
    return table([*head, "worst eviction step ÷ median", "stock's worst step ÷ median"], lines)


def sections(folder: Path) -> Iterator[str]:
    """Every table there is data for, with its heading."""
    report = Report.read(folder)
    path = folder / "overhead" / "summary.json"
    if path.exists():
        yield "### Policy overhead at the same cached length\n"
        yield overhead(json.loads(path.read_text()))
    path = folder / "flatness" / "summary.json"
    if path.exists():
        found = json.loads(path.read_text())
        rounds = found["ratio_of_rounds"]
        yield "### Flatness: old streams ÷ young streams, time per token\n"
        yield table(
            ["median round", "stdev of rounds", "rounds", "median step"],
            [
                [
                    f"{rounds['median']:.3f}",
                    f"{rounds['stdev']:.3f}",
                    rounds["n"],
                    f"{found['median_step_ratio']:.3f}",
                ]
            ],
        )
    for name in report.scenarios("endless"):
        yield f"### {name}\n"
        yield endless(report, name)
        yield ratios(report, name)
        yield "Gaps at evictions and restarts, in medians:\n\n" + interruptions(report, name)
    for kind, maker in (("prompts", prompts), ("conversations", conversations), ("mixed", mixed)):
        for name in report.scenarios(kind):
            yield f"### {name}\n"
            yield maker(report, name)


def write(folder: Path) -> None:
    (folder / "tables.md").write_text("\n\n".join(sections(folder)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tables", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder below benchmarks/results")
    options = parser.parse_args()
    write(options.run)
    print((options.run / "tables.md").read_text())


if __name__ == "__main__":
    main()
