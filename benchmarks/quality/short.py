"""The short version of the quality benchmark: ``make quality``, some minutes on two cores.

Streams four held-out texts through one engine per arm and prefills the sliding window at every
16th position after the first eviction. The last line is::

    quality: tokens=… sink/recompute=… window/recompute=… full/recompute=…

``tokens`` are the stream tokens of all arms. The ratios are of perplexities at the positions
the arms share; ``recompute`` has BOS in front of its window. ``full`` is stock vLLM with everything
in its cache, so most of its positions are beyond the trained length. Nothing is committed: the raw
rows go to ``out/``.
"""

import argparse
import math
import sys
from pathlib import Path

from benchmarks.common import ROOT, default_name
from benchmarks.quality import perplexity, tables
from benchmarks.quality.buckets import Interval, ratio
from benchmarks.quality.forcing import ForcingError
from benchmarks.quality.isolate import WorkError
from benchmarks.quality.store import StoreError
from benchmarks.quality.tables import Runs
from benchmarks.quality.texts import TextError

ARMS = ("sink", "window", "full", "recompute-bos")
TEXTS = ("held-out:0/4", "held-out:1/4", "held-out:2/4", "held-out:3/4")
BASE = "recompute-bos"


def last_line(runs: Runs) -> str:
    """What ``make quality`` ends with."""
    tokens = sum(
        row["tokens"] for unit in runs.values() for series in unit.values() for row in series.rows
    )
    parts = [f"tokens={tokens}"]
    for arm in ("sink", "window", "full"):
        logs = [math.log(ratio(runs[arm][text], base)) for text, base in runs[BASE].items()]
        parts.append(f"{arm}/recompute={Interval.of(logs).as_ratio().split()[0]}")
    return "quality: " + " ".join(parts)


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure, print the tables, and the line."""
    perplexity.run(options, folder)
    runs = tables.load(folder)
    print("\n\n".join(tables.arms(runs)))
    print(f"raw rows in {folder.relative_to(ROOT)}")
    print(last_line(runs))


def main() -> int:
    """Parse the options and run; 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="short", description=__doc__.splitlines()[0])
    perplexity.add_arguments(parser)
    parser.set_defaults(tokens=4096, every=16, bucket=64)
    options = parser.parse_args()
    options.texts, options.arms, options.full_limit = TEXTS, ARMS, options.tokens
    try:
        run(options, ROOT / "out" / default_name("quality"))
    except (ForcingError, StoreError, TextError, WorkError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
