"""Figures of a run, from its raw rows and nothing else.

    python -m benchmarks.serving.figures benchmarks/results/bench_…

``throughput.svg``  tokens per second against streams, by arm
``position.svg``    time per token against stream position, by arm
``memory.svg``      KV pages against tokens generated, by arm
``gaps.svg``        histogram of gaps at evictions beside all others

Needs matplotlib (``pip install -e ".[bench]"``). Raw medians, no smoothing.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.serving.arrivals import is_evicting
from benchmarks.serving.report import Report, Row
from benchmarks.serving.spec import Arm, Scenario, load_arms, load_scenarios

COLOURS = {
    "sink": "#2166ac",
    "full": "#b2182b",
    "truncate": "#1b7837",
    "recompute": "#999999",
    "llama-cpp": "#e08214",
    "llama-cpp-float32": "#fdb863",
    "llama-cpp-stride": "#7f3b08",
    "transformers-recompute": "#4d4d4d",
    "transformers-sink": "#92c5de",
}
SPAN = 32  # stream positions per point


def throughput(report: Report, scenario: str, labels: dict[str, str], plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for arm in report.arms(scenario):
        found = [(n, report.rates(scenario, n, arm)) for n in report.streams(scenario)]
        kept = [(n, spread) for n, spread in found if spread is not None]
        axes.errorbar(
            [n for n, _ in kept],
            [s.median for _, s in kept],
            yerr=[[s.median - s.low for _, s in kept], [s.high - s.median for _, s in kept]],
            color=COLOURS[arm],
            label=labels[arm],
            marker="o",
            capsize=3,
        )
    axes.set(xscale="log", yscale="log", xlabel="concurrent streams (log)")
    axes.set(ylabel="tokens per second, all streams (log)")
    axes.legend(fontsize=8)
    return figure


def position(report: Report, scenario: str, labels: dict[str, str], plt: Any) -> Any:
    """Medians over repetitions and kept streams, at the largest number of streams."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    streams = report.streams(scenario)[-1]
    for arm in report.arms(scenario, streams):
        spans: dict[int, list[float]] = {}
        for row in report.of(scenario, streams, arm):
            for kept in row["kept"]:
                for index, gap in enumerate(kept["gaps_us"]):
                    at = (kept["prompt"] + index + 1) // SPAN * SPAN
                    spans.setdefault(at, []).append(gap / 1e3)
        points = sorted((at, statistics.median(gaps)) for at, gaps in spans.items())
        axes.plot(
            [at + SPAN / 2 for at, _ in points],
            [gap for _, gap in points],
            color=COLOURS[arm],
            label=labels[arm],
        )
    axes.set(xlabel=f"stream position ({streams} streams)", ylabel="median ms per token (log)")
    axes.set(yscale="log")
    axes.legend(fontsize=8)
    return figure


def memory(report: Report, scenario: str, labels: dict[str, str], plt: Any) -> Any:
    """Every reading of every repetition, at the largest number of streams."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    streams = report.streams(scenario)[-1]
    for arm in report.arms(scenario, streams):
        points = [p for row in report.of(scenario, streams, arm) for p in row.get("held", [])]
        if points:
            axes.plot(
                [tokens / streams for tokens, _, _ in points],
                [pages / max(running, 1) for _, pages, running in points],
                ".",
                color=COLOURS[arm],
                label=labels[arm],
                markersize=4,
            )
    axes.set(xlabel=f"tokens generated ÷ {streams} streams")
    axes.set(ylabel="KV pages held per running stream", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def evicting_gaps(rows: list[Row], scenario: Scenario) -> tuple[list[float], list[float]]:
    """Gaps of the kept streams in medians of their run: at evictions, and all others."""
    at: list[float] = []
    elsewhere: list[float] = []
    for row in rows:
        for kept in row["kept"]:
            median = statistics.median(kept["gaps_us"])
            for index, gap in enumerate(kept["gaps_us"]):
                evicting = is_evicting(scenario.schedule, kept["prompt"], index)
                (at if evicting else elsewhere).append(gap / median)
    return at, elsewhere


def gaps(report: Report, scenario: Scenario, plt: Any) -> Any:
    numbers = report.streams(scenario.name)
    figure, panels = plt.subplots(
        1, len(numbers), figsize=(3 * len(numbers), 3), squeeze=False, layout="constrained"
    )
    for panel, streams in zip(panels[0], numbers, strict=True):
        at, elsewhere = evicting_gaps(report.of(scenario.name, streams, "sink"), scenario)
        bins = [i / 20 for i in range(81)]
        for values, colour, label in (
            (elsewhere, "#999999", "other gaps"),
            (at, COLOURS["sink"], "gaps with an eviction"),
        ):
            if values:
                clipped = [min(value, 3.999) for value in values]
                weights = [1 / len(values)] * len(values)
                panel.hist(clipped, bins, weights=weights, alpha=0.6, color=colour, label=label)
        panel.axvline(1.5, color="black", linewidth=0.8, linestyle="--")
        panel.set(title=f"{streams} streams", xlabel="gap ÷ median gap (last bin: 4 or more)")
    panels[0][0].set(ylabel="share of gaps")
    panels[0][0].legend(fontsize=8)
    return figure


def write(folder: Path) -> list[Path]:
    """Every figure there is data for."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sink_vllm"  # the same data, the same file
    from matplotlib import pyplot as plt

    arms: dict[str, Arm] = load_arms()
    labels = {name: arm.label for name, arm in arms.items()}
    report = Report.read(folder)
    made: dict[str, Any] = {}
    names = report.scenarios("endless")
    if "streams" in names:
        made["throughput"] = throughput(report, "streams", labels, plt)
        made["position"] = position(report, "streams", labels, plt)
        (scenario,) = (s for s in load_scenarios("full", arms) if s.name == "streams")
        made["gaps"] = gaps(report, scenario, plt)
    if "memory" in names:
        made["memory"] = memory(report, "memory", labels, plt)
    paths = []
    for name, figure in made.items():
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        plt.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(prog="figures", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder below benchmarks/results")
    options = parser.parse_args()
    for path in write(options.run):
        print(path, "written")


if __name__ == "__main__":
    main()
