"""A plot of a run of `one_request`: perplexity and memory by the position of the stream.

    python -m benchmarks.one_request_figure benchmarks/results/RUN

Needs matplotlib (``pip install -e ".[bench]"``). A point of perplexity is 100,000 tokens, one
repetition of the text; memory is that of all processes of the server together.
"""

import math
import statistics
from pathlib import Path

from benchmarks import plot
from benchmarks.one_request_prompt import BUCKET
from benchmarks.quality.texts import REPEATED
from benchmarks.rows import Row, read


def by_repetition(rows: list[Row]) -> dict[int, float]:
    """Perplexity by the position at which a repetition of the text ends."""
    each = REPEATED // BUCKET
    return {
        (first + each) * BUCKET: math.exp(
            statistics.fmean(row["loss"] for row in rows[first : first + each])
        )
        for first in range(0, len(rows) - each + 1, each)
    }


def write(run: Path) -> Path:
    """The figure, beside the rows."""
    rows = read(run)
    path = run / "stream.svg"
    with plot.figure(path, rows=2, sharex=True, figsize=(6, 4.5)) as (upper, lower):
        found = by_repetition(rows["losses.jsonl"])
        upper.plot(list(found), list(found.values()), ".-")
        upper.set(ylabel="perplexity")
        samples = rows["samples.jsonl"]
        tokens = [row["tokens"] for row in samples]
        lower.plot(tokens, [sum(row["rss"].values()) / 1e9 for row in samples], color="tab:green")
        lower.set(ylabel="resident, GB", xlabel="position of the stream, tokens")
        for panel in (upper, lower):
            panel.set_ylim(bottom=0)
    return path


if __name__ == "__main__":
    plot.main(__doc__, write)
