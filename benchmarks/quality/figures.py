"""Two figures of a run, from its raw data: ``<run>/perplexity.svg`` and ``<run>/ablations.svg``.

    python -m benchmarks.quality.figures benchmarks/results/quality_…

Needs matplotlib (``pip install -e ".[bench]"``). Colours are the same in both; axes start where the
labels say.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.ablations import groups, unit
from benchmarks.quality.arms import Arm
from benchmarks.quality.buckets import Interval, Series
from benchmarks.quality.tables import Runs, load, mean_perplexity

COLOURS = {
    "full": "#b2182b",
    "window": "#ef8a62",
    "sink": "#2166ac",
    "absolute": "#762a83",
    "recompute": "#999999",
    "recompute-bos": "#4d4d4d",
}
LABELS = {
    "full": "full attention (stock vLLM)",
    "window": "window, no sink tokens",
    "sink": "4 sink tokens + window",
    "absolute": "sinks left at absolute positions",
    "recompute-bos": "window recomputed, BOS in front",
}
PANELS: dict[str, tuple[str, Callable[[Arm], int]]] = {
    "sinks": ("sink tokens", lambda arm: arm.sinks),
    "capacity": ("capacity (tokens)", lambda arm: arm.schedule.capacity),
    "stride": ("stride, same capacity", lambda arm: arm.stride),
    "stride-window": ("stride, same window", lambda arm: arm.stride),
}
POINTS = 24  # per arm and decade of positions


def curve(series: list[Series], first: int, last: int) -> tuple[list[float], list[float]]:
    """Positions and perplexities over spans of equal ratio."""
    steps = round(POINTS * math.log10(last / first))
    edges = [first * (last / first) ** (i / steps) for i in range(steps + 1)]
    found = [
        ((begin * end) ** 0.5, mean_perplexity(series, begin, end))
        for begin, end in itertools.pairwise(edges)
    ]
    kept = [(x, y) for x, y in found if not math.isnan(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def perplexity(run: Path, trained: int, plt: Any) -> Path:
    """Log-perplexity by stream position: the arms' short texts, the long stream behind them."""
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    arms = load(run / "arms") if (run / "arms").is_dir() else {}
    for name, label in LABELS.items():
        if name in arms and any(series.rows for series in arms[name].values()):
            x, y = curve(list(arms[name].values()), 64, 8192)
            axes.plot(x, y, color=COLOURS[name], label=label, linewidth=1.5)
        elif name in arms:
            losses = sorted(item for series in arms[name].values() for item in series.at.items())
            mean = math.exp(sum(loss for _, loss in losses) / len(losses))
            span = [losses[0][0], losses[-1][0]]
            axes.plot(span, [mean] * 2, color=COLOURS[name], label=label, linestyle=":")
    endless = load(run / "endless") if (run / "endless").is_dir() else {}
    for texts in (texts for name, texts in endless.items() if name.endswith("sink")):
        if "python" in texts:
            found = texts["python"].by_bucket(20_000)
            axes.plot(
                [start + 10_000 for start in found],
                list(found.values()),
                color=COLOURS["sink"],
                linewidth=0.8,
                label="4 sink tokens + window, one request of a million tokens",
            )
    axes.axvline(trained, color="black", linewidth=0.8, linestyle="--")
    axes.annotate("trained length", (trained, 0.98), xycoords=("data", "axes fraction"), va="top")
    axes.set(xscale="log", yscale="log", xlabel="stream position (log)", ylabel="perplexity (log)")
    axes.legend(fontsize=8)
    return save(figure, run / "perplexity.svg")


def ablations(run: Path, plt: Any) -> Path:
    """Perplexity of every value, as a ratio to 4 sinks in the full capacity, 95% intervals."""
    runs: Runs = load(run / "ablations")
    chosen = [
        group
        for group, arms in groups(256).items()
        if group in PANELS and sum(unit(arm) in runs for arm in arms) > 1
    ]
    figure, panels = plt.subplots(
        1, len(chosen), figsize=(11, 3), sharey=True, squeeze=False, layout="constrained"
    )
    base = "S4-W220-g32-float32"
    for panel, group in zip(panels[0], chosen, strict=True):
        arms = [arm for arm in groups(256)[group] if unit(arm) in runs]
        for place, arm in enumerate(arms):
            logs = [
                math.log(series.perplexity(256) / runs[base][text].perplexity(256))
                for text, series in runs[unit(arm)].items()
            ]
            interval = Interval.of(logs)
            middle = math.exp(interval.mean)
            half = 0.0 if math.isnan(interval.half) else middle * math.expm1(interval.half)
            colour = COLOURS["sink" if arm.sinks else "window"]
            panel.bar(place, middle, yerr=half, color=colour, capsize=3, width=0.7)
        title, value = PANELS[group]
        panel.set_xticks(range(len(arms)), [str(value(arm)) for arm in arms])
        panel.set_title(title, fontsize=9)
        panel.axhline(1, color="black", linewidth=0.6)
    panels[0][0].set(ylabel="perplexity ÷ S=4, C=256, g=32", ylim=(0.8, None))
    return save(figure, run / "ablations.svg")


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="figures", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder below benchmarks/results")
    parser.add_argument(
        "--trained", type=int, default=256, help="context the model was trained for"
    )
    options = parser.parse_args()
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sink_vllm"  # the same data, the same file
    from matplotlib import pyplot as plt

    print(perplexity(options.run, options.trained, plt), "written")
    if (options.run / "ablations").is_dir():
        print(ablations(options.run, plt), "written")


if __name__ == "__main__":
    main()
