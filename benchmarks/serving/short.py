"""The short version of the throughput benchmark: ``make bench``, eight minutes on two cores.

Runs `benchmarks.overhead` and `benchmarks.flatness` with short settings and the set `short` of
`scenarios.json`, writes tables, and ends with::

    bench: overhead=… flatness=… gap=… recompute=… transformers=… mixed=…

- overhead: time per token ÷ stock vLLM at the same cached length, evictions in lockstep included:
  mean over steps of a round, median over rounds, the worst of 1, 16 and 64 streams (aim 1.02);
- flatness: time per token at 200 capacities ÷ after the first evictions (aim 1.02);
- gap: the longest step with an eviction ÷ the median step (aim 1.5). The machine's stalls are in
  it; the table has stock vLLM's longest step beside it;
- recompute: tokens per second ÷ those of re-computing the window for each token through vLLM, one
  stream, cache of 4096 (aim 22.2, the paper's best);
- transformers: tokens per second of 32 streams ÷ those of StreamingLLM in transformers (aim 20);
- mixed: p95 of short requests' time to first token beside endless streams ÷ beside ordinary
  requests, all repetitions together (aim 1.1); the worker is in the engine's process, as two
  processes of vLLM leave their clients no turn on two processors (docs/deploying.md).

Nothing is committed: the raw rows go to ``out/``. With the ``--name`` of a run that was interrupted
it goes on where that one ended.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import flatness, overhead
from benchmarks.common import MODEL, ROOT, default_name
from benchmarks.overhead_arm import ArmError
from benchmarks.quality.store import Store
from benchmarks.serving import run as serving
from benchmarks.serving import tables
from benchmarks.serving.report import Report
from benchmarks.serving.spec import load_arms, load_scenarios
from examples.serving import stop_on_terminate

# 210 capacities of 64 tokens; and rounds that take about two minutes for all three rows.
FLATNESS = ["--tokens", "13440", "--window", "28", "--stride", "32", "--rounds", "16"]
OVERHEAD = ["--streams", "1", "16", "64", "--rounds", "5"]


def ratios(overheads: dict[str, Any], flat: dict[str, Any], report: Report) -> dict[str, float]:
    """The figures of the last line."""
    recompute = report.ratio("recompute", 1, "sink", "recompute")
    transformers = report.ratio("transformers", 32, "sink", "transformers-sink")
    assert recompute is not None
    assert transformers is not None
    (streams,) = report.streams("mixed")
    return {
        "overhead": max(row["mean_ratio_of_rounds"]["median"] for row in overheads.values()),
        "flatness": flat["ratio_of_rounds"]["median"],
        "gap": max(row["worst_eviction_step_over_median"] for row in overheads.values()),
        "recompute": recompute.median,
        "transformers": transformers.median,
        "mixed": report.pooled_p95("mixed", streams, "endless")
        / report.pooled_p95("mixed", streams, "ordinary"),
    }


def last_line(found: dict[str, float]) -> str:
    """What ``make bench`` ends with."""
    return "bench: " + " ".join(f"{name}={value:.3g}" for name, value in found.items())


def run(folder: Path, dtype: str) -> dict[str, float]:
    """Measure everything into ``folder``."""
    arms = load_arms()
    store = Store(folder, {"model": MODEL, "dtype": dtype})
    summaries = [folder / name / "summary.json" for name in ("overhead", "flatness")]
    for benchmark, words, summary in zip(
        (overhead, flatness), (OVERHEAD, FLATNESS), summaries, strict=True
    ):
        if not summary.exists():
            benchmark.run(
                benchmark.parse([*words, "--dtype", dtype, "--name", str(summary.parent)])
            )
    serving.run(store, load_scenarios("short", arms), arms, dtype)
    tables.write(folder)
    overheads, flat = (json.loads(summary.read_text()) for summary in summaries)
    return ratios(overheads, flat, Report.read(folder))


def main() -> int:
    """0 when everything was measured, whatever came out; 1 when something could not be."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    serving.add_arguments(parser)
    options = parser.parse_args()
    stop_on_terminate()
    folder = ROOT / "out" / (options.name or default_name("bench"))
    try:
        found = run(folder, options.dtype)
    except (ArmError, *serving.FAILURES) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print((folder / "tables.md").read_text())
    print(f"raw rows in {folder.relative_to(ROOT)}")
    print(last_line(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
