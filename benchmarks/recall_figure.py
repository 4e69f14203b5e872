"""A plot of a run of `recall`: share of right answers by distance, every arm.

    python -m benchmarks.recall_figure benchmarks/results/RUN

Needs matplotlib (``pip install -e ".[bench]"``). Bars are 95% intervals; dotted: guessing.
"""

from pathlib import Path

from benchmarks import plot
from benchmarks.recall import verdict
from benchmarks.rows import read


def write(run: Path) -> Path:
    """The figure, beside the rows."""
    found = verdict(read(run)["questions.jsonl"])
    path = run / "recall.svg"
    with plot.figure(path, figsize=(6, 3.5)) as panel:
        for arm, cells in found["recall"].items():
            shares = [one["recall"] for one in cells.values()]
            low = [max(one["recall"] - one["interval"][0], 0) for one in cells.values()]
            high = [max(one["interval"][1] - one["recall"], 0) for one in cells.values()]
            distances = [int(distance) for distance in cells]
            panel.errorbar(distances, shares, yerr=[low, high], marker=".", capsize=2, label=arm)
        panel.axhline(found["chance"], color="black", linestyle=":", linewidth=0.8)
        first = min(int(d) for d, one in found["recall"]["hybrid"].items() if one["gone"])
        least, most = panel.get_xlim()
        panel.axvspan(first / 1.4, most, color="tab:gray", alpha=0.1, linewidth=0)
        panel.set_xlim(least, most)
        panel.set(
            xscale="log", xlabel="tokens since the fact (gray: evicted)", ylabel="right answers"
        )
        panel.set_ylim(0, 1.03)
        panel.legend(fontsize=8)
    return path


if __name__ == "__main__":
    plot.main(__doc__, write)
