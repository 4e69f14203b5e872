"""The published results: a shape that stays small, and numbers that still follow from the rows."""

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    flatness,
    hibernation,
    overhead,
    recall,
    service,
    sessions,
    soak,
    stored_streams,
)
from benchmarks.common import RESULTS, ROOT
from benchmarks.overhead_arm import Step
from benchmarks.quality import tables as quality
from benchmarks.rows import PACK, Row, read
from benchmarks.serving import tables as serving

FILES = {
    "meta.json",  # what was run where
    "summary.json",  # what was concluded, or
    "tables.md",  # the same where it is more than one number
    PACK,  # the raw rows, where there are more than the summary has
    "tests.txt",  # of benchmarks.gpu: the tests it ran first
}
LARGEST = 2_000_000  # bytes of all results together
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
GONE = "## Runs that are no longer here"


def tracked() -> list[Path]:
    """What git has, or all there is where there is no git; own runs are not published yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", str(RESULTS)], cwd=ROOT, capture_output=True, text=True
    )
    names = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in names or RESULTS.rglob("*") if path.is_file()]


def runs() -> list[Path]:
    """Folders with a ``meta.json``; some are parts of a larger run."""
    return sorted(path.parent for path in tracked() if path.name == "meta.json")


def name_of(run: Path) -> str:
    return str(run.relative_to(RESULTS))


def whole(run: Path) -> Path:
    """The run that another is a part of, or itself."""
    return RESULTS / run.relative_to(RESULTS).parts[0]


def rows_of(run: Path, part: str) -> list[Row]:
    return read(run)[part]


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_there_are_no_loose_files() -> None:
    assert {str(f) for f in tracked() if f.name not in FILES and f.suffix != ".svg"} == set()
    folders = {path.parent for path in tracked() if path.name in {PACK, "summary.json"}}
    assert folders <= set(runs()), "a run says how it was made"


def test_all_of_them_are_small() -> None:
    assert sum(path.stat().st_size for path in tracked()) < LARGEST


@pytest.mark.parametrize("run", runs(), ids=name_of)
def test_every_run_says_what_was_concluded(run: Path) -> None:
    """Its own summary or tables, or the tables of the run it is a part of."""
    meta = json.loads((run / "meta.json").read_text())
    for start in meta if isinstance(meta, list) else [meta]:
        assert {"command", "settings", "commit", "versions", "hardware"} <= start.keys()
    assert (run / "summary.json").exists() or (whole(run) / "tables.md").exists()


@pytest.mark.parametrize("run", [run for run in runs() if (run / PACK).exists()], ids=name_of)
def test_rows_of_every_run_can_be_read(run: Path) -> None:
    parts = read(run)
    assert parts
    assert all(parts.values())


def test_every_run_is_cited_and_every_cited_run_is_here() -> None:
    pages = {path.name: path.read_text() for path in PAGES}
    pages["LOG.md"], _, gone = pages["LOG.md"].partition(GONE)
    text = "\n".join(pages.values())
    here = {whole(run).name for run in runs()}
    deleted = re.findall(r"^\| `(\w[\w.-]+)` \|.* `([\w.-]+)`[^|]*\|$", gone, re.MULTILINE)

    assert {run for run in here if run not in text} == set()
    assert set(re.findall(r"results/(\w[\w.-]*\w)(?![\w*…])", text)) <= here
    assert deleted
    assert {run for run, _ in deleted} & here == set()
    assert {by for _, by in deleted} <= here


# What was concluded then follows from the rows now. Rows and summaries are both exact to the digit.


def agrees(found: dict[str, Any], published: dict[str, Any]) -> None:
    """Figures that were added to a benchmark later are not in the older summaries."""
    assert {key: found[key] for key in published} == published


@pytest.mark.parametrize("run", [run for run in runs() if "overhead" in run.name], ids=name_of)
def test_overhead_follows_from_its_rows(run: Path) -> None:
    rows = rows_of(run, "steps.jsonl")
    for streams, published in summary_of(run).items():
        mine = [row for row in rows if row["streams"] == int(streams)]
        starts = len({row.get("start") for row in mine})
        found = overhead.compare(rounds_of(mine), "stock", "sink", starts)
        agrees(found, published)


def rounds_of(rows: Sequence[Row]) -> dict[str, list[list[Step]]]:
    """Steps by arm and round."""
    steps: dict[str, dict[int, list[Step]]] = {}
    for row in rows:
        step = Step(row["seconds"], row["cached"], row["evicting"])
        steps.setdefault(row["arm"], {}).setdefault(row["round"], []).append(step)
    return {arm: list(rounds.values()) for arm, rounds in steps.items()}


@pytest.mark.parametrize("run", [run for run in runs() if "flatness" in run.name], ids=name_of)
def test_flatness_follows_from_its_rows(run: Path) -> None:
    agrees(flatness.verdict(rounds_of(rows_of(run, "steps.jsonl"))), summary_of(run))


@pytest.mark.parametrize("run", [run for run in runs() if "hibernation" in run.name], ids=name_of)
def test_hibernation_follows_from_its_rows(run: Path) -> None:
    """Every arm beside the same turns of the pool that loses nothing."""
    turns, rounds = rows_of(run, "turns.jsonl"), rows_of(run, "rounds.jsonl")
    by_arm = {arm: [row for row in turns if row["arm"] == arm] for arm in hibernation.ARMS}
    found = {arm: hibernation.conclude(rows, by_arm["large"]) for arm, rows in by_arm.items()}
    read = hibernation.from_storage([row for row in rounds if row["arm"] == "disk"])
    found["disk"]["storage_over_pages_read"] = read

    agrees(found, summary_of(run))


@pytest.mark.parametrize(
    "run", [run for run in runs() if run.name.startswith("stored_streams")], ids=name_of
)
def test_appends_follow_from_their_rows(run: Path) -> None:
    """Seconds of an append, and of the engine's longest step where steps were noted."""
    published = summary_of(run)["flat"]
    rows = [row for row in rows_of(run, "appends.jsonl") if row["arm"] == "flat"]
    for name, told in (("seconds", published), ("longest_step_s", published.get("longest_step"))):
        if told is not None:
            by_position: dict[int, list[float]] = {}
            for row in rows:
                by_position.setdefault(row["position"], []).append(row[name])
            found = json.loads(json.dumps(stored_streams.compared(by_position)))
            assert found == {key: told[key] for key in found}


@pytest.mark.parametrize("run", [run for run in runs() if "soak" in run.name], ids=name_of)
def test_soak_follows_from_its_rows(run: Path) -> None:
    published = summary_of(run)
    samples = [soak.Sample(**row) for row in rows_of(run, "samples.jsonl")]

    agrees(soak.verdict(samples, published["tokens"]), published)


@pytest.mark.parametrize("run", [run for run in runs() if "recall" in run.name], ids=name_of)
def test_recall_follows_from_its_rows(run: Path) -> None:
    """And every fact that counts as gone was evicted before it was asked for."""
    rows, published = rows_of(run, "questions.jsonl"), summary_of(run)
    found = json.loads(json.dumps(recall.verdict(rows)))  # pairs are lists in files

    agrees(found | {"trained": published["trained"]}, published)
    for row in rows:
        assert row["gone"] == recall.gone(row["computed"] - row["distance"], row["computed"])
        assert row["gone"] == (row["evictions_since"] > 0 and row["distance"] > 124)


@pytest.mark.parametrize(
    "run", [run for run in runs() if run.name.startswith("sessions")], ids=name_of
)
def test_sessions_follow_from_their_rows(run: Path) -> None:
    rows = rows_of(run, "turns.jsonl")
    for factor, arms in summary_of(run).items():
        for kind, published in arms.items():
            mine = [row for row in rows if (str(row["factor"]), row["kind"]) == (factor, kind)]
            assert sessions.conclude(mine, published["preemptions"]) == published


@pytest.mark.parametrize("arm", ["chat", "streams"])
def test_turns_that_alternate_follow_from_their_rows(arm: str) -> None:
    run = RESULTS / "service_interleaved_20261121"
    rows = [row for row in rows_of(run, "turns.jsonl") if "ttft_s" in row]
    beside = [row for row in rows if row["arm"] == f"{arm}-beside"]
    late = [row for row in rows if row["arm"] == arm][-len(beside) :]

    assert service.interleaved(late, beside) == summary_of(run)[arm]["interleaved"]


@pytest.mark.parametrize(
    "run", [run for run in runs() if run.name.startswith(("bench", "tuning", "llama"))], ids=name_of
)
def test_tables_of_throughput_follow_from_the_rows(run: Path) -> None:
    assert "\n\n".join(serving.sections(run)) + "\n" == (run / "tables.md").read_text()


@pytest.mark.parametrize(
    "run", sorted({whole(run) for run in runs() if "quality" in whole(run).name}), ids=name_of
)
def test_tables_of_quality_follow_from_the_rows(run: Path) -> None:
    """In the run's folder and in the page."""
    body = "\n\n".join(quality.sections(run))

    assert (run / "tables.md").read_text().endswith(f"\n\n{body}\n")
    assert body.replace("## ", "### ") in (ROOT / "docs" / "quality.md").read_text()
