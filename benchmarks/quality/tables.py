"""Markdown tables of a run, from its raw data and nothing else: ``<run>/tables.md``.

    python -m benchmarks.quality.tables benchmarks/results/quality_… [--into docs/quality.md]

Every folder of the run holds the units of one benchmark; a table is written for each that is there.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.buckets import Interval, Series, differences, ratio
from benchmarks.quality.store import units
from benchmarks.rows import read

RANGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Stream positions between which perplexities are given; 256 is the small model's context."""
ARM_ORDER = ("full", "window", "sink", "absolute", "recompute", "recompute-bos")
BUCKET = 100_000
BEGIN = "<!-- tables: written by python -m benchmarks.quality.tables -->"
END = "<!-- end of tables -->"

Runs = dict[str, dict[str, Series]]
"""Series by unit and text."""


def load(folder: Path) -> Runs:
    """All series of a folder."""
    runs: Runs = {}
    for facts, series in units(folder):
        if "unit" in facts:
            runs.setdefault(facts["unit"], {})[facts["text"]] = series
    return runs


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def mean_perplexity(series: Iterable[Series], begin: float = 0, end: float = math.inf) -> float:
    """Over all tokens of several texts in a range of positions."""
    rows = [row for one in series for row in one.rows if begin <= row["start"] < end]
    tokens = sum(row["tokens"] for row in rows)
    return math.exp(math.fsum(row["sum"] for row in rows) / tokens) if tokens else math.nan


def sampled_perplexity(series: Iterable[Series], begin: float, end: float) -> float:
    losses = [loss for one in series for p, loss in one.at.items() if begin <= p < end]
    return math.exp(statistics.fmean(losses)) if losses else math.nan


def ratios(one: Mapping[str, Series], other: Mapping[str, Series], begin: float, end: float) -> str:
    """The ratio over all texts, with an interval over texts; "–" if nothing is shared."""
    logs = [
        math.log(value)
        for text, series in one.items()
        if text in other and not math.isnan(value := ratio(series, other[text], begin, end))
    ]
    if not logs:
        return "–"
    if len(logs) == 1:
        return f"{math.exp(logs[0]):.3f}"
    return Interval.of(logs).as_ratio()


def arms(runs: Runs) -> Iterator[str]:
    """Perplexity by position, and the ratios to recomputation."""
    names = [name for name in ARM_ORDER if name in runs]
    spans: list[tuple[float, float]] = list(itertools.pairwise(RANGES))
    texts = sorted({text for name in names for text in runs[name]})
    yield f"Texts: {', '.join(texts)}."
    rows: list[list[str]] = []
    for begin, end in spans:
        values = [
            sampled_perplexity(runs[name].values(), begin, end)
            if name.startswith("recompute")
            else mean_perplexity(runs[name].values(), begin, end)
            for name in names
        ]
        if not all(math.isnan(value) for value in values):
            rows.append([f"{begin:,}–{end:,}", *map(number, values)])
    yield table(["stream position", *names], rows)
    if any(name.startswith("recompute") for name in names):
        yield (
            "Recomputation is measured at sampled positions, so its perplexities compare with "
            "those beside them, which are over all tokens, only by the ratios below."
        )
    for base in ("recompute-bos", "recompute"):
        if base in runs:
            yield f"Perplexity ÷ that of `{base}` at the same positions (95% interval over texts):"
            others = [name for name in names if name != base]
            rows = []
            for begin, end in [(0, math.inf), *spans]:
                cells = [ratios(runs[name], runs[base], begin, end) for name in others]
                if any(cell != "–" for cell in cells):
                    where = "all" if end == math.inf else f"{begin:,}–{end:,}"
                    rows.append([where, *cells])
            yield table(["stream position", *others], rows)


def endless(runs: Runs) -> Iterator[str]:
    """Buckets of 100,000 tokens of the long streams."""
    short = {name.removeprefix("endless-"): series for name, series in runs.items()}
    streams = short.get("sink", {})
    for text, series in streams.items():
        found = series.by_bucket(BUCKET)
        mean = math.exp(statistics.fmean(map(math.log, found.values()))) if found else math.nan
        tokens = sum(row["tokens"] for row in series.rows) + 1
        others = [n for n in ARM_ORDER if n != "sink" and text in short.get(n, {})]
        bases = [n for n in others if n.startswith("recompute")]
        rows = []
        for start, value in found.items():
            end = start + BUCKET
            cells = [f"{start:,}", number(value, 3), f"{value / mean - 1:+.1%}"]
            for name in others:
                other = short[name][text]
                here = other.by_bucket(BUCKET).get(start, math.nan)
                if name.startswith("recompute"):
                    here = sampled_perplexity([other], start, end)
                cells.append(number(here, 3))
            for name in bases:
                found_here = differences(series, short[name][text], start, end)
                cells.append(Interval.of(found_here).as_ratio() if len(found_here) > 1 else "–")
            rows.append(cells)
        yield f"Text `{text}`: one request of {tokens:,} tokens."
        heads = ["from token", "sink", "against mean", *others, *(f"sink ÷ {n}" for n in bases)]
        yield table(heads, rows)
        for name in bases:
            apart = differences(series, short[name][text])
            yield (
                f"sink ÷ {name} over {len(apart):,} positions: {Interval.of(apart).as_ratio()}. "
                "Intervals in this table are over positions; perplexities of recomputation are of "
                "its positions, those of the stream of all tokens."
            )


def against(runs: Runs, base: str, begin: int) -> dict[str, str]:
    """Perplexity of every unit ÷ that of ``base`` on the same texts, with intervals."""
    found = {}
    for name, texts in runs.items():
        logs = [
            math.log(series.perplexity(begin) / runs[base][text].perplexity(begin))
            for text, series in texts.items()
            if text in runs.get(base, {})
        ]
        found[name] = Interval.of(logs).as_ratio() if len(logs) > 1 else "–"
    return found


def ablations(runs: Runs) -> Iterator[str]:
    """One table per group; the first 256 tokens, where nothing is evicted, are left out."""
    from benchmarks.quality.ablations import groups, unit

    begin = 256
    for group, members in groups(256).items():
        names = [unit(arm) for arm in members if unit(arm) in runs]
        if len(names) < 2:
            continue
        base = "S4-W220-g32-float32" if "S4-W220-g32-float32" in names else names[-1]
        relative = against(runs, base, begin)
        rows = [
            [
                arm.sinks,
                arm.window,
                arm.stride,
                arm.schedule.capacity,
                arm.dtype,
                number(mean_perplexity(runs[unit(arm)].values(), begin), 3),
                "1" if unit(arm) == base else relative[unit(arm)],
            ]
            for arm in members
            if unit(arm) in runs
        ]
        texts = len(runs[names[0]])
        yield f"Group `{group}`, {texts} texts; ratio to `{base}` with 95% interval over texts:"
        yield table(["S", "W", "g", "capacity", "dtype", "perplexity", "ratio"], rows)


def sink_token(runs: Runs) -> Iterator[str]:
    """Table 3 of the paper."""
    rows = []
    for kind in ("without", "with"):
        names = [f"{kind}-S{sinks}" for sinks in (0, 1, 4)]
        if all(name in runs for name in names):
            base = against(runs, names[-1], 256)
            cells = [
                f"{mean_perplexity(runs[name].values(), 256):.3f}"
                + ("" if name == names[-1] else f", ratio to 4 + W−4: {base[name]}")
                for name in names
            ]
            rows.append([f"{kind} sink token", *cells])
    if rows:
        yield table(["trained", "0 + W", "1 + W−1", "4 + W−4"], rows)


def answers(folder: Path, group: Sequence[str], by: str) -> Iterator[str]:
    """Accuracy of StreamEval and chat rows."""
    found: dict[tuple[str, ...], dict[Any, list[bool]]] = {}
    for facts, *rows in read(folder).values():
        key = tuple(str(facts[name]) for name in group)
        for row in rows:
            found.setdefault(key, {}).setdefault(row[by], []).append(row["right"])
    columns = sorted({value for rows in found.values() for value in rows}, key=lambda v: v or 1e9)
    if found:
        yield table(
            [*group, *(f"{by} {value}" if value else "unseen" for value in columns), "questions"],
            [
                [
                    *key,
                    *(f"{statistics.fmean(rows[v]):.0%}" if v in rows else "–" for v in columns),
                    sum(map(len, rows.values())),
                ]
                for key, rows in found.items()
            ],
        )


def sections(run: Path) -> Iterator[str]:
    """All of a run's tables, folder by folder."""
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        name = folder.name
        if name.startswith("endless"):
            parts = list(endless(load(folder)))
        elif name.startswith("ablations"):
            parts = list(ablations(load(folder)))
        elif name.startswith("sink_token"):
            parts = list(sink_token(load(folder)))
        elif name.startswith("streameval"):
            parts = list(answers(folder, ("sinks", "window"), "distance"))
        elif name.startswith("chat"):
            parts = list(answers(folder, ("arm",), "back"))
        else:
            parts = list(arms(load(folder)))
        if parts:
            yield f"## {name}"
            starts = json.loads((folder / "meta.json").read_text())
            yield "Command: `" + starts[0]["command"] + "`."
            yield from parts


def into(page: Path, body: str) -> None:
    """Put the tables between the two markers of a page."""
    head, _, rest = page.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tables", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder below benchmarks/results")
    parser.add_argument("--into", type=Path, help="page with the markers")
    options = parser.parse_args()
    if not options.run.is_dir():
        parser.error(f"{options.run} is no folder; name a run below benchmarks/results")
    body = "\n\n".join(sections(options.run))
    head = (
        f"# {options.run.name}\n\nGenerated by `python -m benchmarks.quality.tables`; do not edit."
    )
    (options.run / "tables.md").write_text(f"{head}\n\n{body}\n")
    print(f"{options.run / 'tables.md'} written")
    if options.into:
        into(options.into, body.replace("## ", "### "))


if __name__ == "__main__":
    main()
