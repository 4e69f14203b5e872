"""Question: how fast are many concurrent streams, beside what applications do today?

    python -m benchmarks.serving.run --set full [--scenarios streams memory] [--name NAME]

Runs the scenarios of `scenarios.json` on the arms of `arms.json`. All servers of a scenario are up
at the same time, and the arms take turns, repetition by repetition; who begins alternates. One file
of raw rows per scenario and repetition; a finished one is never made again, so a run that was
interrupted goes on with the same `--name`. `tables.py` and `figures.py` make what is published
from the rows alone.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import MODEL, RESULTS, default_name
from benchmarks.peers import llama_cpp
from benchmarks.quality.isolate import WorkError
from benchmarks.quality.store import Store, StoreError
from benchmarks.serving import figures, runs, tables
from benchmarks.serving.load import LoadError
from benchmarks.serving.servers import running
from benchmarks.serving.spec import Arm, Scenario, SpecError, load_arms, load_scenarios
from examples.serving import Server, ServerError, stop_on_terminate

Row = dict[str, Any]
FAILURES = (
    aiohttp.ClientError,
    LoadError,
    OSError,
    ServerError,
    SpecError,
    StoreError,
    WorkError,
)
BACKGROUNDS = ("ordinary", "endless")


def turn(
    scenario: Scenario,
    arms: Mapping[str, Arm],
    servers: Mapping[str, Server],
    dtype: str,
    repetition: int,
) -> Iterator[Row]:
    """One repetition of everything: all numbers of streams, all arms."""
    for streams in scenario.streams:
        names = list(BACKGROUNDS if scenario.kind == "mixed" else scenario.arms)
        if repetition % 2:
            names.reverse()
        for name in names:
            facts: Row = {"arm": name, "streams": streams, "repetition": repetition}
            if scenario.kind == "mixed":
                server = servers[next(iter(servers))]
                found = runs.mixed(name, scenario, server, streams, repetition)
            elif arms[name].transformers is not None:
                found = runs.transformers(arms[name], scenario, dtype, streams, repetition)
            else:
                run = {"prompts": runs.prompts, "conversations": runs.conversations}.get(
                    scenario.kind, runs.endless
                )
                found = run(arms[name], scenario, servers, streams, repetition)
            print(_progress(scenario, facts, found), flush=True)
            yield {**facts, **found}


def _progress(scenario: Scenario, facts: Row, found: Row) -> str:
    rate = found.get("common_tokens_per_second") or found.get("tokens_per_second")
    shown = f"{rate:.1f} tokens/s" if rate else f"{found['tokens']} tokens"
    first = found["first_token"].get("p50")
    return (
        f"{scenario.name} #{facts['repetition'] + 1} {facts['arm']} x{facts['streams']}: {shown}"
        + (f", first token {1e3 * first:.0f} ms" if first else "")
    )


def run(
    store: Store,
    scenarios: list[Scenario],
    arms: Mapping[str, Arm],
    dtype: str,
    portion: int | None = None,
) -> None:
    """The repetitions that ``store`` has not got yet, at most ``portion`` of each scenario."""
    for scenario in scenarios:
        undone = [n for n in range(scenario.repetitions) if not store.done(f"{scenario.name}-{n}")]
        missing = undone[:portion]
        if not missing:
            continue
        print(f"{scenario.name}: starting the servers", flush=True)
        with running(scenario, arms, dtype) as servers:
            # Not kept: the first requests of a server pay for what it sets up lazily.
            warm_up(scenario, arms, servers)
            for repetition in missing:
                with store.unit(
                    f"{scenario.name}-{repetition}", scenario=scenario.name, kind=scenario.kind
                ) as rows:
                    for row in turn(scenario, arms, servers, dtype, repetition):
                        rows.add(**row)
    store.pack()


def warm_up(scenario: Scenario, arms: Mapping[str, Arm], servers: Mapping[str, Server]) -> None:
    """A short run of one stream on every server."""
    for name, server in servers.items():
        arm = next(arm for arm in arms.values() if arm.server_name == name)
        runs.warm_up(server, arm, scenario)


def without_missing(scenario: Scenario, arms: Mapping[str, Arm]) -> Scenario:
    """The scenario without arms whose engine is not installed; each is named."""
    why = llama_cpp.missing()
    left_out = [name for name in scenario.arms if arms[name].llama is not None and why is not None]
    for name in left_out:
        print(f"{scenario.name}: {name} is left out: {why}", flush=True)
    return dataclasses.replace(
        scenario, arms=tuple(name for name in scenario.arms if name not in left_out)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", help="of weights and KV cache")
    parser.add_argument("--name", help="folder below benchmarks/results, continued if it exists")


def main() -> int:
    """0 when everything was measured; 1 when something could not be."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="serving", description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="full", help="of scenarios.json")
    parser.add_argument("--scenarios", nargs="+", help="only these")
    parser.add_argument("--portion", type=int, help="repetitions to make in this start")
    add_arguments(parser)
    options = parser.parse_args()
    stop_on_terminate()
    try:
        arms = load_arms()
        scenarios = load_scenarios(options.set, arms)
        if options.scenarios:
            scenarios = [one for one in scenarios if one.name in options.scenarios]
        scenarios = [without_missing(one, arms) for one in scenarios]
        folder: Path = RESULTS / (options.name or default_name("bench"))
        run(
            Store(folder, {**vars(options), "model": MODEL}),
            scenarios,
            arms,
            options.dtype,
            options.portion,
        )
        tables.write(folder)
        figures.write(folder)
    except FAILURES as error:
        print(f"serving: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
