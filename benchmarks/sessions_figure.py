"""A plot of a run of `sessions`: what a larger pool buys.

    python -m benchmarks.sessions_figure benchmarks/results/RUN

Needs matplotlib (``pip install -e ".[bench]"``).
"""

import json
from pathlib import Path

from benchmarks import plot


def write(run: Path) -> Path:
    """The figure, beside the rows."""
    found = json.loads((run / "summary.json").read_text())
    factors = [float(factor) for factor in found]
    path = run / "sessions.svg"
    with plot.figure(path, rows=2, figsize=(6, 5), sharex=True) as (tokens, seconds):
        for kind in next(iter(found.values())):
            arms = [one[kind] for one in found.values()]
            tokens.plot(factors, [one["computed_over_new"] for one in arms], marker=".", label=kind)
            (line,) = seconds.plot(
                factors, [1e3 * one["first_s_p50"] for one in arms], marker=".", label=kind
            )
            p99 = [1e3 * one["first_s_p99"] for one in arms]
            seconds.plot(factors, p99, marker=".", linestyle="--", color=line.get_color())
        tokens.set(ylabel="tokens computed ÷ new", ylim=(1, None))
        tokens.legend(fontsize=8)
        seconds.set(
            xlabel="KV pages of the pool ÷ pages that all conversations hold at most",
            ylabel="first token, ms (dashed: p99)",
            ylim=(0, None),
        )
    return path


if __name__ == "__main__":
    plot.main(__doc__, write)
