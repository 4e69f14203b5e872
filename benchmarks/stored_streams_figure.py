"""A plot of a run of `stored_streams`: time of an append by the position of its stream.

    python -m benchmarks.stored_streams_figure benchmarks/results/RUN

Needs matplotlib (``pip install -e ".[bench]"``). Every append is a point; the line is the median.
"""

import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks import plot
from benchmarks.rows import read


def seconds_by_position(run: Path) -> dict[int, list[float]]:
    """Of the arm `flat`."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in read(run)["appends.jsonl"]:
        if row["arm"] == "flat":
            found[row["position"]].append(row["seconds"])
    return dict(sorted(found.items()))


def write(run: Path) -> Path:
    """The figure, beside the rows."""
    found = seconds_by_position(run)
    path = run / "appends.svg"
    with plot.figure(path, figsize=(6, 3.5)) as panel:
        for position, seconds in found.items():
            milliseconds = [1000 * one for one in seconds]
            panel.plot([position] * len(seconds), milliseconds, ".", color="tab:blue", alpha=0.3)
        medians = [1000 * statistics.median(seconds) for seconds in found.values()]
        panel.plot(list(found), medians, color="black", label="median")
        panel.set(xscale="log", xlabel="position of the stream, tokens", ylabel="append, ms")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    return path


if __name__ == "__main__":
    plot.main(__doc__, write)
