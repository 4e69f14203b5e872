"""Question: what does the policy cost per token, next to stock vLLM at the same cached length?

    python -m benchmarks.overhead [--streams 1 16 64] [--stride 64] [--rounds 20] [--name NAME]

Arms: `stock` is vLLM without the plugin (`VLLM_PLUGINS` names none), `sink` is the same engine
with `--kv-policy sink`. Each arm is a process of its own with an in-process engine; both are up
at the same time and take turns, round by round, so that a slow minute of the machine hits both.
Same model, dtype, block size, page pool, batch limits, sampling and step loop.

Method. Stock vLLM cannot hold its length, so lengths are matched instead. Between two evictions a
stream of the sink arm attends to `C-g+1 .. C` cached tokens, one length per step. A round is

- sink: any `g` consecutive steps of streams that have been evicting for a while. They contain
  exactly one eviction, and every length of the range exactly once.
- stock: streams prefilled to just below `C-g`, then the `g` decode steps with exactly these
  lengths. Prefill is not timed.

Before the timed steps every round makes a few that are not timed, in both arms, because caches are
cold after the other arm's turn. All streams have the same length, so all of the sink arm evict in
the same step: its worst case. A step is timed around `LLMEngine.step()`: scheduler, model,
sampler and output processing, everything but HTTP.

The sink arm must report as many evictions as its schedule says, and both arms must make exactly one
token per stream and step; otherwise the run ends with an error instead of numbers.

Not to be concluded: absolute speed of either arm (this model is tiny, so the fixed cost per step
weighs more than with any model in use), or anything about prompts.
A model with recurrent layers needs pages that hold a state, in both arms:

    python -m tests.support.write_family Falcon-H1 out/falcon-h1
    python -m benchmarks.overhead --model out/falcon-h1 --dtype float32 --window 60 --block-size 64

`--control` runs stock against stock: how far its ratios are from 1 is the noise of the machine. The
median over rounds of the rounds' mean ratios is printed beside the overall mean: on a machine that
does something else now and then, the two differ, because one stalled step outweighs a whole round.
Two processes that do the same differ by up to 4% as long as they live (where their memory lies); so
what matters to a few percent is measured over several `--starts`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import MODEL, Results, default_name, describe
from benchmarks.overhead_arm import ArmError, ArmProcess, Setup, Step

T = TypeVar("T")

MEAN_RATIO = 1.05
MEDIAN_RATIO = 1.03
WORST_STEP = 3.0


def measure(
    arms: dict[str, ArmProcess], streams: int, rounds: int, one: Callable[[ArmProcess], T]
) -> dict[str, list[T]]:
    """``one`` round of every arm, again and again; the arms alternate, and so does who begins."""
    for arm in arms.values():
        arm.start(streams)
    found: dict[str, list[T]] = {name: [] for name in arms}
    order = list(arms)
    for _ in range(rounds):
        for name in order:
            found[name].append(one(arms[name]))
        order.reverse()
    for arm in arms.values():
        arm.finish()
    return found


def compare(
    steps: dict[str, list[list[Step]]], base: str, other: str, starts: int = 1
) -> dict[str, Any]:
    """The figures of one number of streams.

    Args:
        steps: by arm and round.
        base: arm the other is compared with.
        other: that one.
        starts: of the arms, with equally many rounds each.
    """
    flat = {
        name: [step.seconds for one in rounds for step in one] for name, rounds in steps.items()
    }
    evicting = [step.seconds for one in steps[other] for step in one if step.evicting]
    ratios = [
        statistics.fmean(step.seconds for step in after)
        / statistics.fmean(step.seconds for step in before)
        for before, after in zip(steps[base], steps[other], strict=True)
    ]
    each = len(steps[base]) // starts
    means = [
        _mean(steps[other][first : first + each]) / _mean(steps[base][first : first + each])
        for first in range(0, starts * each, each)
    ]
    mean = statistics.fmean(flat[other]) / statistics.fmean(flat[base])
    median = statistics.median(flat[other]) / statistics.median(flat[base])
    worst = max(flat[other]) / statistics.median(flat[other])
    return {
        "mean_ratio": mean,
        "median_ratio": median,
        "worst_step_over_median": worst,
        "worst_step_over_median_stock": max(flat[base]) / statistics.median(flat[base]),
        "eviction_step_over_median": (
            statistics.fmean(evicting) / statistics.median(flat[other]) if evicting else None
        ),
        "worst_eviction_step_over_median": (
            max(evicting) / statistics.median(flat[other]) if evicting else None
        ),
        "mean_ratio_of_rounds": describe(ratios),
        "mean_ratio_of_starts": describe(means),
        base: describe(flat[base]),
        other: describe(flat[other]),
        "holds": mean <= MEAN_RATIO and median <= MEDIAN_RATIO and worst <= WORST_STEP,
    }


def _mean(rounds: Sequence[Sequence[Step]]) -> float:
    return statistics.fmean(step.seconds for one in rounds for step in one)


def table(found: dict[int, dict[str, Any]]) -> str:
    """One row per number of streams."""
    head = "streams  mean ratio (median round)  median ratio  worst/median step     holds"
    rows = [
        f"{streams:>7}  {row['mean_ratio']:10.3f} {'':5}"
        f"({row['mean_ratio_of_rounds']['median']:6.3f})  {row['median_ratio']:12.3f}  "
        f"{row['worst_step_over_median']:6.2f} (stock {row['worst_step_over_median_stock']:.2f})  "
        f"{'yes' if row['holds'] else 'NO'}"
        for streams, row in found.items()
    ]
    limits = f"limits   {MEAN_RATIO:10.2f} {'':15}{MEDIAN_RATIO:12.2f}  {WORST_STEP:6.2f}"
    return "\n".join([head, *rows, limits])


def _of_one_start(
    setup: Setup, other: str, options: argparse.Namespace
) -> Iterator[tuple[int, str, list[Step]]]:
    """Every round of new processes: number of streams, arm, steps."""
    with ArmProcess("stock", setup) as stock, ArmProcess(other, setup) as policy:
        arms = {"stock": stock, other: policy}
        for streams in options.streams:
            print(f"{streams} streams, {options.rounds} rounds of {setup.stride} steps", flush=True)
            for arm, rounds in measure(arms, streams, options.rounds, ArmProcess.round).items():
                yield from ((streams, arm, one) for one in rounds)


def run(options: argparse.Namespace) -> bool:
    """Both arms, every number of streams."""
    setup = Setup(
        model=str(options.model),
        dtype=options.dtype,
        prefix_caching=options.prefix_caching,
        block_size=options.block_size,
        sink_tokens=options.sinks,
        window=options.window,
        stride=options.stride,
        max_streams=max(options.streams),
        eager=not options.compiled,
    )
    other = "control" if options.control else "sink"
    results = Results(options.name or default_name("overhead"), vars(options))
    steps: dict[int, dict[str, list[list[Step]]]] = {
        streams: {"stock": [], other: []} for streams in options.streams
    }
    with results.rows("steps.jsonl") as rows:
        for start in range(options.starts):
            print(
                f"starting the arms: stock, {other} (capacity {setup.schedule.capacity}), "
                f"{start + 1} of {options.starts}",
                flush=True,
            )
            for streams, arm, one in _of_one_start(setup, other, options):
                number = len(steps[streams][arm])
                steps[streams][arm].append(one)
                for step in one:
                    rows.add(streams=streams, arm=arm, round=number, start=start, **asdict(step))
    found = {
        streams: compare(one, "stock", other, options.starts) for streams, one in steps.items()
    }
    results.summary({str(streams): row for streams, row in found.items()})
    print(table(found))
    return all(row["holds"] for row in found.values())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=20, help="strides per arm, at least 5")
    parser.add_argument("--starts", type=int, default=1, help="of both arms, so many rounds each")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=188)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="in either arm",
    )
    parser.add_argument("--compiled", action="store_true", help="compile the model, in either arm")
    parser.add_argument("--control", action="store_true", help="stock against stock")
    parser.add_argument("--name", help="folder below benchmarks/results; default: date and commit")
    options = parser.parse_args(arguments)
    if options.rounds < 5:
        parser.error(f"--rounds={options.rounds} is too few to say anything; use 5 or more")
    if options.starts < 1:
        parser.error(f"--starts={options.starts} measures nothing; use 1 or more")
    return options


def main() -> int:
    """0 when every figure holds, 1 when one does not or nothing could be measured."""
    try:
        return 0 if run(parse()) else 1
    except (ArmError, OSError) as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
